// Maps of one pixel under a 1 x 1 kernel, as the layers of a squeeze and excitation have: products of two small matrices. One thread has a
// part of one sum, so that short sums and few results still use many threads and wait for memory once.
//
// forward: rows are images n, columns outputs k, depth inputs c; backward_input: n, c, k; backward_weight: k, c, n. Neighbouring threads
// take the direction in which both operands, or the columns, lie side by side. The threads of a sum take every `lanes`-th product, and
// their sums are added up in order.
//
// Not handled: groups; large products, which have better rows.
#include "cuda/common.cuh"
#include "cuda/limits.h"

namespace cnn_ext::cuda {
namespace {

// Element (row, depth) of the left matrix, (depth, col) of the right one; the result is dense.
struct DotProblem {
  int rows, depth, lanes;
  FastDivisor cols;
  int left_row, left_depth, right_col, right_depth;  // elements from one to the next
  bool along_depth;                                  // whether neighbouring threads take neighbouring products of a sum
};

// Threads of a sum: a power of two.
int lanes_of(int64_t depth) {
  if (depth < 16) return 1;
  return depth < 128 ? 8 : 32;
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) dot_products(DotProblem p, const T* left, const T* right, const T* bias, T* result) {
  __shared__ Accumulate<T> sums[kBlockThreads];
  const int thread = static_cast<int>(threadIdx.x), width = kBlockThreads / p.lanes;
  const int lane = p.along_depth ? thread % p.lanes : thread / width, place = p.along_depth ? thread / p.lanes : thread % width;
  const int target = static_cast<int>(blockIdx.x) * width + place;
  const int row = p.cols.quotient(target), col = target - row * p.cols.divisor();
  Accumulate<T> sum = 0;
  if (row < p.rows) {
    const T* of_row = left + row * p.left_row;
    const T* of_col = right + col * p.right_col;
#pragma unroll 8
    for (int d = lane; d < p.depth; d += p.lanes) sum = fma(widen(of_row[d * p.left_depth]), widen(of_col[d * p.right_depth]), sum);
  }
  sums[lane * width + place] = sum;
  __syncthreads();
  if (lane > 0 || row >= p.rows) return;
#pragma unroll 8
  for (int other = 1; other < p.lanes; ++other) sum += sums[other * width + place];
  result[target] = narrow<T>(bias == nullptr ? sum : sum + widen(bias[col]));
}

// Weights up to which this is faster than tensor cores, whatever the batch.
constexpr int64_t kMostWeights = int64_t{1} << 15;

bool accepts(const Conv2dShape& s) {
  return s.groups == 1 && all_below(2, {s.in_h, s.in_w, s.kernel_h, s.kernel_w, s.out_h, s.out_w}) && s.pad_top == 0 && s.pad_left == 0 &&
         product({s.in_channels, s.out_channels}) <= kMostWeights &&
         all_below(kMaxExtent, {product({s.batch, s.in_channels}), product({s.batch, s.out_channels})});
}

Plan plan_of(int64_t rows, int64_t cols, int64_t depth) {
  const int64_t of_block = kBlockThreads / lanes_of(depth);
  return {of_block, 1, ceil_div<int64_t>(rows * cols, of_block), 0};
}

Plan plan_forward(const Conv2dShape& s) { return plan_of(s.batch, s.out_channels, s.in_channels); }
Plan plan_backward_input(const Conv2dShape& s) { return plan_of(s.batch, s.in_channels, s.out_channels); }
Plan plan_backward_weight(const Conv2dShape& s) { return plan_of(s.out_channels, s.in_channels, s.batch); }

void run_problem(DType dtype, const Plan& plan, const DotProblem& p, const void* left, const void* right, const void* bias, void* result,
                 cudaStream_t stream) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch(dot_products<T>, plan.blocks, stream, p, static_cast<const T*>(left), static_cast<const T*>(right), static_cast<const T*>(bias),
           static_cast<T*>(result));
  });
}

void run_forward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  const int inputs = static_cast<int>(s.in_channels);
  const DotProblem p{
      static_cast<int>(s.batch), inputs, lanes_of(inputs), FastDivisor(static_cast<int>(s.out_channels)), inputs, 1, inputs, 1, true};
  run_problem(s.dtype, plan_forward(s), p, b.input, b.weight, b.bias, b.output, stream);
}

void run_backward_input(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  const int inputs = static_cast<int>(s.in_channels), outputs = static_cast<int>(s.out_channels);
  const DotProblem p{static_cast<int>(s.batch), outputs, lanes_of(outputs), FastDivisor(inputs), outputs, 1, 1, inputs, false};
  run_problem(s.dtype, plan_backward_input(s), p, b.grad_output, b.weight, b.bias, b.grad_input, stream);
}

void run_backward_weight(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  const int inputs = static_cast<int>(s.in_channels), outputs = static_cast<int>(s.out_channels), batch = static_cast<int>(s.batch);
  const DotProblem p{outputs, batch, lanes_of(batch), FastDivisor(inputs), 1, outputs, 1, inputs, false};
  run_problem(s.dtype, plan_backward_weight(s), p, b.grad_output, b.input, nullptr, b.grad_weight, stream);
}

}  // namespace

extern const Conv2dKernel conv2d_forward_dot_sm80 = {
    "conv2d_forward_dot_sm80", 80, Conv2dDirection::forward, accepts, plan_forward, run_forward};
extern const Conv2dKernel conv2d_backward_input_dot_sm80 = {"conv2d_backward_input_dot_sm80",
                                                            80,
                                                            Conv2dDirection::backward_input,
                                                            accepts,
                                                            plan_backward_input,
                                                            run_backward_input,
                                                            /*needs_proof=*/false,
                                                            /*adds_bias=*/true};
extern const Conv2dKernel conv2d_backward_weight_dot_sm80 = {
    "conv2d_backward_weight_dot_sm80", 80, Conv2dDirection::backward_weight, accepts, plan_backward_weight, run_backward_weight};

}  // namespace cnn_ext::cuda
