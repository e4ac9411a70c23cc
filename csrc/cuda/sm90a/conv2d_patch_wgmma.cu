// forward and backward_input of few channels on the matrix unit of sm_90a: what the host works out of a shape, and the rows. The idea, the
// tile and what bounds it: patch_wgmma.cuh.
#include <algorithm>

#include "cuda/sm90a/gather_side.cuh"
#include "cuda/sm90a/patch_wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kMostSharedBytes = 226 * 1024;  // of a block, beside the barriers
constexpr int kMostBoxExtent = 256;           // of the copy engine

// How a result is divided into rectangles of which each is one tile.
struct Rectangles {
  int64_t height, width, pitch;  // pitch: positions of a line of the patch
  int64_t tiles_h, tiles_w;
};

// The fewest, and of as many those with the smallest patch. reach: how far the taps lie apart.
inline Rectangles rectangles(int64_t plane_h, int64_t plane_w, int64_t reach_h, int64_t reach_w) {
  Rectangles best{};
  int64_t least_tiles = INT64_MAX, least_patch = INT64_MAX;
  for (int64_t tiles_w = ceil_div<int64_t>(plane_w, kPatchRows); tiles_w <= plane_w; ++tiles_w) {
    const int64_t width = ceil_div(plane_w, tiles_w), pitch = width + reach_w;
    if (tiles_w > 1 && width < kAtomRows) break;
    const int64_t height = std::min((kPatchRows + reach_w) / pitch, plane_h);
    if (height == 0) continue;
    const int64_t tiles_h = ceil_div(plane_h, height), patch = (height + reach_h) * pitch;
    if (tiles_h * tiles_w > least_tiles || (tiles_h * tiles_w == least_tiles && patch >= least_patch)) continue;
    best = {height, width, pitch, tiles_h, tiles_w};
    least_tiles = tiles_h * tiles_w, least_patch = patch;
    if (reach_h == 0 && reach_w == 0) break;
  }
  return best;
}

// What the host works out of a shape beside Side.
template <bool kForward>
struct PatchPlan {
  explicit PatchPlan(const Conv2dShape& s) : side(s) {
    const Conv2dGeometry g(s);
    const GatherAxis h = gather_axis_h(g, kForward, 0), w = gather_axis_w(g, kForward, 0);
    const int64_t reach_h = reach(h), reach_w = reach(w);
    // A 1x1 convolution has no lines: its pixels are one.
    const bool flat = side.taps == 1 && h.first == 0 && w.first == 0 && side.pixel_h == side.source_h && side.pixel_w == side.source_w;
    batch = flat ? 1 : s.batch;
    source_h = flat ? 1 : side.source_h, source_w = flat ? side.rows : side.source_w;
    result_h = flat ? 1 : side.pixel_h, result_w = flat ? side.rows : side.pixel_w;
    tile = rectangles(result_h, result_w, reach_h, reach_w);
    tiles = batch * tile.tiles_h * tile.tiles_w;
    element_bytes = side.is_16_bit ? 2 : 4;
    const int64_t depth_bytes = side.depth_channels * element_bytes;
    box_bytes = side.is_16_bit && depth_bytes <= 32 ? 32 : depth_bytes <= 64 ? 64 : 128;
    channel_boxes = ceil_div(depth_bytes, box_bytes);
    lines = tile.height + reach_h;
    fetched_bytes = lines * tile.pitch * box_bytes;
    const int64_t read = std::max(lines * tile.pitch, kPatchRows + reach_h * tile.pitch + reach_w);
    patch_box_bytes = ceil_div<int64_t>(read * box_bytes, 1024) * 1024;
    // With few products more, smaller blocks hide each other's stores.
    for (int64_t width : {128, 64, 32}) {
      if ((width == 128 && side.taps == 1) || (width > 32 && side.cols <= width / 2)) continue;
      if (take_columns(width)) break;
    }
    if (cols == 32 && has_48_columns()) {
      const int64_t cycles_of_32 = cycles();
      if (!take_columns(48) || cycles() >= cycles_of_32) take_columns(32);
    }
  }

