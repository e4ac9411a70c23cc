// Direct convolution with grid points in the lanes instead of output channels (PixelTile): the same staging, packing and loops as
// conv2d_direct.cpp. Its rows accept the shapes that they serve faster: few output channels in a group, as in grouped layers and in the
// backward_input of a first layer, and short sums in nchw, whose rows it stores as they are. Narrow maps leave its lanes empty.
#include "cpu/kernels/conv2d_direct_run.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// Compares what both tiles pay for one row of grid points, in load slots.
template <class T>
bool is_cheaper(const Gather& g, bool nchw) {
  using Pixel = PixelTile<T>;
  if (g.outputs == 0) return false;
  constexpr int64_t kV = kLanes<T>;
  // What is paid beside each sum, as steps: writing it as it lies, or through a transposed square.
  constexpr int64_t kWrite = 2, kTransposed = 12;
  const int64_t cols = g.w.count, channel_vectors = ceil_div(g.outputs, kV), pixel_vectors = ceil_div(cols, kV);
  // A step of a pixel tile loads an unaligned vector for the FMAs of a unit; a load that crosses cache lines takes two slots.
  const int64_t load_slots = 4 * Pixel::units(g.outputs), fma_slots = 2 * g.outputs;
  const int64_t channel_cost = 2 * channel_vectors * cols * (g.terms() + (nchw ? kTransposed : kWrite));
  const int64_t pixel_cost =
      (load_slots > fma_slots ? load_slots : fma_slots) * pixel_vectors * (g.terms() + (nchw ? kWrite : kTransposed));
  return pixel_cost < channel_cost;
}

template <Conv2dDirection kDirection>
bool accepts(const Conv2dShape& s) {
  const bool nchw = s.layout == Layout::nchw;
  const Gather g = make_gather(kDirection, s, 0);
  if (s.dtype == DType::float32) return is_cheaper<float>(g, nchw);
  return s.dtype == DType::float64 && is_cheaper<double>(g, nchw);
}

using Forward = GatherRow<PixelTile, Conv2dDirection::forward>;
using BackwardInput = GatherRow<PixelTile, Conv2dDirection::backward_input>;

}  // namespace

extern const Conv2dKernel conv2d_forward_pixels = {CNN_EXT_KERNEL_NAME("conv2d_forward_pixels"),
                                                   Isa::CNN_EXT_ISA,
                                                   Conv2dDirection::forward,
                                                   accepts<Conv2dDirection::forward>,
                                                   Forward::plan,
                                                   Forward::run};
extern const Conv2dKernel conv2d_backward_input_pixels = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_pixels"),
                                                          Isa::CNN_EXT_ISA,
                                                          Conv2dDirection::backward_input,
                                                          accepts<Conv2dDirection::backward_input>,
                                                          BackwardInput::plan,
                                                          BackwardInput::run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
