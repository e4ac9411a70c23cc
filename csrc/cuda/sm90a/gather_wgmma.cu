// forward and backward_input on the matrix unit of sm_90a: what the host works out of a shape, and the rows. The idea, the tile and what
// bounds it: gather_wgmma.cuh.
#include <algorithm>

#include "cuda/sm90a/gather_side.cuh"

namespace cnn_ext::cuda {
namespace {

template <bool kForward>
Plan plan(const Conv2dShape& s) {
  const Side<kForward> side(s);
  const auto tile = side.best_tile(s);
  const int64_t cols = tile.cols;
  const int64_t blocks =
      ceil_div<int64_t>(side.rows, kGatherRows) * ceil_div<int64_t>(side.cols, cols) * side.phases * s.groups * tile.cluster_blocks;
  return {cols, kGatherRows, blocks, static_cast<size_t>(side.source_bytes + side.filter_bytes)};
}

template <class T, bool kForward>
WgmmaGather<T> problem_of(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, const Side<kForward>& side, void* workspace) {
  const auto tile = side.best_tile(s);
  const int box = static_cast<int>(side.box_channels), cols = tile.cols;
  WgmmaGather<T> p = operands_of<T>(s, b, relu, side, box, workspace);
  p.row_tiles = static_cast<int>(ceil_div<int64_t>(side.rows, kGatherRows)),
  p.col_tiles = static_cast<int>(ceil_div<int64_t>(side.cols, cols));
  p.parts = side.parts, p.cluster_blocks = tile.cluster_blocks;
  const TensorAxes axes{{side.depth_channels * s.groups, side.source_w, side.source_h, s.batch},
                        {p.source_strides.w, p.source_strides.h, p.source_strides.n}};
  for (int phase = 0; phase < p.phases; ++phase) {
    const GatherAxis &h = p.phase[phase].h, &w = p.phase[phase].w;
    p.source_maps[phase] = window_map<T>(p.source, axes, {lowest_tap(h), h.step, static_cast<int>(side.pixel_h)},
                                         {lowest_tap(w), w.step, static_cast<int>(side.pixel_w)}, box, kGatherRows);
  }
  p.filter_map = filter_map_of(p, side, s.groups, box, cols);
  return p;
}

template <class T, int kCols, int kBoxBytes, bool kAcross, bool kManyParts>
void launch_tile(WgmmaGather<T>& problem, int64_t blocks, cudaStream_t stream) {
  constexpr int kSumBytes = static_cast<int>(sizeof(float)) * std::max(kGatherRows * gather_row_pitch(kCols), kCols * kGatherColPitch);
  problem.stages = pipeline_stages(gather_stage_bytes(kCols), kCols <= 64 && blocks > kMultiprocessors);
  const bool stores_rows = problem.result_strides.c == 1 && problem.cluster_blocks == 1;
  int boxes = 0;
  for (int phase = 0; phase < problem.phases; ++phase) boxes = std::max(boxes, problem.phase[phase].boxes);
  const int steps = ceil_div(ceil_div(boxes, kGatherStepBytes / kBoxBytes), problem.cluster_blocks);
  const int stage_bytes = std::min(problem.stages, steps) * gather_stage_bytes(kCols);  // stages that no step comes to need no memory
  launch(gather_wgmma<T, kCols, kBoxBytes, kAcross, kManyParts>,
         overlapping(Grid(blocks, kBlockThreads, stores_rows ? stage_bytes : std::max(stage_bytes, kSumBytes), problem.cluster_blocks)),
         stream, problem);
}

template <class T, int kCols, bool kAcross>
void launch_boxes(WgmmaGather<T>& problem, int64_t box_channels, int64_t blocks, cudaStream_t stream) {
  const bool whole = box_channels == kGatherStepBytes / static_cast<int>(sizeof(T));
  if constexpr (kCols <= 128) {
    if (problem.cluster_blocks < problem.parts) {
      return whole ? launch_tile<T, kCols, kGatherStepBytes, kAcross, true>(problem, blocks, stream)
                   : launch_tile<T, kCols, kGatherStepBytes / 2, kAcross, true>(problem, blocks, stream);
    }
  }
  return whole ? launch_tile<T, kCols, kGatherStepBytes, kAcross, false>(problem, blocks, stream)
               : launch_tile<T, kCols, kGatherStepBytes / 2, kAcross, false>(problem, blocks, stream);
}

template <class T, bool kForward>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, void* workspace, cudaStream_t stream) {
  const Side<kForward> side(s);
  stage_operands<T>(s, b, side, workspace, stream);
  WgmmaGather<T> problem = problem_of<T>(s, b, relu, side, workspace);
  const int64_t blocks = plan<kForward>(s).blocks;
  constexpr bool kAcross = !kForward && sizeof(T) == 2;
  const int cols = side.best_tile(s).cols;
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

bool accepts_relu(const Conv2dReluPoolShape& s) { return !has_pooling(s) && suits_copy_engine<true>(s.conv); }

Plan plan_relu(const Conv2dReluPoolShape& s) { return plan<true>(s.conv); }

void run_relu(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, cudaStream_t stream) {
  run_activated<true>(s.conv, unpooled_buffers(b), true, workspace, stream);
}

}  // namespace

extern const Conv2dKernel conv2d_forward_wgmma_sm90a = {"conv2d_forward_wgmma_sm90a", 90,         Conv2dDirection::forward,
                                                        suits_copy_engine<true>,      plan<true>, run<true>,
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
                                                               suits_copy_engine<false>,
                                                               plan<false>,
                                                               run<false>,
                                                               /*needs_proof=*/true,
                                                               /*adds_bias=*/true,
                                                               /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
