// Direct convolution, forward and backward_input, for every stride, padding, dilation and number of groups, in both layouts.
//
// Both directions are gather convolutions (conv2d_direct_gather.inl). A block of the source is staged into scratch (_stage), the weights
// are packed once per call (_pack), and a register tile of output channels in the lanes x grid points sums over channels and taps (_tile,
// with the tile's sizes and their reasons); _run cuts the work. Few output channels fill few lanes of the tile: see
// conv2d_direct_pixels.cpp.
#include "cpu/kernels/conv2d_direct_rows.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

bool accepts(const Conv2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }

using Forward = FloatingRow<ChannelTile, Conv2dDirection::forward>;
using BackwardInput = FloatingRow<ChannelTile, Conv2dDirection::backward_input>;

}  // namespace

extern const Conv2dKernel conv2d_forward_direct = {CNN_EXT_KERNEL_NAME("conv2d_forward_direct"),
                                                   Isa::CNN_EXT_ISA,
                                                   Conv2dDirection::forward,
                                                   accepts,
                                                   Forward::plan,
                                                   Forward::run,
                                                   /*adds_bias=*/false,
                                                   /*maps_padding=*/true};
extern const Conv2dKernel conv2d_backward_input_direct = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_direct"),
                                                          Isa::CNN_EXT_ISA,
                                                          Conv2dDirection::backward_input,
                                                          accepts,
                                                          BackwardInput::plan,
                                                          BackwardInput::run,
                                                          /*adds_bias=*/true};

extern const PackingConv2d conv2d_forward_direct_packing = {&conv2d_forward_direct, Forward::form, Forward::run_packed};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
