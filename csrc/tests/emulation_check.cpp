// emulation_check: the emulation of CUDA's execution model itself. A small product on tensor cores, staged through shared memory by
// asynchronous copies, and the other primitives one by one, must come out right in every order of the threads.
//
//   emulation_check [FAULT]
//
// With a fault planted it must not: the exit status is 1, or that of a touch outside the buffers, 3. Two of the faults are found in a build
// with AddressSanitizer and UndefinedBehaviorSanitizer only: a read outside static shared memory and a vector read that is not aligned.
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/common.cuh"
#include "cuda/primitives.cuh"
#include "tests/guarded.h"

namespace {

using namespace cnn_ext;
using namespace cnn_ext::cuda;
using namespace cnn_ext::tests;
using emulation::Order;

enum class Fault {
  none,
  out_of_bounds_read,
  out_of_bounds_shared_read,
  missing_barrier_before_reading,
  missing_barrier_before_writing,
  early_read,
  wrong_fragment,
  divergent_barrier,
  misaligned_copy,
  unfinished_copy,
  out_of_bounds_static_read,
  misaligned_read
};
constexpr const char* kFaults[] = {"none",
                                   "out_of_bounds_read",
                                   "out_of_bounds_shared_read",
                                   "missing_barrier_before_reading",
                                   "missing_barrier_before_writing",
                                   "early_read",
                                   "wrong_fragment",
                                   "divergent_barrier",
                                   "misaligned_copy",
                                   "unfinished_copy",
                                   "out_of_bounds_static_read",
                                   "misaligned_read"};

// C [32, 8] = A [32, 64] * B^T [8, 64] for 16-bit elements: two warps with 16 rows each, two stages of 16 columns in shared memory.
constexpr int kRows = 32, kCols = 8, kDepth = 64, kStep = 16, kChunk = 8;  // a chunk: 8 elements, 16 bytes
constexpr int kStageElements = (kRows + kCols) * kStep;

template <class T>
__device__ void copy_stage(Fault fault, T* stage, const T* a, const T* b, int step) {
  const int thread = static_cast<int>(threadIdx.x), row = thread / 2, col = thread % 2 * kChunk;
  const int from = fault == Fault::out_of_bounds_read ? row + 1 : row, to = col + (fault == Fault::misaligned_copy ? 1 : 0);
  cp_async_16(stage + row * kStep + to, a + from * kDepth + step * kStep + col, true);
  if (row < kCols) cp_async<16>(stage + (kRows + row) * kStep + col, b + row * kDepth + step * kStep + col, true);
}

__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) { mma_m16n8k16_f16(d, a, b); }
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) { mma_m16n8k16_bf16(d, a, b); }

template <class T>
__global__ void product(Fault fault, const T* a, const T* b, float* c) {
  T* const shared = dynamic_shared<T>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int past = fault == Fault::out_of_bounds_shared_read ? 1 : 0;
  float sums[4] = {};
  copy_stage(fault, shared, a, b, 0);
  cp_async_commit();
  for (int step = 0; step < kDepth / kStep; ++step) {
    const T* stage = shared + step % 2 * kStageElements;
    if (step + 1 < kDepth / kStep) copy_stage(fault, shared + (step + 1) % 2 * kStageElements, a, b, step + 1);
    cp_async_commit();
    fault == Fault::early_read ? cp_async_wait<2>() : cp_async_wait<1>();
    if (fault != Fault::missing_barrier_before_reading && !(fault == Fault::divergent_barrier && warp == 1)) __syncthreads();
    uint32_t of_a[4], of_b[4];
    ldmatrix_x4(of_a, stage + (16 * warp + lane % 16) * kStep + lane / 16 * kChunk);
    ldmatrix_x4(of_b, stage + (kRows + past + lane % 8) * kStep + lane / 8 % 2 * kChunk);
    const int swapped = fault == Fault::wrong_fragment ? 1 : 0;
    multiply(sums, of_a, {of_b[swapped], of_b[1 - swapped]}, T{});
    if (fault != Fault::missing_barrier_before_writing) __syncthreads();
  }
  cp_async_wait<0>();
  if (fault == Fault::unfinished_copy) copy_stage(fault, shared, a, b, 0);
  for (int i = 0; i < 4; ++i) c[(16 * warp + lane / 4 + i / 2 * 8) * kCols + lane % 4 * 2 + i % 2] = sums[i];
}

// Quarters between -2 and 2: exact in every type, also their sums of products.
double quarter(uint64_t seed, int64_t i) { return static_cast<double>(random_bits(seed, i) % 17) / 4 - 2; }

template <class T>
T* quarters(Tensors& tensors, int64_t count, uint64_t seed) {
  T* data = static_cast<T*>(tensors.bytes(count * static_cast<int64_t>(sizeof(T))));
  for (int64_t i = 0; i < count; ++i) data[i] = narrow<T>(static_cast<Accumulate<T>>(quarter(seed, i)));
  return data;
}

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string(what) + " is wrong");
}