  // As many patches of a worker as fit beside the filters of so many columns. Whether there is memory for one; cols is 0 otherwise.
  bool take_columns(int64_t width) {
    cols = width;
    for (buffers = 2; buffers >= 1; --buffers) {
      if (shared_bytes() <= kMostSharedBytes) return true;
    }
    cols = 0;
    return false;
  }

  // Filters across the depth come in panels of 32 or 64, and the smaller boxes leave room for 64.
  bool has_48_columns() const { return side.is_16_bit && !side.filters_across && box_bytes == 128; }

  bool fits() const { return cols > 0 && tile.height > 0 && tile.pitch <= kMostBoxExtent && lines <= kMostBoxExtent; }
  int64_t filter_bytes() const { return side.taps * channel_boxes * cols * box_bytes; }
  int64_t shared_bytes() const { return filter_bytes() + kPatchWorkers * buffers * channel_boxes * patch_box_bytes; }
  int64_t col_tiles() const { return ceil_div(side.cols, cols); }
  // Blocks that stay: as many as a device runs at once, the same number for each column tile.
  int64_t blocks() const {
    const int64_t at_once = kMultiprocessors * (cols <= 64 && shared_bytes() <= kMostSharedBytes / 2 ? 2 : 1);
    return std::min(std::max<int64_t>(at_once / col_tiles(), 1), ceil_div<int64_t>(tiles, kPatchWorkers)) * col_tiles();
  }
  // Of a multiprocessor: the products, by what they read of shared memory or by the matrix unit; what is not hidden of a tile's other work;
  // and filling shared memory first.
  int64_t cycles() const {
    constexpr int64_t kTileCycles = 400, kBytesPerCycle = 40;
    const int64_t instructions = 2 * side.taps * channel_boxes * (box_bytes / kInstructionBytes),
                  patch_bytes = channel_boxes * fetched_bytes;
    const int64_t exposed = buffers == 2 ? 0 : patch_bytes / kBytesPerCycle / kPatchWorkers;
    const int64_t tile_cycles = instructions * std::max(cols / 2, 16 + cols / 4) + kTileCycles + exposed;
    return ceil_div(tiles * col_tiles(), kMultiprocessors) * tile_cycles + (filter_bytes() + kPatchWorkers * patch_bytes) / kBytesPerCycle;
  }

  Side<kForward> side;
  int64_t batch, source_h, source_w, result_h, result_w;
  Rectangles tile;
  int64_t tiles, element_bytes, box_bytes, channel_boxes, lines, fetched_bytes, patch_box_bytes, cols;
  int64_t buffers;
};

template <bool kForward>
bool accepts(const Conv2dShape& s) {
  // In nchw a 1x1 convolution is its stores, for which the row that fetches windows has shared memory.
  if (s.layout == Layout::nchw && s.kernel_h * s.kernel_w == 1) return false;
  if (s.groups != 1 || s.stride_h != 1 || s.stride_w != 1 || s.batch == 0 || !suits_copy_engine<kForward>(s)) {
    return false;
  }
  // Which row sums up follows from one image: for a batch of 8, whatever the batch is. Windows of more than one tap take the copy engine
  // half as long again as the estimate says.
  Conv2dShape eight = s;
  eight.batch = 8;
  const PatchPlan<kForward> plan(eight);
  return plan.fits() && PatchPlan<kForward>(s).fits() && 2 * plan.cycles() <= (plan.side.taps > 1 ? 3 : 2) * plan.side.cycles(eight);
}

template <bool kForward>
Plan plan(const Conv2dShape& s) {
  const PatchPlan<kForward> p(s);
  return {p.cols, kPatchRows, p.blocks(), static_cast<size_t>(p.side.source_bytes + p.side.filter_bytes)};
}

