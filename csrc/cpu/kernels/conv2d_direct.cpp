// Direct convolution, forward and backward_input, for every stride, padding, dilation and number of groups, in both layouts.
//
// Both directions are gather convolutions (conv2d_direct_gather.inl). A block of the source is staged into scratch (_stage), the weights
// are packed once per call (_pack), and a register tile of output channels in the lanes x grid points sums over channels and taps (_tile,
// with the tile's sizes and their reasons); _run cuts the work. Few output channels fill few lanes of the tile: see
// conv2d_direct_pixels.cpp.
#include "cpu/kernels/conv2d_direct_run.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

bool accepts(const Conv2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }

template <Conv2dDirection kDirection>
struct Row {
  using Float = GatherRow<float, ChannelTile<float>, kDirection>;
  using Double = GatherRow<double, ChannelTile<double>, kDirection>;

  static bool is_float(const Conv2dShape& s) { return s.dtype == DType::float32; }
  static Plan plan(const Conv2dShape& s, int threads) { return (is_float(s) ? Float::plan : Double::plan)(s, threads); }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
    return (is_float(s) ? Float::run : Double::run)(s, b, workspace, threads);
  }
  static PackedForm form(const Conv2dShape& s) { return (is_float(s) ? Float::form : Double::form)(s); }
  static Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& b, Packed packed, void* workspace, int threads) {
    return (is_float(s) ? Float::run_packed : Double::run_packed)(s, b, packed, workspace, threads);
  }
};

using Forward = Row<Conv2dDirection::forward>;
using BackwardInput = Row<Conv2dDirection::backward_input>;

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
