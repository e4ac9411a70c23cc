// Which tile a Winograd convolution takes, whether it pays, and how the work is cut.
//
// Two schedules, by what is larger:
//   blocks   The transformed weights of all channels are small. They are made once, and every task takes a block of tiles, small enough for
//            the second cache, through all three steps.
//   units    They are large, as in the deep layers of a network, where the maps are small. The inputs of a large block of tiles are
//            transformed by all threads, then every task transforms the weights of its unit of output channels into its own scratch and
//            multiplies all tiles of the block with them, a strip after the other, so that the sums stay in the second cache.
// The reduction is cut into blocks of channels by their number alone, so both schedules give the same bits.
#pragma once

#include "cpu/kernels/conv2d_winograd_multiply.inl"
#include "cpu/kernels/conv2d_winograd_tiles.inl"

namespace {

using cnn_ext::DType;

constexpr int64_t kUnitWeightBytes = 1200 << 10;  // of a unit's transformed weights for a block of channels: in the second cache
constexpr int64_t kPackedChannels = 16;           // whose weights are packed at a time, in the first cache
constexpr int64_t kSharedWeightBytes = 5 << 19;   // of transformed weights: above, the schedule is by units
constexpr int64_t kBlockBytes = 640 << 10;        // of a block's transformed tensors, by blocks; of a unit's sums, by units
constexpr int64_t kSharedTileBytes = 8 << 20;     // of a block's transformed inputs, by units, and no more than the weights
constexpr int64_t kBlocksPerThread = 4;

inline int64_t rounded_up(int64_t x, int64_t step) { return ceil_div(x, step) * step; }

// What an image costs, in vector operations: beside the products, what transforming inputs and outputs takes for each point, and an
// image's share of the transformed weights, as measured against the products. The batch may not be looked at: a share of a sixth is what
// batches from about 8 on pay at most.
constexpr int64_t kTransformCost = 8, kFilterCost = 1;

template <class T>
int64_t winograd_cost(const Gather& g, int64_t outputs) {
  const int64_t alpha = outputs + g.h.taps - 1, tiles = ceil_div(g.h.count, outputs) * ceil_div(g.w.count, outputs);
  const int64_t vectors_in = ceil_div(g.channels, kLanes<T>), vectors_out = ceil_div(g.outputs, kLanes<T>);
  const int64_t per_point =
      tiles * (g.channels * vectors_out + kTransformCost * (vectors_in + vectors_out)) + kFilterCost * g.channels * vectors_out;
  return alpha * alpha * per_point;
}

template <class T>
int64_t direct_cost(const Gather& g) {
  return g.h.count * g.w.count * g.terms() * ceil_div(g.outputs, kLanes<T>);
}

// m of F(m x m, r x r). F(2 x 2, 5 x 5) would serve maps of 2 x 2 alone.
template <class T>
int64_t tile_outputs(const Gather& g) {
  return g.h.taps == 3 && winograd_cost<T>(g, 2) <= winograd_cost<T>(g, 4) ? 2 : 4;
}

inline bool is_winograd_problem(const Conv2dShape& s) {
  return s.allow_winograd != 0 && s.dtype == DType::float32 && s.kernel_h == s.kernel_w && (s.kernel_h == 3 || s.kernel_h == 5) &&
         s.stride_h * s.stride_w == 1 && s.dilation_h * s.dilation_w == 1 && s.in_channels * s.out_channels > 0;
}

template <class T>
bool pays(const Gather& g) {
  return 5 * winograd_cost<T>(g, tile_outputs<T>(g)) < 4 * direct_cost<T>(g);
}

// Whether the Winograd row of this direction takes the shape.
template <Conv2dDirection kDirection>
inline bool winograd_serves(const Conv2dShape& s) {
  return is_winograd_problem(s) && pays<float>(make_gather(kDirection, s, 0));
}

// How a Winograd convolution is cut.
struct WinogradBlocking {
  TileBlocks blocks;
  int64_t channels, channel_blocks;
  int64_t channel_vectors;  // of a group
  int64_t units;            // of a group
  bool by_units;
  int64_t strip_rows;  // rows of tiles whose sums a task holds at a time

