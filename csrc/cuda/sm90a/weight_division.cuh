// How backward_weight is divided on sm_90a (backward_weight_wgmma.cuh): into tiles of the weights and splits of the pixels, whatever is
// expected to take the least time. It follows from the shape alone.
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/sm90a/pipeline.cuh"
#include "cuda/sm90a/tensor_map.cuh"

namespace cnn_ext::cuda {

// A tile as the host sees it.
struct WeightTileSizes {
  int64_t rows, panels, panel_channels, step_pixels, stage_bytes, blocks, step_cycles;  // blocks: that share a multiprocessor
};

// The weights of an output channel in nchw are put in order in shared memory, some channels of all taps at a time.
constexpr int64_t kMostTransposedTaps = 256;

// How the pixels are shared. size: pixels of a block; the last may have fewer, or none. cycles: that all of it is expected to take.
struct WeightSplits {
  int64_t clusters, cluster_blocks, size, cycles;
};

// What the host works out of a shape.
struct WeightDivision {
  // pixels: of the depth. in_place: the operands are read as they lie.
  WeightDivision(const Conv2dShape& s, const WeightTileSizes& sizes, int64_t pixels, bool in_place = false)
      : tile(sizes),
        element_bytes(s.dtype == DType::float32 ? 4 : 2),
        panels_of_tap(ceil_div(s.in_channels / s.groups, tile.panel_channels)),
        panels(panels_of_tap * s.kernel_h * s.kernel_w),
        row_tiles(ceil_div(s.out_channels / s.groups, tile.rows) * s.groups),
        col_tiles(ceil_div(panels, tile.panels)),
        sums(s.out_channels * panels * tile.panel_channels),
        splits(split(pixels)),
        padded_in(whole_chunks(s.in_channels)),
        padded_out(whole_chunks(s.out_channels)),
        stages_input(!in_place && ((s.layout == Layout::nchw && s.in_h * s.in_w > 1) || padded_in != s.in_channels)),
        stages_grad(!in_place && ((s.layout == Layout::nchw && s.out_h * s.out_w > 1) || padded_out != s.out_channels)),
        input_bytes(stages_input ? aligned(s.batch * s.in_h * s.in_w * padded_in * element_bytes) : 0),
        grad_bytes(stages_grad ? aligned(s.batch * s.out_h * s.out_w * padded_out * element_bytes) : 0),
        transposes(s.weight_layout == Layout::nchw && s.kernel_h * s.kernel_w > 1 && s.kernel_h * s.kernel_w <= kMostTransposedTaps &&
                   sum_lanes({splits.clusters, splits.size}) == 1 && splits.clusters * sums <= kMostPartials),
        partial_bytes(splits.clusters > 1 || transposes ? static_cast<int64_t>(sizeof(float)) * splits.clusters * sums : 0) {}

  static int64_t aligned(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }
  int64_t whole_chunks(int64_t channels) const {
    return ceil_div(channels * element_bytes, int64_t{kChunkBytes}) * kChunkBytes / element_bytes;
  }

  // The splits with the least time on 132 multiprocessors: what the steps take them or the second-level cache, what a block takes before
  // and after them, what clusters take to start and to add up, and what a second launch takes, which reads the sums of every cluster.
  // Cycles as measured on an H100.
  WeightSplits split(int64_t pixels) const {
    constexpr int64_t kClusterCycles = 2000, kClusterBlockCycles = 425, kLaunchCycles = 6900;
    constexpr int64_t kCacheBytes = 4000, kDeviceBytes = 4000;  // of a cycle: for all steps, for all sums
    constexpr int64_t kMostWaves = 4;                           // whole ones: others leave multiprocessors without work
    const int64_t block_cycles = tile.rows * tile.panels * tile.panel_channels * 19 / 40;
    const int64_t tiles = std::max<int64_t>(row_tiles * col_tiles, 1);
    WeightSplits best{1, 1, std::max<int64_t>(pixels, 1), INT64_MAX};
    const auto consider = [&](int64_t clusters, int64_t cluster_blocks, int64_t slots) {
      const int64_t count = clusters * cluster_blocks, steps = ceil_div(ceil_div(pixels, count), tile.step_pixels);
      const int64_t waves = ceil_div(tiles * count, slots), neighbours = std::min(waves, tile.blocks);  // that run at the same time
      const int64_t copied = std::min(tiles * count, slots * tile.blocks) * tile.stage_bytes;
      const int64_t shared_step = std::max(neighbours * tile.step_cycles, copied / kCacheBytes);
      const int64_t step_cycles = neighbours < tile.blocks ? shared_step * 5 / 4 : shared_step;  // a block alone leaves gaps
      const int64_t cycles = ceil_div(waves, tile.blocks) * (steps * step_cycles + block_cycles) +
                             (cluster_blocks > 1 ? kClusterCycles + kClusterBlockCycles * cluster_blocks : 0) +
                             (clusters > 1 ? kLaunchCycles + 2 * clusters * sums * int64_t{sizeof(float)} / kDeviceBytes : 0);
      if (cycles < best.cycles) best = {clusters, cluster_blocks, std::max<int64_t>(steps, 1) * tile.step_pixels, cycles};
    };
    for (int64_t cluster_blocks = 1; cluster_blocks <= kMostClusterBlocks; cluster_blocks *= 2) {
      const int64_t slots = blocks_at_once(cluster_blocks);
      consider(1, cluster_blocks, slots);
      for (int64_t waves = 1; waves <= kMostWaves * tile.blocks; ++waves) {
        const int64_t clusters = waves * slots / (tiles * cluster_blocks);
        if (clusters > 1 && clusters * sums <= kMostPartials) consider(clusters, cluster_blocks, slots);
      }
    }
    return best;
  }

