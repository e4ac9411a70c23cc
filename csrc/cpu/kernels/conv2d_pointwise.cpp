// 1x1 convolution without padding, forward and backward_input, in both layouts and, but for some planes with gaps, with strides, and
// kernels that cover their whole input or (channels_last, 16 registers) cut it into patches: a product of matrices whose large operands are
// read and written where they lie (conv2d_pointwise_product.inl says how they lie).
//
// The weights alone are packed (_pack), once per call or, where every weight is read by one task, by that task. A register tile (_tile)
// has outputs in its lanes, or points in planar layouts with large maps. _blocking cuts the work, _run goes through it, _row chooses.
// Nothing is staged, so there are no zeros that an infinite weight could meet. docs/kernels/pointwise.md says what bounds it.
#include "cpu/kernels/conv2d_pointwise_row.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

using Forward = PointwiseRow<Conv2dDirection::forward>;
using BackwardInput = PointwiseRow<Conv2dDirection::backward_input>;

}  // namespace

extern const Conv2dKernel conv2d_forward_pointwise = {CNN_EXT_KERNEL_NAME("conv2d_forward_pointwise"),
                                                      Isa::CNN_EXT_ISA,
                                                      Conv2dDirection::forward,
                                                      Forward::accepts,
                                                      Forward::plan,
                                                      Forward::run};
extern const Conv2dKernel conv2d_backward_input_pointwise = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_pointwise"),
                                                             Isa::CNN_EXT_ISA,
                                                             Conv2dDirection::backward_input,
                                                             BackwardInput::accepts,
                                                             BackwardInput::plan,
                                                             BackwardInput::run};

extern const PackingConv2d conv2d_forward_pointwise_packing = {&conv2d_forward_pointwise, Forward::form, Forward::run_packed};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
