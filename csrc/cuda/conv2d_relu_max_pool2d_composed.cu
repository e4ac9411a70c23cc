// Max pooling of relu(convolution + bias) made of the rows of its parts, by way of the convolution's output or its gradient in the
// workspace: it serves every shape that no fused kernel does.
//
// forward applies the ReLU to the maxima: it is monotonic. Without pooling it is a pass over the output, in place: rows that have it in
// their stores come before this one.
// backward scatters through the pooling by the offsets; where the ReLU stops a gradient the offset names no tap, and nothing is scattered.
// Without pooling the gradient is masked by the output. Then it goes on as the convolution.
#include "core/fused_pool.h"
#include "cuda/api.h"
#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {
namespace {

// values = relu(values). A NaN stays. A thread takes a chunk.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) apply_relu(T* values, int64_t count, bool is_whole) {
  const int64_t first = element_index() * kChunk<T>;
  if (first >= count) return;
  const int taken = count - first < kChunk<T> ? static_cast<int>(count - first) : kChunk<T>;
  Vector<T, kChunk<T>> value = load_some<kChunk<T>>(values + first, taken, is_whole);
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) value.element[i] = widen(value.element[i]) <= 0 ? narrow<T>(0) : value.element[i];
  store_some(values + first, value, taken, is_whole);
}

// The gradient where the output says that the ReLU passed it, else zero.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    stop_gradient(const T* __restrict__ gradient, const T* __restrict__ output, T* __restrict__ passed, int64_t count, bool is_whole) {
  const int64_t first = element_index() * kChunk<T>;
  if (first >= count) return;
  const int taken = count - first < kChunk<T> ? static_cast<int>(count - first) : kChunk<T>;
  Vector<T, kChunk<T>> value = load_some<kChunk<T>>(gradient + first, taken, is_whole);
  const Vector<T, kChunk<T>> mask = load_some<kChunk<T>>(output + first, taken, is_whole);
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) value.element[i] = widen(mask.element[i]) <= 0 ? narrow<T>(0) : value.element[i];
  store_some(passed + first, value, taken, is_whole);
}

template <class T>
void launch_relu(const Conv2dReluPoolBuffers& b, int64_t count, cudaStream_t stream) {
  launch_elementwise(apply_relu<T>, ceil_div<int64_t>(count, kChunk<T>), stream, static_cast<T*>(b.output), count, is_aligned(b.output));
}

template <class T>
void launch_stop_gradient(const Conv2dReluPoolBuffers& b, void* passed, int64_t count, cudaStream_t stream) {
  launch_elementwise(stop_gradient<T>, ceil_div<int64_t>(count, kChunk<T>), stream, static_cast<const T*>(b.grad_output),
                     static_cast<const T*>(b.output), static_cast<T*>(passed), count, is_aligned(b.grad_output) && is_aligned(b.output));
}

int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The tensor in between comes first in the workspace, then what the convolution's row wants, each aligned to 256 bytes.
size_t between_bytes(const Conv2dReluPoolShape& s) {
  return static_cast<size_t>(ceil_div<int64_t>(conv_elements(s) * bytes_of(s.conv.dtype), 256) * 256);
}
void* behind(void* workspace, size_t bytes) { return static_cast<unsigned char*>(workspace) + bytes; }

// The convolution's plan: of the row that this device chooses.
template <Conv2dDirection direction>
Plan plan(const Conv2dReluPoolShape& s) {
  Plan plan = choose_conv2d(direction, s.conv).plan;
  if (direction != Conv2dDirection::forward || has_pooling(s)) plan.workspace_bytes += between_bytes(s);
  return plan;
}

void run_forward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, cudaStream_t stream) {
  Conv2dBuffers conv{};
  conv.input = b.input, conv.weight = b.weight, conv.bias = b.bias;
  conv.output = has_pooling(s) ? workspace : b.output;
  const auto allocate = [&](size_t) { return has_pooling(s) ? behind(workspace, between_bytes(s)) : workspace; };
  run_conv2d(Conv2dDirection::forward, s.conv, conv, allocate, stream);
  if (has_pooling(s)) {
    Pool2dBuffers pool{};
    pool.input = conv.output, pool.output = b.output, pool.offsets = b.offsets, pool.relu = true;
    run_pool2d(Pool2dOp::max, Pool2dDirection::forward, pool_shape(s), pool, stream);
  } else {
    with_element_type(s.conv.dtype, [&](auto element) { launch_relu<decltype(element)>(b, pooled_elements(s), stream); });
  }
}

template <Conv2dDirection direction>
void run_backward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, cudaStream_t stream) {
  if (has_pooling(s)) {
    Pool2dBuffers pool{};
    pool.grad_output = b.grad_output, pool.offsets = b.offsets, pool.grad_input = workspace;
    run_pool2d(Pool2dOp::max, Pool2dDirection::backward, pool_shape(s), pool, stream);
  } else {
    with_element_type(s.conv.dtype,
                      [&](auto element) { launch_stop_gradient<decltype(element)>(b, workspace, pooled_elements(s), stream); });
  }
  Conv2dBuffers conv{};
  conv.grad_output = workspace, conv.input = b.input, conv.weight = b.weight;
  conv.grad_input = b.grad_input, conv.grad_weight = b.grad_weight;
  run_conv2d(direction, s.conv, conv, [&](size_t) { return behind(workspace, between_bytes(s)); }, stream);
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_composed_sm80 = {"conv2d_relu_max_pool2d_forward_composed_sm80",
                                                                                  80,
                                                                                  Conv2dDirection::forward,
                                                                                  has_offset_taps,
                                                                                  plan<Conv2dDirection::forward>,
                                                                                  run_forward};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_composed_sm80 = {
    "conv2d_relu_max_pool2d_backward_input_composed_sm80",
    80,
    Conv2dDirection::backward_input,
    has_offset_taps,
    plan<Conv2dDirection::backward_input>,
    run_backward<Conv2dDirection::backward_input>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_weight_composed_sm80 = {
    "conv2d_relu_max_pool2d_backward_weight_composed_sm80",
    80,
    Conv2dDirection::backward_weight,
    has_offset_taps,
    plan<Conv2dDirection::backward_weight>,
    run_backward<Conv2dDirection::backward_weight>};

}  // namespace cnn_ext::cuda
