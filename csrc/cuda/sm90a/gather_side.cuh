// What the host works out of a shape for the gathering convolutions on the matrix unit of sm_90a (gather_wgmma.cuh, patch_wgmma.cuh).
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda/limits.h"
#include "cuda/sm90a/gather_wgmma.cuh"
#include "cuda/sm90a/transposition.cuh"

namespace cnn_ext::cuda {

// The same for forward and backward_input.
template <bool kForward>
struct Side {
  explicit Side(const Conv2dShape& s)
      : is_16_bit(s.dtype != DType::float32),
        chunk(is_16_bit ? kChunk<__half> : kChunk<float>),
        depth_channels((kForward ? s.in_channels : s.out_channels) / s.groups),
        cols((kForward ? s.out_channels : s.in_channels) / s.groups),
        taps(s.kernel_h * s.kernel_w),
        source_h(kForward ? s.in_h : s.out_h),
        source_w(kForward ? s.in_w : s.out_w),
        result_plane(kForward ? s.out_h * s.out_w : s.in_h * s.in_w),
        phases(kForward ? 1 : s.stride_h * s.stride_w),
        pixel_h(kForward ? s.out_h : ceil_div(s.in_h, s.stride_h)),
        pixel_w(kForward ? s.out_w : ceil_div(s.in_w, s.stride_w)),
        rows(s.batch * pixel_h * pixel_w),
        filters_across(!kForward && is_16_bit),
        box_channels(depth_channels % (8 * chunk) == 0 || depth_channels > 16 * chunk ? 8 * chunk : 4 * chunk),
        parts(count_parts(s)),
        padded_source(padded(depth_channels)),
        padded_filter(padded(filters_across ? cols : depth_channels)),
        stages_source((s.layout == Layout::nchw && source_h * source_w > 1) || depth_channels % chunk != 0),
        stages_filters((!kForward && !filters_across) || (s.weight_layout == Layout::nchw && taps > 1) ||
                       (filters_across ? cols : depth_channels) % chunk != 0),
        source_bytes(stages_source ? aligned(s.batch * source_h * source_w * s.groups * padded_source) : 0),
        filter_bytes(stages_filters ? aligned(s.groups * (filters_across ? depth_channels : cols) * taps * padded_filter) : 0) {}

  int64_t padded(int64_t channels) const { return ceil_div(channels, chunk) * chunk; }
  int64_t aligned(int64_t elements) const { return ceil_div<int64_t>(elements * (is_16_bit ? 2 : 4), 256) * 256; }

  // By how many blocks the depth is shared: as many as fill the device with a batch of 8, or leave each of them at most 32 steps where an
  // image is small; never so many that a block has fewer than 8. A cluster takes about as long as nine steps by itself.
  int count_parts(const Conv2dShape& s) const {
    constexpr int64_t kLeastSharedSteps = 20;
    const int64_t steps = ceil_div(depth_channels, 8 * chunk) * taps / phases;
    const int64_t sums = result_plane * cols * s.groups, few = 8 * kGatherRows * 128;
    if (sums > few || steps < kLeastSharedSteps) return 1;
    const int64_t wanted = std::min(std::max(few / std::max<int64_t>(sums, 1), steps / 32), steps / 8);
    int count = 1;
    while (count < kMostGatherParts && 2 * count <= wanted) count *= 2;
    return count;
  }

