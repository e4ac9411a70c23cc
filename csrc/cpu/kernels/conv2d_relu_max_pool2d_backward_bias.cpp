// backward_bias through ReLU (and max pooling): the sum of what passes. A pooled gradient counts once, wherever its maximum was, so that
// the pooled tensor alone is read, with the loops of conv2d_backward_bias.inl.
#include "cpu/kernels/conv2d_backward_bias.inl"
#include "cpu/simd/lanes.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

template <class Element>
struct ReluValues {
  using T = Compute<Element>;
  static Vec<T> passed(Vec<T> grad, Vec<T> output) { return output <= Vec<T>{} ? Vec<T>{} : grad; }
  Vec<T> at(int64_t i) const { return passed(load(grad + i), load(output + i)); }
  Vec<T> first_at(int64_t i, int count) const { return passed(load_first(grad + i, count), load_first(output + i, count)); }
  const Element* grad;
  const Element* output;
};

template <class Element>
struct PooledValues {
  using T = Compute<Element>;
  static Vec<T> passed(Vec<T> grad, IntVec<T> offset) { return select(equal(offset, IntVec<T>{} + kNoGradient), Vec<T>{}, grad); }
  Vec<T> at(int64_t i) const { return first_at(i, kLanes<T>); }
  Vec<T> first_at(int64_t i, int count) const {
    return passed(load_first(grad + i, count), load_offsets<T>(offsets + i, first_lanes<T>(count)));
  }
  const Element* grad;
  const uint8_t* offsets;
};

Conv2dShape pooled_shape(const Conv2dReluPoolShape& s) {
  Conv2dShape pooled = s.conv;
  pooled.out_h = s.pooled_h, pooled.out_w = s.pooled_w;
  return pooled;
}

bool accepts(const Conv2dReluPoolShape&) { return true; }

Plan plan(const Conv2dReluPoolShape& s, int threads) { return bias_plan(pooled_shape(s), threads); }

Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  with_scalar(s.conv.dtype, [&](auto element) {
    using Element = decltype(element);
    const Element* grad = static_cast<const Element*>(b.grad_output);
    Element* grad_bias = static_cast<Element*>(b.grad_bias);
    if (has_pooling(s)) {
      backward_bias(pooled_shape(s), PooledValues<Element>{grad, b.offsets}, grad_bias, workspace, threads);
    } else {
      backward_bias(s.conv, ReluValues<Element>{grad, static_cast<const Element*>(b.output)}, grad_bias, workspace, threads);
    }
  });
  return Outcome::done;
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_bias_direct = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_bias_direct"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_bias,
    accepts,
    plan,
    run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