template <class T, bool kForward>
PatchGather<T> problem_of(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, const PatchPlan<kForward>& plan, void* workspace) {
  const int box = static_cast<int>(plan.box_bytes / plan.element_bytes);
  PatchGather<T> p{};
  WgmmaGather<T>& g = p.gather;
  g = operands_of<T>(s, b, relu, plan.side, box, workspace);
  g.filter_map = filter_map_of(g, plan.side, s.groups, box, static_cast<int>(plan.cols));
  g.col_tiles = static_cast<int>(plan.col_tiles());
  g.result_h = static_cast<int>(plan.result_h), g.result_w = static_cast<int>(plan.result_w);
  const int64_t line = plan.source_w * g.source_strides.w;
  const TensorAxes axes{{plan.side.depth_channels, plan.source_w, plan.source_h, plan.batch},
                        {g.source_strides.w, line, plan.source_h * line}};
  p.patch_map = tile_map<T>(g.source, axes, {box, static_cast<int>(plan.tile.pitch), static_cast<int>(plan.lines), 1});
  p.tile_decoder = PlaneDecoder(static_cast<int>(plan.tile.tiles_h), static_cast<int>(plan.tile.tiles_w));
  p.pitch = FastDivisor(static_cast<int>(plan.tile.pitch));
  p.tile_h = static_cast<int>(plan.tile.height), p.tile_w = static_cast<int>(plan.tile.width), p.tiles = static_cast<int>(plan.tiles);
  p.box_bytes = static_cast<int>(plan.patch_box_bytes), p.fetched_bytes = static_cast<int>(plan.fetched_bytes);
  p.buffers = static_cast<int>(plan.buffers);
  return p;
}

template <class T, bool kForward>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, void* workspace, cudaStream_t stream) {
  const PatchPlan<kForward> plan(s);
  stage_operands<T>(s, b, plan.side, workspace, stream);
  const PatchGather<T> problem = problem_of<T>(s, b, relu, plan, workspace);
  const Grid grid = overlapping(Grid(plan.blocks(), kBlockThreads, static_cast<size_t>(plan.shared_bytes())));
  constexpr bool kAcross = !kForward && sizeof(T) == 2;
  const auto with_cols = [&](auto box_bytes) {
    constexpr int kBoxBytes = decltype(box_bytes)::value;
    if constexpr (sizeof(T) == 2 && kForward && kBoxBytes == 128) {
      if (plan.cols == 48) return launch(patch_wgmma<T, 48, kBoxBytes, kAcross>, grid, stream, problem);
    }
    const auto kernel = plan.cols == 128  ? patch_wgmma<T, 128, kBoxBytes, kAcross>
                        : plan.cols == 64 ? patch_wgmma<T, 64, kBoxBytes, kAcross>
                                          : patch_wgmma<T, 32, kBoxBytes, kAcross>;
    launch(kernel, grid, stream, problem);
  };
  if (plan.box_bytes == 128) return with_cols(std::integral_constant<int, 128>{});
  if (plan.box_bytes == 64) return with_cols(std::integral_constant<int, 64>{});
  if constexpr (sizeof(T) == 2) with_cols(std::integral_constant<int, 32>{});  // PatchPlan takes wider boxes for float32
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

extern const Conv2dKernel conv2d_forward_patch_wgmma_sm90a = {"conv2d_forward_patch_wgmma_sm90a",
                                                              90,
                                                              Conv2dDirection::forward,
                                                              accepts<true>,
                                                              plan<true>,
                                                              run<true>,
                                                              /*needs_proof=*/true,
                                                              /*adds_bias=*/true,
                                                              /*arch_specific=*/true};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_patch_wgmma_sm90a = {"conv2d_relu_max_pool2d_forward_patch_wgmma_sm90a",
                                                                                      90,
                                                                                      Conv2dDirection::forward,
                                                                                      accepts_relu,
                                                                                      plan_relu,
                                                                                      run_relu,
                                                                                      /*needs_proof=*/true,
                                                                                      /*arch_specific=*/true};
extern const Conv2dKernel conv2d_backward_input_patch_wgmma_sm90a = {"conv2d_backward_input_patch_wgmma_sm90a",
                                                                     90,
                                                                     Conv2dDirection::backward_input,
                                                                     accepts<false>,
                                                                     plan<false>,
                                                                     run<false>,
                                                                     /*needs_proof=*/true,
                                                                     /*adds_bias=*/true,
                                                                     /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
