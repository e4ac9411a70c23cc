// grad_bias[k] = sum over n, oh, ow of grad_output[n, k, oh, ow]: a reduction over pixels. Through ReLU and pooling too: each window's
// gradient goes to one of its outputs, or to none. wide: the same where an int does not hold an extent.
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"

namespace cnn_ext::cuda {
namespace {

template <class T>
struct BiasTerms {
  using Acc = Accumulate<T>;
  using Target = int64_t;  // k

  __device__ Target target(int64_t k) const { return k; }
  template <class Integer>
  __device__ Acc term(Target k, const PlaneIndexOf<Integer>& pixel) const {
    return widen(grad_output[pixel.outer * out.n + k * out.c + pixel.h * out.h + pixel.w * out.w]);
  }
  __device__ int64_t offset(Target k) const { return k; }

  const T* grad_output;
  Strides out;
  int64_t targets;
};

// Of the pooled gradient, in the pixels of the pooled output: what the ReLU stopped is left out.
template <class T>
struct PooledBiasTerms {
  using Acc = Accumulate<T>;
  using Target = int64_t;  // k

  __device__ Target target(int64_t k) const { return k; }
  template <class Integer>
  __device__ Acc term(Target k, const PlaneIndexOf<Integer>& pixel) const {
    const int64_t index = pixel.outer * pooled.n + k * pooled.c + pixel.h * pooled.h + pixel.w * pooled.w;
    const bool stops = offsets != nullptr ? offsets[index] == kNoGradient : widen(output[index]) <= 0;
    return stops ? Acc{0} : widen(grad_output[index]);
  }
  __device__ int64_t offset(Target k) const { return k; }

  const T* grad_output;
  const uint8_t* offsets;  // null: there is no pooling
  const T* output;
  Strides pooled;
  int64_t targets;
};

// A convolution whose output has the pooled size.
Conv2dShape pooled_conv(const Conv2dReluPoolShape& s) {
  Conv2dShape conv = s.conv;
  conv.out_h = s.pooled_h, conv.out_w = s.pooled_w;
  return conv;
}

bool accepts_pooled(const Conv2dReluPoolShape& s) { return has_int_extents(s.conv) && has_offset_taps(s); }

template <class Integer>
Plan plan_pooled(const Conv2dReluPoolShape& s) {
  return plan_reduction<Integer>(pooled_conv(s), s.conv.out_channels);
}

template <class Integer>
void run_pooled(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, cudaStream_t stream) {
  const Conv2dShape conv = pooled_conv(s);
  with_element_type(conv.dtype, [&](auto element) {
    using T = decltype(element);
    const PooledBiasTerms<T> terms{static_cast<const T*>(b.grad_output), b.offsets, static_cast<const T*>(b.output),
                                   strides_of(conv.layout, conv.out_channels, conv.out_h, conv.out_w), conv.out_channels};
    run_reduction<T, Integer>(conv, terms, workspace, b.grad_bias, stream);
  });
}

template <class Integer>
Plan plan(const Conv2dShape& s) {
  return plan_reduction<Integer>(s, s.out_channels);
}

template <class Integer>
void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const BiasTerms<T> terms{static_cast<const T*>(b.grad_output), strides_of(s.layout, s.out_channels, s.out_h, s.out_w), s.out_channels};
    run_reduction<T, Integer>(s, terms, workspace, b.grad_bias, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_bias_reduction_sm80 = {
    "conv2d_backward_bias_reduction_sm80", 80, Conv2dDirection::backward_bias, has_int_extents, plan<int>, run<int>};
extern const Conv2dKernel conv2d_backward_bias_wide_sm80 = {
    "conv2d_backward_bias_wide_sm80", 80, Conv2dDirection::backward_bias, has_any_extents, plan<int64_t>, run<int64_t>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_bias_reduction_sm80 = {
    "conv2d_relu_max_pool2d_backward_bias_reduction_sm80",
    80,
    Conv2dDirection::backward_bias,
    accepts_pooled,
    plan_pooled<int>,
    run_pooled<int>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_bias_wide_sm80 = {"conv2d_relu_max_pool2d_backward_bias_wide_sm80",
                                                                                    80,
                                                                                    Conv2dDirection::backward_bias,
                                                                                    has_offset_taps,
                                                                                    plan_pooled<int64_t>,
                                                                                    run_pooled<int64_t>};

}  // namespace cnn_ext::cuda
