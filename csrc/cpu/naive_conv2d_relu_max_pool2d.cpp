// The definition of max pooling of relu(convolution + bias) and of its gradients, as loop nests: slow, for any shape, and the truth that
// every other row is tested against. Each pooled output computes the convolution under its window anew. Sums are kept in double, also for
// float32; the maximum is taken of values rounded to the type that the dtype is computed in, and rounded to a half in the end.
//
// Letters: n image, k output channel, ph and pw pooled output, oh and ow output of the convolution.
#include <vector>

#include "cpu/kernel.h"
#include "cpu/naive.h"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::naive {

extern const Conv2dKernel conv2d_backward_input, conv2d_backward_weight, conv2d_backward_bias;

namespace {

Strides pooled_strides(const Conv2dReluPoolShape& s) { return strides_of(s.conv.layout, s.conv.out_channels, s.pooled_h, s.pooled_w); }

template <class T>
void forward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, int threads) {
  const Conv2dShape& conv = s.conv;
  const Geometry geo(conv);
  const Strides pooled = pooled_strides(s);
  const T* input = static_cast<const T*>(b.input);
  const T* weight = static_cast<const T*>(b.weight);
  const T* bias = static_cast<const T*>(b.bias);
  T* output = static_cast<T*>(b.output);
  parallel_for(threads, conv.batch * conv.out_channels, [&](int, int64_t task) {
    const int64_t n = task / conv.out_channels, k = task % conv.out_channels;
    for (int64_t ph = 0; ph < s.pooled_h; ++ph) {
      for (int64_t pw = 0; pw < s.pooled_w; ++pw) {
        Compute<T> best = 0;
        uint8_t offset = kNoGradient;
        for (int64_t tap = 0; tap < s.pool_h * s.pool_w; ++tap) {
          const int64_t oh = ph * s.pool_stride_h + tap / s.pool_w, ow = pw * s.pool_stride_w + tap % s.pool_w;
          const Compute<T> value = output_at(conv, geo, input, weight, bias, n, k, oh, ow);
          if (value > best || value != value) {  // the first of equals, the last NaN, and nothing that is not above zero
            best = value;
            offset = static_cast<uint8_t>(tap);
          }
        }
        output[at(pooled, n, k, ph, pw)] = static_cast<T>(best);
        if (b.offsets != nullptr) b.offsets[at(pooled, n, k, ph, pw)] = offset;
      }
    }
  });
}

// The gradient of the convolution's output: each pooled output adds its own to the element that its offset names (or to the one that it
// is, without pooling), the others are zero.
template <class T>
std::vector<Compute<T>> conv_gradient(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b) {
  const Conv2dShape& conv = s.conv;
  const Strides pooled = pooled_strides(s), whole = Geometry(conv).out;
  const T* grad_output = static_cast<const T*>(b.grad_output);
  const T* output = static_cast<const T*>(b.output);
  std::vector<Compute<T>> gradient(static_cast<size_t>(conv.batch * conv.out_channels * conv.out_h * conv.out_w));
  for (int64_t plane = 0; plane < conv.batch * conv.out_channels; ++plane) {
    const int64_t n = plane / conv.out_channels, k = plane % conv.out_channels;
    for (int64_t ph = 0; ph < s.pooled_h; ++ph) {
      for (int64_t pw = 0; pw < s.pooled_w; ++pw) {
        const int64_t i = at(pooled, n, k, ph, pw);
        const uint8_t offset = has_pooling(s) ? b.offsets[i] : (output[i] <= 0 ? kNoGradient : uint8_t{0});
        if (offset == kNoGradient) continue;
        const int64_t oh = ph * s.pool_stride_h + offset / s.pool_w, ow = pw * s.pool_stride_w + offset % s.pool_w;
        gradient[static_cast<size_t>(at(whole, n, k, oh, ow))] += grad_output[i];
      }
    }
  }
  return gradient;
}

template <class T>
std::vector<Compute<T>> widened(const void* data, int64_t count) {
  const T* first = static_cast<const T*>(data);
  return first == nullptr ? std::vector<Compute<T>>() : std::vector<Compute<T>>(first, first + count);
}

// The convolution's own definition does the rest, in the type that T is computed in.
template <class T>
void backward(const Conv2dKernel& definition, const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, int threads) {
  Conv2dShape conv = s.conv;
  if (is_half(conv.dtype)) conv.dtype = DType::float32;
  const int64_t inputs = conv.batch * conv.in_channels * conv.in_h * conv.in_w;
  const int64_t weights = conv.out_channels * (conv.in_channels / conv.groups) * conv.kernel_h * conv.kernel_w;
  const std::vector<Compute<T>> input = widened<T>(b.input, inputs), weight = widened<T>(b.weight, weights);
  const std::vector<Compute<T>> gradient = conv_gradient<T>(s, b);
  const int64_t counts[] = {0, inputs, weights, conv.out_channels};
  void* const results[] = {nullptr, b.grad_input, b.grad_weight, b.grad_bias};
  const int direction = static_cast<int>(definition.direction);
  std::vector<Compute<T>> result(static_cast<size_t>(counts[direction]));
  definition.run(conv, {input.data(), weight.data(), nullptr, gradient.data(), nullptr, result.data(), result.data(), result.data()},
                 nullptr, threads);
  for (size_t i = 0; i < result.size(); ++i) static_cast<T*>(results[direction])[i] = static_cast<T>(result[i]);
}

bool accepts(const Conv2dReluPoolShape& s) { return s.pool_h * s.pool_w <= kNoGradient; }

Plan plan(const Conv2dReluPoolShape& s, int) { return {1, 1, s.conv.batch * s.conv.out_channels, 0}; }

Outcome run_forward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void*, int threads) {
  with_scalar(s.conv.dtype, [&](auto scalar) { forward<decltype(scalar)>(s, b, threads); });
  return Outcome::done;
}

template <const Conv2dKernel& definition>
Outcome run_backward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void*, int threads) {
  with_scalar(s.conv.dtype, [&](auto scalar) { backward<decltype(scalar)>(definition, s, b, threads); });
  return Outcome::done;
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward = {
    "conv2d_relu_max_pool2d_forward_naive_baseline", Isa::baseline, Conv2dDirection::forward, accepts, plan, run_forward};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input = {"conv2d_relu_max_pool2d_backward_input_naive_baseline",
                                                                           Isa::baseline,
                                                                           Conv2dDirection::backward_input,
                                                                           accepts,
                                                                           plan,
                                                                           run_backward<conv2d_backward_input>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_weight = {"conv2d_relu_max_pool2d_backward_weight_naive_baseline",
                                                                            Isa::baseline,
                                                                            Conv2dDirection::backward_weight,
                                                                            accepts,
                                                                            plan,
                                                                            run_backward<conv2d_backward_weight>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_bias = {"conv2d_relu_max_pool2d_backward_bias_naive_baseline",
                                                                          Isa::baseline,
                                                                          Conv2dDirection::backward_bias,
                                                                          accepts,
                                                                          plan,
                                                                          run_backward<conv2d_backward_bias>};

}  // namespace cnn_ext::cpu::naive
