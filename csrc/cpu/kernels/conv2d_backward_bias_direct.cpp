// The row of conv2d backward_bias that conv2d_backward_bias.inl describes.
#include "cpu/kernels/conv2d_backward_bias.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

bool accepts(const Conv2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }

template <class T>
void run_of(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  const TensorValues<T> values{static_cast<const T*>(b.grad_output)};
  backward_bias(s, values, static_cast<T*>(b.grad_bias), static_cast<T*>(workspace), threads);
}

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  s.dtype == DType::float32 ? run_of<float>(s, b, workspace, threads) : run_of<double>(s, b, workspace, threads);
  return Outcome::done;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_bias_direct = {
    CNN_EXT_KERNEL_NAME("conv2d_backward_bias_direct"), Isa::CNN_EXT_ISA, Conv2dDirection::backward_bias, accepts, bias_plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
