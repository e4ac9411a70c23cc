// Which of the two register tiles serves a gather convolution faster.
#pragma once

#include "cpu/kernels/conv2d_direct_run.inl"

namespace {

using cnn_ext::DType;

// Compares what both tiles pay for one row of grid points whose sums have `terms` terms, in load slots.
template <class T>
bool is_cheaper(const Gather& g, int64_t terms, bool nchw) {
  using Pixel = PixelTile<T>;
  if (g.outputs == 0) return false;
  constexpr int64_t kV = kLanes<T>;
  // What is paid beside each sum, as steps: writing it as it lies, or through a transposed square.
  constexpr int64_t kWrite = 2, kTransposed = 12;
  const int64_t cols = g.w.count, channel_vectors = ceil_div(g.outputs, kV), pixel_vectors = ceil_div(cols, kV);
  // A step of a pixel tile loads an unaligned vector for the FMAs of a unit; a load that crosses cache lines takes two slots.
  const int64_t load_slots = 4 * Pixel::units(g.outputs), fma_slots = 2 * g.outputs;
  const int64_t channel_cost = 2 * channel_vectors * cols * (terms + (nchw ? kTransposed : kWrite));
  const int64_t pixel_cost = (load_slots > fma_slots ? load_slots : fma_slots) * pixel_vectors * (terms + (nchw ? kWrite : kTransposed));
  return pixel_cost < channel_cost;
}

// g: the direction's first problem, for all of which one tile is chosen: the sums of each have, on average, their share of the taps.
inline bool pixels_are_cheaper(Conv2dDirection direction, const Conv2dShape& s, const Gather& g) {
  const bool nchw = s.layout == Layout::nchw;
  const int64_t terms = g.channels * s.kernel_h * s.kernel_w / gather_count(direction, s);
  if (s.dtype == DType::float64) return g.outputs <= PixelTile<double>::kMaxWidth && is_cheaper<double>(g, terms, nchw);
  return s.dtype == DType::float32 && is_cheaper<float>(g, terms, nchw);
}

}  // namespace
