// The row of conv2d backward_weight that conv2d_backward_weight_taps.inl describes.
#include "cpu/kernels/conv2d_backward_weight_taps.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {

extern const Conv2dKernel conv2d_backward_weight_taps = {CNN_EXT_KERNEL_NAME("conv2d_backward_weight_taps"),
                                                         Isa::CNN_EXT_ISA,
                                                         Conv2dDirection::backward_weight,
                                                         accepts_taps,
                                                         TensorRow<TapTiles>::plan,
                                                         TensorRow<TapTiles>::run,
                                                         /*adds_bias=*/false,
                                                         /*maps_padding=*/true};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