// A [rows, depth] * B^T [cols, depth] of such quarters.
template <class Sum>
void expect_product(const Sum* c, int rows, int cols, int depth) {
  for (int row = 0; row < rows; ++row) {
    for (int col = 0; col < cols; ++col) {
      double sum = 0;
      for (int k = 0; k < depth; ++k) sum += quarter(1, row * depth + k) * quarter(2, col * depth + k);
      expect(c[row * cols + col] == sum, "the product");
    }
  }
}

template <class T>
void check_product(Fault fault) {
  Tensors tensors(Flush::end);
  const T* a = quarters<T>(tensors, kRows * kDepth, 1);
  const T* b = quarters<T>(tensors, kCols * kDepth, 2);
  float* c = static_cast<float*>(tensors.bytes(kRows * kCols * sizeof(float)));
  launch(product<T>, Grid(1, 64, 2 * kStageElements * sizeof(T)), nullptr, fault, a, b, c);
  expect_product(c, kRows, kCols, kDepth);
}

// C [16, 8] = A [16, 8] * B^T [8, 8] in TF32 by one warp.
__global__ void tf32_product(const float* a, const float* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, pair = lane % 4;
  uint32_t of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) of_a[i] = to_tf32(a[(group + i % 2 * 8) * 8 + pair + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) of_b[i] = to_tf32(b[group * 8 + pair + i * 4]);
  float sums[4] = {};
  mma_m16n8k8_tf32(sums, of_a, of_b);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + pair * 2 + i % 2] = sums[i];
}

void check_tf32() {
  Tensors tensors(Flush::end);
  const float* a = quarters<float>(tensors, 16 * 8, 1);
  const float* b = quarters<float>(tensors, 8 * 8, 2);
  float* c = static_cast<float*>(tensors.bytes(16 * 8 * sizeof(float)));
  launch(tf32_product, Grid(1, 32), nullptr, a, b, c);
  expect_product(c, 16, 8, 8);
  const float ulp = std::ldexp(1.0f, -10), quarter_ulp = ulp / 4;
  const auto rounded = [](float x) { return __uint_as_float(to_tf32(x)); };
  expect(rounded(1 + quarter_ulp) == 1 && rounded(1 + 2 * quarter_ulp) == 1 + ulp && rounded(-1 - 2 * quarter_ulp) == -1 - ulp, "TF32");
  expect(std::isnan(rounded(NAN)) && rounded(INFINITY) == INFINITY, "TF32 of what is not finite");
}

// C [8, 8] = A [8, 4] * B^T [8, 4] in float64 by one warp.
__global__ void f64_product(const double* a, const double* b, double* c) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, pair = lane % 4;
  double sums[2] = {};
  mma_m8n8k4_f64(sums[0], sums[1], a[group * 4 + pair], b[group * 4 + pair]);
  for (int i = 0; i < 2; ++i) c[group * 8 + pair * 2 + i] = sums[i];
}

void check_f64() {
  Tensors tensors(Flush::end);
  const double* a = quarters<double>(tensors, 8 * 4, 1);
  const double* b = quarters<double>(tensors, 8 * 4, 2);
  double* c = static_cast<double*>(tensors.bytes(8 * 8 * sizeof(double)));
  launch(f64_product, Grid(1, 32), nullptr, a, b, c);
  expect_product(c, 8, 8, 4);
}

// Matrix i holds 64 i + 8 row + col; the registers must name the right pair of elements.
__global__ void load_matrices() {
  uint16_t* shared = dynamic_shared<uint16_t>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) shared[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t plain[4], transposed[4];
  ldmatrix_x4(plain, shared + lane * 8);
  ldmatrix_x4_trans(transposed, shared + lane * 8);
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = static_cast<uint32_t>(64 * i + lane / 4 * 8 + lane % 4 * 2),
                   col = static_cast<uint32_t>(64 * i + lane % 4 * 16 + lane / 4);
    expect(plain[i] == (row | (row + 1) << 16), "ldmatrix");
    expect(transposed[i] == (col | (col + 8) << 16), "the transposed ldmatrix");
  }
}

__global__ void meet() {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  expect(__syncthreads_or(thread == 77) && !__syncthreads_or(0), "__syncthreads_or");
  expect(!__syncthreads_and(thread != 77) && __syncthreads_and(1), "__syncthreads_and");
  expect(__syncthreads_count(thread % 3 == 0) == 32, "__syncthreads_count");
  expect(__shfl_sync(0xFFFFFFFF, thread, 5) == thread - lane + 5, "__shfl_sync");
  expect(__shfl_xor_sync(0xFFFFFFFF, thread, 16) == (thread ^ 16), "__shfl_xor_sync");
  expect(__shfl_down_sync(0xFFFFFFFF, lane, 3) == (lane < 29 ? lane + 3 : lane), "__shfl_down_sync");
  expect(__shfl_up_sync(0xFFFFFFFF, lane, 3, 8) == (lane % 8 < 3 ? lane : lane - 3), "__shfl_up_sync");
  expect(__ballot_sync(0xFFFFFFFF, lane % 4 == 1) == 0x22222222, "__ballot_sync");
  expect(__any_sync(0xFFFFFFFF, lane == 31) && !__all_sync(0xFFFFFFFF, lane == 31), "the vote of a warp");
}

