// forward and backward_input on the matrix unit of sm_90a: what the host works out of a shape, and the rows. The idea, the tile and what
// bounds it: gather_wgmma.cuh.
#include <algorithm>

#include "cuda/limits.h"
#include "cuda/sm90a/gather_wgmma.cuh"
#include "cuda/sm90a/transposition.cuh"

namespace cnn_ext::cuda {
namespace {

// What the host works out of a shape, the same for forward and backward_input.
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
  // image is small; never so many that a block has fewer than 8.
  int count_parts(const Conv2dShape& s) const {
    const int64_t steps = ceil_div(depth_channels, 8 * chunk) * taps / phases;
    const int64_t sums = result_plane * cols * s.groups, few = 8 * kGatherRows * 128;
    if (sums > few) return 1;
    const int64_t wanted = std::min(std::max(few / std::max<int64_t>(sums, 1), steps / 32), steps / 8);
    int count = 1;
    while (count < kMostGatherParts && 2 * count <= wanted) count *= 2;
    return count;
  }

  // Columns of the tile, on which the sums do not depend: those with the least time, by the cycles that a step of theirs takes when all
  // multiprocessors read the second-level cache.
  int tile_cols(const Conv2dShape& s) const {
    if (cols <= 32 && !filters_across) return 32;
    constexpr struct {
      int cols, cycles;
    } kTiles[] = {{64, 630}, {128, 840}, {256, 1260}};
    int best = 64;
    int64_t least = INT64_MAX;
    for (const auto& tile : kTiles) {
      const int64_t blocks = ceil_div<int64_t>(rows, kGatherRows) * ceil_div<int64_t>(cols, tile.cols) * phases * s.groups * parts;
      const int64_t cycles = ceil_div(blocks, kMultiprocessors) * tile.cycles;
      if (cycles < least) best = tile.cols, least = cycles;
    }
    return best;
  }