  // Columns of the tile and who sums up the parts, on which the sums do not depend: what takes the least time, by the cycles that a step
  // takes when all multiprocessors read the second-level cache, and those of a block before and after its steps, less where blocks run side
  // by side.
  struct Tile {
    int cols;
    int64_t step_cycles, block_cycles;
    int cluster_blocks;  // all parts, or one
    int64_t cycles;      // of all tiles
  };
  Tile best_tile(const Conv2dShape& s) const {
    constexpr int64_t kClusterCycles = 1600, kClusterBlockCycles = 300, kPartCycles = 1000;
    constexpr int kManyPartsCols = 128;  // whose sums and totals a thread can hold
    Tile best{0, 0, 0, 1, INT64_MAX};
    for (Tile tile : {Tile{32, 550, 1000, 1, 0}, Tile{64, 630, 1200, 1, 0}, Tile{128, 840, 1600, 1, 0}, Tile{256, 1260, 4500, 1, 0}}) {
      if (tile.cols == 32 && (cols > 32 || filters_across)) continue;
      const int64_t tiles = ceil_div<int64_t>(rows, kGatherRows) * ceil_div<int64_t>(cols, tile.cols) * phases * s.groups;
      const int64_t part_steps = ceil_div<int64_t>(ceil_div(depth_channels, 8 * chunk) * taps, phases * parts);
      const int64_t block_cycles = parts * (tile.step_cycles * part_steps + (parts > 1 ? kPartCycles : 0)) + tile.block_cycles;
      tile.cycles = ceil_div(tiles, kMultiprocessors) * block_cycles;
      if ((parts == 1 || tile.cols <= kManyPartsCols) && tile.cycles < best.cycles) best = tile;
      if (parts == 1) continue;
      tile.cluster_blocks = parts;
      tile.cycles = ceil_div(tiles * parts, blocks_at_once(parts)) * (tile.step_cycles * part_steps + tile.block_cycles) + kClusterCycles +
                    kClusterBlockCycles * parts;
      if (tile.cycles < best.cycles) best = tile;
    }
    return best;
  }
  int64_t cycles(const Conv2dShape& s) const { return best_tile(s).cycles; }

  bool is_16_bit;
  int64_t chunk, depth_channels, cols, taps, source_h, source_w, result_plane, phases, pixel_h, pixel_w, rows;
  bool filters_across;
  int64_t box_channels;
  int parts;
  int64_t padded_source, padded_filter;  // channels that lie innermost
  bool stages_source, stages_filters;
  int64_t source_bytes, filter_bytes;  // of the workspace
};

// The filters -> [k][tap][c], or for TF32's backward_input [group][c][tap][k].
template <bool kForward>
Transposition filter_order(const Conv2dShape& s, const Side<kForward>& side) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups, padded = side.padded_filter;
  const bool nchw = s.weight_layout == Layout::nchw;
  const int64_t channel = nchw ? side.taps : 1, tap = nchw ? 1 : group_in, output = group_in * side.taps;
  Transposition t{};
  t.padded_along = static_cast<int>(padded);
  if (kForward || side.filters_across) {
    t.along = static_cast<int>(group_in);
    t.outer = static_cast<int>(s.out_channels), t.inner = 1, t.across = static_cast<int>(side.taps);
    t.source_outer = output, t.source_along = channel, t.source_across = tap;
    t.target_outer = side.taps * padded, t.target_across = padded;
    return t;
  }
  t.along = static_cast<int>(group_out);
  t.outer = static_cast<int>(s.groups), t.source_outer = group_out * output, t.source_along = output;
  t.target_outer = group_in * side.taps * padded;
  if (nchw) {  // (channel, tap) is one axis on both sides
    t.inner = 1, t.across = static_cast<int>(group_in * side.taps);
    t.source_across = 1, t.target_across = padded;
  } else {
    t.inner = static_cast<int>(side.taps), t.across = static_cast<int>(group_in);
    t.source_inner = tap, t.source_across = channel;
    t.target_inner = padded, t.target_across = side.taps * padded;
  }
  return t;
}

// Whether the copy engine takes the operands.
template <bool kForward>
bool suits_copy_engine(const Conv2dShape& s) {
  if (s.padding_mode != PaddingMode::zeros || !suits_mma(s) || s.stride_h > 8 || s.stride_w > 8) return false;
  const Side<kForward> side(s);
  if (side.phases > kMostGatherPhases || !suits_copied_groups(s.groups, side.depth_channels, side.cols, side.chunk)) return false;
  const Conv2dGeometry g(s);
  for (int phase = 0; phase < side.phases; ++phase) {
    const GatherAxis h = gather_axis_h(g, kForward, phase), w = gather_axis_w(g, kForward, phase);
    if (!fits_copy_engine({lowest_tap(h), h.step, static_cast<int>(side.pixel_h)}, static_cast<int>(side.source_h), reach(h)) ||
        !fits_copy_engine({lowest_tap(w), w.step, static_cast<int>(side.pixel_w)}, static_cast<int>(side.source_w), reach(w))) {
      return false;
    }
  }
  return true;
}

