// The row of conv2d backward_bias that conv2d_backward_bias.inl describes.
#include "cpu/kernels/conv2d_backward_bias.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

bool accepts(const Conv2dShape&) { return true; }

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  with_scalar(s.dtype, [&](auto element) {
    using Element = decltype(element);
    const TensorValues<Element> values{static_cast<const Element*>(b.grad_output)};
    backward_bias(s, values, static_cast<Element*>(b.grad_bias), workspace, threads);
  });
  return Outcome::done;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_bias_direct = {
    CNN_EXT_KERNEL_NAME("conv2d_backward_bias_direct"), Isa::CNN_EXT_ISA, Conv2dDirection::backward_bias, accepts, bias_plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
