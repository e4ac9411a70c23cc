// Winograd convolution, backward_weight: F(3x3, 2x2), F(3x3, 4x4) and F(5x5, 4x4), for the same shapes and by the same leave as the other
// directions (conv2d_winograd.cpp).
//
// grad_weight is a sum over the whole batch, so one value that is not finite spoils what it multiplies in any case: then
// conv2d_backward_weight_direct, which multiplies no padding, takes over.
#include "cpu/kernels/conv2d_winograd_weight.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

Plan plan(const Conv2dShape& s, int threads) {
  return with_weight_tile<float, TensorSource<float>>(s, [&](const auto& winograd) { return winograd.plan(threads); });
}

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  const TensorSource<float> gradient{static_cast<const float*>(b.grad_output), dense_strides(s.layout, s.out_channels, s.out_h, s.out_w)};
  return with_weight_tile<float, TensorSource<float>>(s, [&](const auto& winograd) {
    return winograd.run(gradient, static_cast<const float*>(b.input), static_cast<float*>(b.grad_weight), workspace, threads);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_winograd = {CNN_EXT_KERNEL_NAME("conv2d_backward_weight_winograd"),
                                                             Isa::CNN_EXT_ISA,
                                                             Conv2dDirection::backward_weight,
                                                             winograd_serves_weight,
                                                             plan,
                                                             run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
