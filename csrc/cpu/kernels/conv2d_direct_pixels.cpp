// Direct convolution with grid points in the lanes instead of output channels (PixelTile): the same staging, packing and loops as
// conv2d_direct.cpp. Its rows accept the shapes that they serve faster: few output channels in a group, as in grouped layers and in the
// backward_input of a first layer, and short sums in nchw, whose rows it stores as they are. Narrow maps leave its lanes empty.
#include "cpu/kernels/conv2d_direct_pixels.inl"

#include "cpu/kernels/conv2d_direct_rows.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

template <Conv2dDirection kDirection>
bool accepts(const Conv2dShape& s) {
  return pixels_are_cheaper(kDirection, s, make_gather(kDirection, s, 0));
}

using Forward = FloatingRow<PixelTile, Conv2dDirection::forward>;
using BackwardInput = FloatingRow<PixelTile, Conv2dDirection::backward_input>;

}  // namespace

extern const Conv2dKernel conv2d_forward_pixels = {CNN_EXT_KERNEL_NAME("conv2d_forward_pixels"),
                                                   Isa::CNN_EXT_ISA,
                                                   Conv2dDirection::forward,
                                                   accepts<Conv2dDirection::forward>,
                                                   Forward::plan,
                                                   Forward::run,
                                                   /*adds_bias=*/false,
                                                   /*maps_padding=*/true};
extern const Conv2dKernel conv2d_backward_input_pixels = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_pixels"),
                                                          Isa::CNN_EXT_ISA,
                                                          Conv2dDirection::backward_input,
                                                          accepts<Conv2dDirection::backward_input>,
                                                          BackwardInput::plan,
                                                          BackwardInput::run,
                                                          /*adds_bias=*/true};

extern const PackingConv2d conv2d_forward_pixels_packing = {&conv2d_forward_pixels, Forward::form, Forward::run_packed};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
