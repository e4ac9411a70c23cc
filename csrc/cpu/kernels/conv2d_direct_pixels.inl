// Which of the two register tiles serves a gather convolution faster.
#pragma once

#include "cpu/kernels/conv2d_direct_run.inl"

namespace {

using cnn_ext::DType;

// What is paid beside each sum, as steps: writing it as it lies, or through a transposed square. With 16 registers the transposed sums of
// one tile, runs of 6 elements at most, take longer to store than those of a unit, which several blocks of the reduction are added to
// first.
constexpr int64_t kWrite = 2, kTransposed = 12, kTransposedTile = kVectorRegisters == 32 ? kTransposed : 40;
// With 16 registers a tile of fewer sums than this waits for its own additions, and what its unaligned loads lose to the multiply-adds
// shows.
constexpr int64_t kFewestSums = kVectorRegisters == 32 ? 0 : 8;
constexpr int64_t kUnalignedLoads = kVectorRegisters == 32 ? 0 : 1;

// Compares what both tiles pay for one row of grid points whose sums have `terms` terms, in slots of the multiply-adds.
template <class T>
bool is_cheaper(const Gather& g, int64_t terms, bool nchw) {
  using Channel = ChannelTile<T>;
  using Pixel = PixelTile<T>;
  if (g.outputs == 0) return false;
  constexpr int64_t kV = kLanes<T>;
  const int64_t cols = g.w.count, channel_vectors = ceil_div(g.outputs, kV), pixel_vectors = ceil_div(cols, kV);
  const int64_t transposed = terms > kReductionTerms ? kTransposed : kTransposedTile;
  // Pixel tiles of as many vectors, of all units. A step loads each of them for the FMAs of a unit; one that crosses cache lines takes two
  // slots.
  const auto pixel_slots = [&](int64_t vectors) {
    const int64_t units = Pixel::units(g.outputs), loads = 2 * vectors, fewest = loads > kFewestSums ? loads : kFewestSums;
    const int64_t sums = vectors * g.outputs + kUnalignedLoads * units;
    return sums > fewest * units ? sums : fewest * units;
  };
  const int64_t fewest_points = Channel::tiles(cols) * kFewestSums / 2, points = cols > fewest_points ? cols : fewest_points;
  const int64_t channel_cost = channel_vectors * points * (terms + (nchw ? transposed : kWrite));
  const int64_t pixel_cost =
      (pixel_vectors / 2 * pixel_slots(2) + pixel_vectors % 2 * pixel_slots(1)) * (terms + (nchw ? kWrite : kTransposed));
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
