// Max pooling of relu(convolution + bias) made of the rows of its parts, by way of the convolution's output or its gradient in scratch: it
// serves every shape that no fused kernel does, at the speed of the unfused operators.
//
// The ReLU comes after the pooling, where there are fewer elements: it is monotonic, so that the maximum and its place are the same.
// Backward drops the gradients that the ReLU stops, scatters the others by the pooling's backward, and goes on as the convolution.
#include "core/fused_pool.h"
#include "cpu/api.h"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::composed {
namespace {

// Elements of one task of the passes over a tensor.
constexpr int64_t kChunk = 16384;

size_t bytes_of(int64_t elements, DType dtype) {
  const size_t bytes = static_cast<size_t>(elements) * (dtype == DType::float64 ? sizeof(double) : sizeof(float));
  return (bytes + 63) / 64 * 64;
}

// body(begin, end) over the elements [0, count).
template <class Body>
void for_each_chunk(int threads, int64_t count, const Body& body) {
  parallel_for(threads, (count + kChunk - 1) / kChunk, [&](int, int64_t chunk) {
    const int64_t begin = chunk * kChunk;
    body(begin, count - begin < kChunk ? count : begin + kChunk);
  });
}

// The loops below read what they may not need: a select between values at hand becomes vector code, a branch would be mispredicted.

// values = relu(values), and kNoGradient for the offsets of what is not above zero; offsets may be null. A NaN stays.
template <class T>
void apply_relu(T* values, uint8_t* offsets, int64_t count, int threads) {
  for_each_chunk(threads, count, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; offsets != nullptr && i < end; ++i) offsets[i] |= static_cast<uint8_t>(-(values[i] <= 0));  // all bits, or none
    for (int64_t i = begin; i < end; ++i) values[i] = values[i] <= 0 ? T{0} : values[i];
  });
}

// The gradient where the ReLU passed, else zero; and offsets that name a tap everywhere, as the pooling wants them.
template <class T>
void stop_gradient(const T* gradient, const uint8_t* offsets, T* __restrict passed, uint8_t* __restrict taps, int64_t count, int threads) {
  for_each_chunk(threads, count, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T value = gradient[i];
      passed[i] = offsets[i] == kNoGradient ? T{0} : value;
    }
    for (int64_t i = begin; i < end; ++i) taps[i] = offsets[i] == kNoGradient ? uint8_t{0} : offsets[i];
  });
}

// The gradient where the ReLU passed, else zero, without pooling.
template <class T>
void stop_gradient(const T* gradient, const T* output, T* __restrict passed, int64_t count, int threads) {
  for_each_chunk(threads, count, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T value = gradient[i];
      passed[i] = output[i] <= 0 ? T{0} : value;
    }
  });
}

template <class T>
Outcome forward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  Conv2dBuffers conv{};
  conv.input = b.input, conv.weight = b.weight, conv.bias = b.bias;
  conv.output = has_pooling(s) ? workspace : b.output;
  run_conv2d(Conv2dDirection::forward, s.conv, conv, threads);
  if (has_pooling(s)) {
    Pool2dBuffers pool{};
    pool.input = conv.output, pool.output = b.output, pool.offsets = b.offsets;
    run_pool2d(Pool2dOp::max, Pool2dDirection::forward, pool_shape(s), pool, threads);
  }
  apply_relu(static_cast<T*>(b.output), b.offsets, pooled_elements(s), threads);
  return Outcome::done;
}

// The gradient of the convolution's output, in the first bytes of the workspace; behind it is room for what the pooling reads.
template <class T>
const T* conv_gradient(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  const T* grad_output = static_cast<const T*>(b.grad_output);
  T* gradient = static_cast<T*>(workspace);
  const int64_t pooled = pooled_elements(s);
  if (!has_pooling(s)) {
    stop_gradient(grad_output, static_cast<const T*>(b.output), gradient, pooled, threads);
    return gradient;
  }
  char* behind = static_cast<char*>(workspace) + bytes_of(conv_elements(s), s.conv.dtype);
  T* passed = reinterpret_cast<T*>(behind);
  uint8_t* taps = reinterpret_cast<uint8_t*>(behind + bytes_of(pooled, s.conv.dtype));
  stop_gradient(grad_output, b.offsets, passed, taps, pooled, threads);
  Pool2dBuffers pool{};
  pool.grad_output = passed, pool.offsets = taps, pool.grad_input = gradient;
  run_pool2d(Pool2dOp::max, Pool2dDirection::backward, pool_shape(s), pool, threads);
  return gradient;
}

template <class T, Conv2dDirection direction>
Outcome backward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  Conv2dBuffers conv{};
  conv.grad_output = conv_gradient<T>(s, b, workspace, threads);
  conv.input = b.input, conv.weight = b.weight;
  conv.grad_input = b.grad_input, conv.grad_weight = b.grad_weight, conv.grad_bias = b.grad_bias;
  run_conv2d(direction, s.conv, conv, threads);
  return Outcome::done;
}

bool accepts(const Conv2dReluPoolShape& s) {
  const bool is_served = s.conv.dtype == DType::float32 || s.conv.dtype == DType::float64;
  return is_served && s.pool_h * s.pool_w <= kNoGradient;
}

// The convolution's plan, with the scratch of this file; the rows that are called take theirs on top.
template <Conv2dDirection direction>
Plan plan(const Conv2dReluPoolShape& s, int threads) {
  const DType dtype = s.conv.dtype;
  Plan plan = choose_conv2d(direction, s.conv, threads).plan;
  plan.workspace_bytes = bytes_of(conv_elements(s), dtype);
  if (has_pooling(s) && direction != Conv2dDirection::forward) {
    plan.workspace_bytes += bytes_of(pooled_elements(s), dtype) + static_cast<size_t>(pooled_elements(s));
  }
  if (!has_pooling(s) && direction == Conv2dDirection::forward) plan.workspace_bytes = 0;
  return plan;
}

template <Conv2dDirection direction>
Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  const bool is_float = s.conv.dtype == DType::float32;
  if constexpr (direction == Conv2dDirection::forward) {
    return (is_float ? forward<float> : forward<double>)(s, b, workspace, threads);
  } else {
    return (is_float ? backward<float, direction> : backward<double, direction>)(s, b, workspace, threads);
  }
}

}  // namespace

#define CNN_EXT_COMPOSED_ROW(direction)                                                                                              \
  extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_##direction = {"conv2d_relu_max_pool2d_" #direction "_composed_baseline", \
                                                                          Isa::baseline,                                             \
                                                                          Conv2dDirection::direction,                                \
                                                                          accepts,                                                   \
                                                                          plan<Conv2dDirection::direction>,                          \
                                                                          run<Conv2dDirection::direction>};
CNN_EXT_COMPOSED_ROW(forward)
CNN_EXT_COMPOSED_ROW(backward_input)
CNN_EXT_COMPOSED_ROW(backward_weight)
CNN_EXT_COMPOSED_ROW(backward_bias)

}  // namespace cnn_ext::cpu::composed