  bool is_16_bit;
  int64_t chunk, depth_channels, cols, taps, source_h, source_w, result_plane, phases, pixel_h, pixel_w, rows;
  bool filters_across;
  int64_t box_channels;
  int parts;
  int64_t padded_source, padded_filter;  // channels that lie innermost
  bool stages_source, stages_filters;
  int64_t source_bytes, filter_bytes;  // of the workspace
};

template <bool kForward>
bool accepts(const Conv2dShape& s) {
  if (s.padding_mode != PaddingMode::zeros || !suits_mma(s) || s.stride_h > 8 || s.stride_w > 8) return false;
  const Side<kForward> side(s);
  if (side.phases * s.groups > kMostGatherMaps) return false;
  if (s.groups > 1 && (side.depth_channels % side.chunk != 0 || side.cols % side.chunk != 0)) return false;
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

template <bool kForward>
Plan plan(const Conv2dShape& s) {
  const Side<kForward> side(s);
  const int64_t cols = side.tile_cols(s);
  const int64_t blocks =
      ceil_div<int64_t>(side.rows, kGatherRows) * ceil_div<int64_t>(side.cols, cols) * side.phases * s.groups * side.parts;
  return {cols, kGatherRows, blocks, static_cast<size_t>(side.source_bytes + side.filter_bytes)};
}

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

template <class T, bool kForward>
WgmmaGather<T> problem_of(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, const Side<kForward>& side, void* workspace) {
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
  p.channel_boxes = static_cast<int>(ceil_div(side.depth_channels, side.box_channels));
  const int64_t neighbours = s.layout == Layout::nhwc ? side.cols : side.phases == 1 ? side.result_plane : 1;
  p.result_chunk = neighbours % side.chunk == 0 && is_aligned(p.result) ? static_cast<int>(side.chunk) : 1;
  p.phases = static_cast<int>(side.phases);
  const int cols = side.tile_cols(s);
  p.row_tiles = static_cast<int>(ceil_div<int64_t>(side.rows, kGatherRows)),
  p.col_tiles = static_cast<int>(ceil_div<int64_t>(side.cols, cols));
  p.parts = side.parts;

  const int box = static_cast<int>(side.box_channels);
  for (int group = 0; group < g.groups; ++group) {
    for (int phase = 0; phase < side.phases; ++phase) {
      const GatherAxis h = gather_axis_h(g, kForward, phase), w = gather_axis_w(g, kForward, phase);
      const TensorAxes axes{{side.depth_channels, side.source_w, side.source_h, s.batch},
                            {p.source_strides.w, p.source_strides.h, p.source_strides.n}};
      p.phase[phase] = phase_depth(h, w, p.channel_boxes);
      p.source_maps[group * side.phases + phase] =
          window_map<T>(p.source + group * p.source_group, axes, {lowest_tap(h), h.step, static_cast<int>(side.pixel_h)},
                        {lowest_tap(w), w.step, static_cast<int>(side.pixel_w)}, box, kGatherRows);
    }
  }
  const int64_t outputs = side.filters_across ? side.depth_channels : side.cols;
  const TensorAxes axes{{side.filters_across ? side.cols : side.depth_channels, side.taps, outputs, g.groups},
                        {line, filter, p.filter_group}};
  if (side.filters_across) {
    p.filter_map = tile_map<T>(p.filters, axes, {kPanelCols, 1, box, 1});
  } else {
    p.filter_map = tile_map<T>(p.filters, axes, {box, 1, cols, 1});
  }
  return p;
}

template <class T, int kCols, int kBoxBytes, bool kAcross>
void launch_tile(WgmmaGather<T>& problem, int64_t blocks, cudaStream_t stream) {
  constexpr int kSumBytes = static_cast<int>(sizeof(float)) * std::max(kGatherRows * gather_row_pitch(kCols), kCols * kGatherColPitch);
  problem.stages = pipeline_stages(gather_stage_bytes(kCols), kCols <= 64 && blocks > kMultiprocessors);
  launch(gather_wgmma<T, kCols, kBoxBytes, kAcross>,
         overlapping(Grid(blocks, kBlockThreads, std::max(problem.stages * gather_stage_bytes(kCols), kSumBytes), problem.parts)), stream,
         problem);
}

template <class T, int kCols, bool kAcross>
void launch_boxes(WgmmaGather<T>& problem, int64_t box_channels, int64_t blocks, cudaStream_t stream) {
  if (box_channels == kGatherStepBytes / static_cast<int>(sizeof(T))) {
    launch_tile<T, kCols, kGatherStepBytes, kAcross>(problem, blocks, stream);
  } else {
    launch_tile<T, kCols, kGatherStepBytes / 2, kAcross>(problem, blocks, stream);
  }
}

template <class T, bool kForward>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, void* workspace, cudaStream_t stream) {
  const Side<kForward> side(s);
  if (side.stages_source) {
    const Transposition order =
        channels_innermost(s.layout, s.batch, side.depth_channels * s.groups, side.padded_source * s.groups, side.source_h * side.source_w);
    launch_transposition<T>(order, kForward ? b.input : b.grad_output, workspace, stream);
  }
  if (side.stages_filters) {
    launch_transposition<T>(filter_order(s, side), b.weight, static_cast<unsigned char*>(workspace) + side.source_bytes, stream);
  }
  WgmmaGather<T> problem = problem_of<T>(s, b, relu, side, workspace);
  const int64_t blocks = plan<kForward>(s).blocks;
  constexpr bool kAcross = !kForward && sizeof(T) == 2;
  const int cols = side.tile_cols(s);
  if (cols == 256) return launch_boxes<T, 256, kAcross>(problem, side.box_channels, blocks, stream);
  if (cols == 128) return launch_boxes<T, 128, kAcross>(problem, side.box_channels, blocks, stream);
  if (cols == 64) return launch_boxes<T, 64, kAcross>(problem, side.box_channels, blocks, stream);
  if constexpr (!kAcross) launch_boxes<T, 32, false>(problem, side.box_channels, blocks, stream);
}

template <bool kForward>
void run_activated(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, void* workspace, cudaStream_t stream) {
  if (plan<kForward>(s).blocks == 0) return;
  with_single_type(s.dtype, [&](auto element) { run_typed<decltype(element), kForward>(s, b, relu, workspace, stream); });
}

template <bool kForward>
void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  run_activated<kForward>(s, b, false, workspace, stream);
}

bool accepts_relu(const Conv2dReluPoolShape& s) { return !has_pooling(s) && accepts<true>(s.conv); }

Plan plan_relu(const Conv2dReluPoolShape& s) { return plan<true>(s.conv); }

void run_relu(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, cudaStream_t stream) {
  run_activated<true>(s.conv, unpooled_buffers(b), true, workspace, stream);
}

}  // namespace

extern const Conv2dKernel conv2d_forward_wgmma_sm90a = {
    "conv2d_forward_wgmma_sm90a", 90, Conv2dDirection::forward, accepts<true>, plan<true>, run<true>,
    /*needs_proof=*/true,
    /*adds_bias=*/true,
    /*arch_specific=*/true};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_wgmma_sm90a = {"conv2d_relu_max_pool2d_forward_wgmma_sm90a",
                                                                                90,
                                                                                Conv2dDirection::forward,
                                                                                accepts_relu,
                                                                                plan_relu,
                                                                                run_relu,
                                                                                /*needs_proof=*/true,
                                                                                /*arch_specific=*/true};
extern const Conv2dKernel conv2d_backward_input_wgmma_sm90a = {"conv2d_backward_input_wgmma_sm90a",
                                                               90,
                                                               Conv2dDirection::backward_input,
                                                               accepts<false>,
                                                               plan<false>,
                                                               run<false>,
                                                               /*needs_proof=*/true,
                                                               /*adds_bias=*/true,
                                                               /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
