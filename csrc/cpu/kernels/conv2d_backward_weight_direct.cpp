// The row of conv2d backward_weight that conv2d_backward_weight_direct.inl describes.
#include "cpu/kernels/conv2d_backward_weight_direct.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {

extern const Conv2dKernel conv2d_backward_weight_direct = {CNN_EXT_KERNEL_NAME("conv2d_backward_weight_direct"),
                                                           Isa::CNN_EXT_ISA,
                                                           Conv2dDirection::backward_weight,
                                                           accepts_direct,
                                                           TensorRow<ChannelTiles>::plan,
                                                           TensorRow<ChannelTiles>::run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
