// grad_weight of a layer with one output pixel, which sees its whole input once, with the 16 registers of AVX2. It is the product of
// conv2d_forward_pointwise with other operands: the weights of an output channel are the outputs of a line, samples are what is summed
// over. So grad_output is what is packed, and the input is read, and grad_weight written, row by row where they lie.
// conv2d_backward_weight_direct would transpose both for the sake of a few samples.
//
// Order: the samples of a block of at most 256, then the blocks, as in the product.
#include "cpu/kernels/conv2d_pointwise_row.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

Product weight_product(const Conv2dShape& s) {
  const int64_t weights = s.in_channels * s.in_h * s.in_w;  // of an output channel
  Product p{};
  p.groups = p.images = p.rows = 1;
  p.points = p.dest_map = weights;
  p.channels = s.batch, p.outputs = s.out_channels;
  p.source_channel = p.dest_channel = weights;
  p.source_point = p.dest_point = 1;
  p.weight_output = 1, p.weight_channel = s.out_channels;
  return p;
}

bool accepts(const Conv2dShape& s) {
  return (s.dtype == DType::float32 || s.dtype == DType::float64) && covers_input(s) && s.batch > 0 && !weight_product(s).is_empty();
}

Plan plan(const Conv2dShape& s, int threads) {
  const Product p = weight_product(s);
  return s.dtype == DType::float32 ? plan_product<float>(p, threads) : plan_product<double>(p, threads);
}

template <class T>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  const auto *input = static_cast<const T*>(b.input), *grad_output = static_cast<const T*>(b.grad_output);
  run_product<T>(weight_product(s), input, grad_output, nullptr, static_cast<T*>(b.grad_weight), {}, workspace, threads);
}

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  s.dtype == DType::float32 ? run_typed<float>(s, b, workspace, threads) : run_typed<double>(s, b, workspace, threads);
  return Outcome::done;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_pointwise = {
    CNN_EXT_KERNEL_NAME("conv2d_backward_weight_pointwise"), Isa::CNN_EXT_ISA, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