  int64_t blocks() const { return row_tiles * col_tiles * splits.clusters * splits.cluster_blocks; }
  Plan plan() const {
    return {tile.rows, tile.panels * tile.panel_channels, blocks(), static_cast<size_t>(input_bytes + grad_bytes + partial_bytes)};
  }

  WeightTileSizes tile;
  int64_t element_bytes, panels_of_tap, panels, row_tiles, col_tiles, sums;
  WeightSplits splits;
  int64_t padded_in, padded_out;
  bool stages_input, stages_grad;
  int64_t input_bytes, grad_bytes;  // of the workspace, as partial_bytes
  bool transposes;                  // whether the launch that adds up clusters, be it one, puts taps innermost
  int64_t partial_bytes;
};

inline bool suits_weight_wgmma(const Conv2dShape& s) {
  const int64_t chunk = s.dtype == DType::float32 ? kChunk<float> : kChunk<__half>;
  const WindowAxis h{-static_cast<int>(s.pad_top), static_cast<int>(s.stride_h), static_cast<int>(s.out_h)};
  const WindowAxis w{-static_cast<int>(s.pad_left), static_cast<int>(s.stride_w), static_cast<int>(s.out_w)};
  return s.padding_mode == PaddingMode::zeros && s.batch > 0 &&
         suits_copied_groups(s.groups, s.in_channels / s.groups, s.out_channels / s.groups, chunk) && suits_mma(s) &&
         fits_copy_engine(h, static_cast<int>(s.in_h), static_cast<int>((s.kernel_h - 1) * s.dilation_h)) &&
         fits_copy_engine(w, static_cast<int>(s.in_w), static_cast<int>((s.kernel_w - 1) * s.dilation_w));
}

// A tile, and what runs it.
struct WeightCandidate {
  WeightTileSizes tile;
  void (*run)(const Conv2dShape&, const Conv2dBuffers&, const WeightDivision&, void*, cudaStream_t);
};

struct WeightChoice {
  WeightDivision division;
  WeightCandidate candidate;
};

// Whether a tile is worth trying for an extent of rows or columns: one of 64 where there are no more, any other where it is filled by half.
inline bool suits_extent(int64_t size, int64_t extent) {
  constexpr int64_t kSmallest = 64;
  return size == kSmallest ? extent <= kSmallest : extent > kSmallest && 2 * extent > size;
}

// The tile that is expected to take the least time, the first of equals.
template <int kCount>
WeightChoice choose_tile(const Conv2dShape& s, const WeightCandidate (&candidates)[kCount], bool in_place = false) {
  std::optional<WeightChoice> best;
  for (const WeightCandidate& candidate : candidates) {
    const WeightTileSizes& tile = candidate.tile;
    const int64_t cols = ceil_div(s.in_channels / s.groups, tile.panel_channels) * s.kernel_h * s.kernel_w * tile.panel_channels;
    if (!suits_extent(tile.rows, s.out_channels / s.groups) || !suits_extent(tile.panels * tile.panel_channels, cols)) continue;
    const WeightDivision division(s, tile, pixels_of(s), in_place);
    if (!best || division.splits.cycles < best->division.splits.cycles) best = WeightChoice{division, candidate};
  }
  return *best;
}

// That the row of windows in 16 bits is expected to take (conv2d_backward_weight_wgmma.cu).
int64_t expected_window_cycles(const Conv2dShape& s);

}  // namespace cnn_ext::cuda