// The second warp takes what the first one has written, through a barrier of the two, while the third has nothing to do with them.
__global__ void meet_by_name(Fault fault) {
  __shared__ int numbers[32];
  const int thread = static_cast<int>(threadIdx.x), read = 63 - thread + (fault == Fault::out_of_bounds_static_read ? 1 : 0);
  if (thread < 32) numbers[thread] = 7 * thread;
  if (thread < 64) named_barrier(1, 64);
  if (thread >= 32 && thread < 64) expect(numbers[read] == 7 * read, "what lies behind a named barrier");
}

// Of three groups the wait leaves the last one out; what does not exist is zero.
__global__ void copy_groups(const int* numbers) {
  int* shared = dynamic_shared<int>();
  for (int group = 0; group < 3; ++group) {
    cp_async<4>(shared + group, numbers + group, group != 1);
    cp_async_commit();
  }
  cp_async_wait<1>();
  expect(shared[0] == numbers[0] && shared[1] == 0 && shared[2] == -1, "a group of copies");
  cp_async_wait<0>();
  expect(shared[2] == numbers[2], "the last group of copies");
}

__global__ void read_vectors(Fault fault, const float* numbers) {
  const float4 four = *reinterpret_cast<const float4*>(numbers + (fault == Fault::misaligned_read ? 1 : 0));
  expect(four.x + four.y + four.z + four.w != 0, "a vector");
}

void check_vectors(Fault fault) {
  alignas(16) const float numbers[] = {1, 2, 3, 4, 5};
  launch(read_vectors, Grid(1, 1), nullptr, fault, numbers);
}

void check_halves() {
  const float largest = 65504, least = std::ldexp(1.0f, -24);
  const auto half = [](float x) { return __half2float(__float2half_rn(x)); };
  const auto bfloat = [](float x) { return __bfloat162float(__float2bfloat16_rn(x)); };
  expect(half(largest) == largest && half(65520) == INFINITY && half(1 + std::ldexp(1.0f, -11)) == 1, "float16");
  expect(half(least) == least && half(least / 2) == 0 && half(1.5f * least) == 2 * least, "a small float16");
  expect(bfloat(1 + std::ldexp(1.0f, -8)) == 1 && bfloat(1 + 3 * std::ldexp(1.0f, -8)) == 1 + std::ldexp(1.0f, -6), "bfloat16");
  expect(std::isnan(half(NAN)) && std::isnan(bfloat(NAN)) && bfloat(INFINITY) == INFINITY, "a half that is not finite");
}

void check_all(Fault fault) {
  check_product<__half>(fault);
  check_product<__nv_bfloat16>(fault);
  check_tf32();
  check_f64();
  check_halves();
  check_vectors(fault);
  launch(load_matrices, Grid(1, 32, 256 * sizeof(uint16_t)), nullptr);
  launch(meet, Grid(2, 96), nullptr);
  launch(meet_by_name, Grid(2, 96), nullptr, fault);
  const int numbers[] = {11, 12, 13};
  launch(copy_groups, Grid(1, 1, 16), nullptr, numbers);
}

void report_fault(int) {
  static const char text[] = "touches memory outside its buffers\n";
  static_cast<void>(!write(STDOUT_FILENO, text, sizeof(text) - 1));
  _exit(3);
}

Fault fault_named(const char* name) {
  for (size_t i = 0; i < std::size(kFaults); ++i) {
    if (std::strcmp(name, kFaults[i]) == 0) return static_cast<Fault>(i);
  }
  throw std::invalid_argument(std::string("no fault is called ") + name);
}

}  // namespace

int main(int argc, char** argv) try {
  const Fault fault = argc > 1 ? fault_named(argv[1]) : Fault::none;
  std::signal(SIGSEGV, report_fault);
  std::signal(SIGBUS, report_fault);
  bool sound = true;
  for (const auto& [order, name] : {std::pair{Order::forward, "forward"}, {Order::reverse, "reverse"}, {Order::shuffled, "shuffled"}}) {
    emulation::set_order(order);
    try {
      check_all(fault);
    } catch (const std::runtime_error& error) {
      sound = false;
      std::printf("in %s order: %s\n", name, error.what());
    }
  }
  return sound ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "emulation_check: %s\n", error.what());
  return 2;
}
