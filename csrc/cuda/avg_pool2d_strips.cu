// Average pooling at memory bandwidth (pooling_forward.cuh, pooling_backward.cuh): the taps of a row of a window are added up in order,
// then the rows in order; a sum is
// multiplied by the reciprocal of the divisor.
//
// Not handled: dilation.
#include "cuda/pooling_backward.cuh"
#include "cuda/pooling_divisor.cuh"
#include "cuda/pooling_forward.cuh"

namespace cnn_ext::cuda {
namespace {

template <class Acc>
struct Sum {
  static constexpr bool kRepeats = false;
  Sum() = default;
  __device__ explicit Sum(int) : value(0) {}
  __device__ Sum(Acc first, int) : value(Acc{0} + first) {}
  __device__ static Acc nothing() { return 0; }
  __device__ void take(Acc other, int) { value += other; }
  Acc value;
  static constexpr int tap = 0;
};

template <class T>
__device__ Accumulate<T> factor_of(const PoolDivisor& divisor, const Pool2dGeometry& g, int first_h, int first_w) {
  return Accumulate<T>{1} / static_cast<Accumulate<T>>(divisor.of(g, first_h, first_w, 1, 1));
}

template <class Element>
struct AvgForward {
  using T = Element;
  using Part = Sum<Accumulate<T>>;

  template <int kCount>
  bool is_whole(int64_t elements) const {
    return has_whole_vectors<kCount>(output, elements);
  }
  template <int kCount>
  __device__ void finish(const Pool2dGeometry& g, int first_h, int first_w, int step_w, Part (&parts)[kCount]) const {
    Accumulate<T> factor = 1;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i == 0 || step_w != 0) factor = factor_of<T>(divisor, g, first_h, first_w + i * step_w);
      parts[i].value *= factor;
    }
  }
  template <int kCount>
  __device__ void write(int index, const Part (&parts)[kCount], int count, bool is_whole) const {
    Vector<T, kCount> values;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values.element[i] = narrow<T>(parts[i].value);
    store_some(output + index, values, count, is_whole);
  }

  PoolDivisor divisor;
  T* output;
};

template <class Element>
struct AvgBackward {
  using T = Element;
  static constexpr bool kHasOffsets = false;

  template <int kCount>
  bool are_outputs_whole(int64_t elements) const {
    return has_whole_vectors<kCount>(grad_output, elements);
  }
  __device__ Accumulate<T> factor(const Pool2dGeometry& g, int first_h, int first_w) const {
    return factor_of<T>(divisor, g, first_h, first_w);
  }

  PoolDivisor divisor;
  const T* grad_output;
  const uint8_t* offsets;  // none
  T* grad_input;
};

void run_forward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    run_pool_forward(AvgForward<T>{PoolDivisor(s), static_cast<T*>(b.output)}, s, static_cast<const T*>(b.input), stream);
  });
}

template <class Op>
void run_backward_of(const Op& op, const Pool2dShape& s, cudaStream_t stream) {
  if (s.layout == Layout::nchw) {
    if (has_windows(s, 2, 2, 0)) return launch_pool_backward_strips<Op, 2, 0>(op, s, stream);
    if (has_windows(s, 3, 2, 0)) return launch_pool_backward_strips<Op, 3, 0>(op, s, stream);
    if (has_windows(s, 3, 2, 1)) return launch_pool_backward_strips<Op, 3, 1>(op, s, stream);
  }
  constexpr int kVector = kChunk<typename Op::T>;
  const bool has_chunks = has_channel_vectors<kVector>(op, s);
  if (s.layout == Layout::nhwc && s.kernel_h <= s.stride_h && s.kernel_w <= s.stride_w) {
    if (has_chunks) return launch_pool_backward_pixels<Op, kVector, 1>(op, s, stream);
    return (has_channel_vectors<2>(op, s) ? launch_pool_backward_pixels<Op, 2, 1> : launch_pool_backward_pixels<Op, 1, 1>)(op, s, stream);
  }
  (has_chunks ? launch_pool_backward_pixels<Op, kVector, 0> : launch_pool_backward_pixels<Op, 1, 0>)(op, s, stream);
}

void run_backward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    run_backward_of(AvgBackward<T>{PoolDivisor(s), static_cast<const T*>(b.grad_output), nullptr, static_cast<T*>(b.grad_input)}, s,
                    stream);
  });
}

}  // namespace

extern const Pool2dKernel avg_pool2d_forward_strips_sm80 = {
    "avg_pool2d_forward_strips_sm80", 80, Pool2dOp::avg, Pool2dDirection::forward, suits_pool_strips, plan_pool_outputs, run_forward};
extern const Pool2dKernel avg_pool2d_backward_strips_sm80 = {
    "avg_pool2d_backward_strips_sm80", 80, Pool2dOp::avg, Pool2dDirection::backward, suits_pool_strips, plan_pool_inputs, run_backward};

}  // namespace cnn_ext::cuda