// All but the tiles and the maps. box: channels of the depth that are fetched at once.
template <class T, bool kForward>
WgmmaGather<T> operands_of(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, const Side<kForward>& side, int box, void* workspace) {
  const Conv2dGeometry g(s);
  WgmmaGather<T> p{};
  p.bias = static_cast<const T*>(b.bias);
  p.relu = relu;
  p.result = static_cast<T*>(kForward ? b.output : b.grad_input);
  p.source_strides = strides_of(Layout::nhwc, side.padded_source * s.groups, side.source_h, side.source_w);
  p.result_strides = kForward ? g.out : g.in;
  p.kernel_w = g.kernel_w;
  p.pixel_decoder = PlaneDecoder(static_cast<int>(side.pixel_h), static_cast<int>(side.pixel_w));
  p.source = static_cast<const T*>(side.stages_source ? workspace : kForward ? b.input : b.grad_output);
  p.filters = static_cast<const T*>(side.stages_filters ? static_cast<unsigned char*>(workspace) + side.source_bytes : b.weight);
  if (!is_aligned(p.source) || !is_aligned(p.filters)) throw std::invalid_argument("this kernel wants tensors aligned to 16 bytes");
  const int64_t line = side.padded_filter, filter = side.taps * line;  // of one tap, of all
  const int64_t kernel_w = s.kernel_w;
  if (side.filters_across) {
    p.filter_strides = {1, filter, kernel_w * line, line};
    p.filter_group = side.depth_channels * filter;
  } else {
    p.filter_strides = {filter, 1, kernel_w * line, line};
    p.filter_group = side.cols * filter;
  }
  p.source_group = side.depth_channels;
  p.result_group = side.cols * p.result_strides.c;
  p.source_h = static_cast<int>(side.source_h), p.source_w = static_cast<int>(side.source_w);
  p.result_h = kForward ? g.out_h : g.in_h, p.result_w = kForward ? g.out_w : g.in_w;
  p.depth_channels = static_cast<int>(side.depth_channels), p.cols = static_cast<int>(side.cols), p.pixels = static_cast<int>(side.rows);
  p.channel_boxes = static_cast<int>(ceil_div<int64_t>(side.depth_channels, box));
  p.result_chunk = side.cols % side.chunk == 0 && is_aligned(p.result) ? static_cast<int>(side.chunk) : 1;
  const int64_t plane_pixels = side.phases == 1 && is_aligned(p.result) ? side.result_plane : 1;
  p.result_pixels = plane_pixels % 4 == 0 ? 4 : plane_pixels % 2 == 0 ? 2 : 1;
  p.result_pairs = s.layout == Layout::nhwc && side.cols % 2 == 0 && is_aligned(p.result);
  p.phases = static_cast<int>(side.phases);
  for (int phase = 0; phase < p.phases; ++phase) {
    p.phase[phase] = phase_depth(gather_axis_h(g, kForward, phase), gather_axis_w(g, kForward, phase), p.channel_boxes);
  }
  return p;
}

// Boxes of `box` channels of the depth, of one tap, of `cols` columns; across the depth they are panels of at most kPanelCols columns.
template <class T, bool kForward>
CUtensorMap filter_map_of(const WgmmaGather<T>& p, const Side<kForward>& side, int64_t groups, int box, int cols) {
  const int64_t outputs = side.filters_across ? side.depth_channels : side.cols;
  const int64_t line = side.padded_filter, filter = side.taps * line;
  const TensorAxes axes{{side.filters_across ? side.cols : side.depth_channels, side.taps, outputs, groups},
                        {line, filter, p.filter_group}};
  if (side.filters_across) return tile_map<T>(p.filters, axes, {std::min(cols, kPanelCols), 1, box, 1});
  return tile_map<T>(p.filters, axes, {box, 1, cols, 1});
}

// Puts the operands that lie otherwise in the order that the copy engine wants, in the workspace.
template <class T, bool kForward>
void stage_operands(const Conv2dShape& s, const Conv2dBuffers& b, const Side<kForward>& side, void* workspace, cudaStream_t stream) {
  auto* staged = static_cast<unsigned char*>(workspace);
  const Copy<T> source{
      channels_innermost(s.layout, s.batch, side.depth_channels * s.groups, side.padded_source * s.groups, side.source_h * side.source_w),
      static_cast<const T*>(kForward ? b.input : b.grad_output), reinterpret_cast<T*>(staged)};
  const Copy<T> filters{filter_order(s, side), static_cast<const T*>(b.weight), reinterpret_cast<T*>(staged + side.source_bytes)};
  launch_copies(side.stages_source ? &source : nullptr, side.stages_filters ? &filters : nullptr, stream);
}

}  // namespace cnn_ext::cuda