  int64_t strip_tiles() const { return strip_rows * blocks.cols; }
  bool has_one_strip() const { return strip_tiles() >= blocks.tiles(); }
};

inline int64_t unit_width(int64_t outputs, int64_t unit, int64_t lanes) {
  return outputs - unit * kUnitVectors * lanes > lanes ? kUnitVectors * lanes : lanes;
}

template <class T, int kOutputs, int kTaps>
WinogradBlocking make_winograd_blocking(const Gather& g, int threads) {
  constexpr int kAlpha = kOutputs + kTaps - 1;
  constexpr int64_t kPointBytes = kAlpha * kAlpha * static_cast<int64_t>(sizeof(T)), kUnit = kUnitVectors * kLanes<T>;
  WinogradBlocking b{};
  constexpr int64_t kMost = kUnitWeightBytes / (kPointBytes * kUnit);
  b.channels = smaller(rounded_up(ceil_div(g.channels, ceil_div(g.channels, kMost)), kLanes<T>), g.channels);
  b.channel_blocks = ceil_div(g.channels, b.channels);
  b.channel_vectors = ceil_div(g.channels, kLanes<T>);
  b.units = ceil_div(g.outputs, kUnit);
  const int64_t channels = b.channel_vectors * kLanes<T>;
  const int64_t weight_bytes = g.groups * channels * g.outputs * kPointBytes, most_tiles = smaller(kSharedTileBytes, weight_bytes);
  b.by_units = weight_bytes > kSharedWeightBytes;
  const int64_t wanted = threads > 1 ? threads * kBlocksPerThread : 1;
  const auto fits = [&] {
    const int64_t tiles = b.blocks.tiles();
    if (b.by_units) return tiles * channels * kPointBytes <= most_tiles && b.blocks.cols * kUnit * kPointBytes <= kBlockBytes;
    return tiles * (channels + kUnit) * kPointBytes <= kBlockBytes && (tiles < 2 * kProductTiles || g.groups * b.blocks.count() >= wanted);
  };
  fit_tile_blocks(g.batch, g.h.count, g.w.count, kOutputs, b.blocks, fits);
  b.strip_rows = b.blocks.images * b.blocks.rows;
  if (b.by_units) b.strip_rows = clamp(kBlockBytes / at_least_1(b.blocks.cols * kUnit * kPointBytes), 1, b.strip_rows);
  return b;
}

// One flag per image, at the beginning of the workspace.
inline int64_t suspects_bytes(int64_t batch) { return aligned(batch * static_cast<int64_t>(sizeof(int32_t))); }

// Where the other things lie in the workspace, in bytes; what a worker has begins at `workers + worker * worker_bytes`.
struct WinogradScratch {
  int64_t unit_weights, block_weights;             // transformed weights of a unit and of a block of its channels: elements
  int64_t point_weights, point_tiles, point_sums;  // from a point to the next: elements
  int64_t weights, tiles, workers;
  int64_t own_packed, own_weights, own_tiles, own_line, own_staged, own_sums, own_outputs, worker_bytes;
  int64_t total(int threads) const { return workers + threads * worker_bytes; }
};

template <class T, int kOutputs, int kTaps, class Source>
WinogradScratch make_winograd_scratch(const Gather& g, const WinogradBlocking& b) {
  constexpr int64_t kPoints = (kOutputs + kTaps - 1) * (kOutputs + kTaps - 1), kV = kLanes<T>, kUnit = kUnitVectors * kV;
  WinogradScratch s{};
  s.point_weights = plane_vectors(b.channels * kUnitVectors) * kV;
  s.point_tiles = plane_vectors(b.channel_vectors * b.blocks.tiles()) * kV;
  s.point_sums = plane_vectors(kUnitVectors * b.strip_tiles()) * kV;
  s.block_weights = kPoints * s.point_weights;
  s.unit_weights = b.channel_blocks * s.block_weights;
  int64_t end = 0;
  const auto next = [&end](int64_t elements) {
    const int64_t begin = end;
    end += aligned(elements * static_cast<int64_t>(sizeof(T)));
    return begin;
  };
  end = suspects_bytes(g.batch);
  s.weights = next(b.by_units ? 0 : g.groups * b.units * s.unit_weights);
  s.tiles = next(b.by_units ? kPoints * s.point_tiles : 0);
  s.workers = end, end = 0;
  s.own_packed = next(kPackedChannels * kTaps * kTaps * kUnit);
  s.own_weights = next(!b.by_units ? 0 : b.has_one_strip() ? s.block_weights : s.unit_weights);
  s.own_tiles = next(b.by_units ? 0 : kPoints * s.point_tiles);
  s.own_line = next(TileStager<T, Source>::line_elements(b.blocks.rows * kOutputs + kTaps - 1, g.w.source_size));
  s.own_staged = next((b.blocks.rows * kOutputs + kTaps - 1) * (b.blocks.cols * kOutputs + kTaps - 1) * kV);
  s.own_sums = next(kPoints * s.point_sums);
  s.own_outputs = next(kOutputs * kOutputs * b.blocks.cols * kV);
  s.worker_bytes = end;
  return s;
}

}  // namespace
