// What backward_weight on the matrix unit of sm_90a is in every type:
//   grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw].
// Rows of the product are output channels, columns the weights (r, s, c) in panels of some channels of one tap, the depth runs over the
// pixels (n, oh, ow).
//
// Operands: the copy engine fetches boxes of both tensors, pixels x channels, padding as zeros, to shared memory. How they get from there
// to the matrix unit is the Gemm's affair. Tensors whose channels do not lie innermost in whole chunks of 16 bytes are put in that order by
// a launch of its own first (transposition.cuh).
//
// There are few tiles and a long depth: the pixels are split among blocks. Up to eight of them are a cluster, which adds up its partial
// sums through each other's shared memory, in order; where there are more, a second launch adds up those of the clusters. The splits follow
// from the shape alone, so that every run has the same bits.
//
// Padding never multiplies: see gather_wgmma.cuh. Not handled: float64; groups of 16 channels and fewer; strides above 8, padding of more
// than 128, windows of more than 256.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/pixel_reduction.cuh"
#include "cuda/sm90a/overlap.cuh"
#include "cuda/sm90a/pipeline.cuh"
#include "cuda/sm90a/tensor_map.cuh"
#include "cuda/sm90a/transposition.cuh"
#include "cuda/sm90a/weight_division.cuh"
#include "cuda/sm90a/weight_sums.cuh"

namespace cnn_ext::cuda {

// The tile of a block: rows x panels of channels. A step of the depth is kStepPixels, a row box some of the rows in one.
template <class T, int rows, int panels, int panel_channels, int step_pixels>
struct WeightTile {
  using Element = T;
  static constexpr int kRows = rows, kPanels = panels, kPanelChannels = panel_channels, kStepPixels = step_pixels;
  static constexpr int kCols = panels * panel_channels;
  static constexpr int kRowBox = 128 / static_cast<int>(sizeof(T)), kRowBoxBytes = step_pixels * 128;
  static constexpr int kRowBoxes = rows / kRowBox, kRowTileBytes = kRowBoxes * kRowBoxBytes;
  static constexpr int kPanelRowBytes = panel_channels * static_cast<int>(sizeof(T)), kPanelBytes = step_pixels * kPanelRowBytes;
  static constexpr int kParts = kRowBoxes + panels;  // that the copy engine is asked for
  static constexpr int kStageBytes = kRowTileBytes + panels * kPanelBytes;
  // Spreads the rows that a warp writes at once over the banks: in 16 bits neighbours, in TF32 every second one.
  static constexpr int kSumPitch = kCols + (sizeof(T) == 2 ? 8 : 4);
  static constexpr int kSumBytes = rows * kSumPitch * static_cast<int>(sizeof(float));
};

struct WeightBlock {
  int first_row, last_row, group_channel, first_panel;  // last_row: of the group, whose input channels begin at group_channel
  int begin, end;                                       // of the pixels
};

// The lines of a tile's sums that a block of a cluster finishes.
struct WeightLines {
  int first, last;
};

// Fetches steps of both operands, which have parts: boxes of the rows, then the panels. A warp has every eighth one, and works out once
// what the steps have in common: all others wait for a warp that is late.
template <class Tile>
class StepFetcher {
 public:
  using Problem = WeightProblem<typename Tile::Element>;

  __device__ StepFetcher(const Problem& p, const WeightBlock& b) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int part = part_of(i), panel = b.first_panel + part - Tile::kRowBoxes;
      // A panel beyond the last one reads channels that do not exist, from a whole number of panels on: beginning at channel 33 of 33 the
      // copy engine ended with an illegal instruction.
      const bool exists = panel < p.panels;
      const Panel at = panel_at(p, exists && part >= Tile::kRowBoxes ? panel : 0, Tile::kPanelChannels);
      const int beyond = p.g.groups * p.panels_of_tap * Tile::kPanelChannels;
      channel_[i] = part < Tile::kRowBoxes ? b.first_row + part * Tile::kRowBox : exists ? b.group_channel + at.first_channel : beyond;
      tap_h_[i] = static_cast<uint16_t>(at.r * p.g.dilation_h), tap_w_[i] = static_cast<uint16_t>(at.s * p.g.dilation_w);
    }
  }

  // All threads come here. Announces and fetches the step from `pixel` on.
  __device__ void fetch(const Problem& p, unsigned char* stage, uint64_t* barrier, int pixel) const {
    if (threadIdx.x == 0) announce(barrier, Tile::kStageBytes);
    if (threadIdx.x % 32 > 0) return;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int part = part_of(i);
      if (part >= Tile::kParts) return;
      if (part < Tile::kRowBoxes) {
        fetch_box(stage + part * Tile::kRowBoxBytes, p.grad_output_map, channel_[i], pixel, 0, 0, barrier);
        continue;
      }
      const PlaneIndex out = p.pixel_decoder.at(pixel);
      fetch_windows(stage + Tile::kRowTileBytes + (part - Tile::kRowBoxes) * Tile::kPanelBytes, p.input_map, channel_[i],
                    out.w * p.g.stride_w - p.g.pad_left, out.h * p.g.stride_h - p.g.pad_top, out.outer, tap_w_[i], tap_h_[i], barrier);
    }
  }

 private:
  static constexpr int kWarps = kBlockThreads / 32, kShare = (Tile::kParts + kWarps - 1) / kWarps;
  __device__ static int part_of(int i) { return static_cast<int>(threadIdx.x) / 32 + i * kWarps; }

  int channel_[kShare];
  uint16_t tap_h_[kShare], tap_w_[kShare];
};

// Replaces every sum that is NaN by that of the products that exist.
template <class Tile>
__device__ __noinline__ void add_up_again(const WeightProblem<typename Tile::Element>& p, WeightBlock b, WeightLines lines, float* sums) {
  for (int index = lines.first * Tile::kCols + threadIdx.x; index < lines.last * Tile::kCols; index += kBlockThreads) {
    const int k = b.first_row + index / Tile::kCols, col = index % Tile::kCols;
    const Panel panel = panel_at(p, b.first_panel + col / Tile::kPanelChannels, Tile::kPanelChannels);
    const int channel = panel.first_channel + col % Tile::kPanelChannels;
    float* sum = sums + index / Tile::kCols * Tile::kSumPitch + col;
    if (!isnan(*sum) || k >= b.last_row || channel >= p.g.group_in) continue;
    float exact = 0;
    for (int pixel = b.begin; pixel < b.end; ++pixel) {
      const PlaneIndex at = p.pixel_decoder.at(pixel);
      for (int i = 0; i < p.rectangle.lines * p.rectangle.width; ++i) {
        const int out_h = at.h * p.rectangle.lines + i / p.rectangle.width, out_w = at.w * p.rectangle.width + i % p.rectangle.width;
        const int h = out_h * p.g.stride_h - p.g.pad_top + panel.r * p.g.dilation_h;
        const int w = out_w * p.g.stride_w - p.g.pad_left + panel.s * p.g.dilation_w;
        if (out_h >= p.g.out_h || h < 0 || h >= p.g.in_h || w < 0 || w >= p.g.in_w) continue;
        const auto* grad_output = p.grad_output + k * p.out.c + at.outer * p.out.n + out_h * p.out.h + out_w * p.out.w;
        const auto* input = p.input + (b.group_channel + channel) * p.in.c + at.outer * p.in.n + h * p.in.h + w * p.in.w;
        exact = fmaf(widen(*grad_output), widen(*input), exact);
      }
    }
    *sum = exact;
  }
}

// This thread's sums of one warpgroup product, whose first lies at `corner` of a tile in shared memory. kNextRow: from the row of its first
// two sums to that of the other two. Whether there is a NaN among them.
template <class Tile, int kNextRow, int kCount>
__device__ bool write_sums(const float (&sums)[kCount], float* corner) {
  bool meets_nan = false;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    float* pair = corner + i % 4 / 2 * kNextRow * Tile::kSumPitch + i / 4 * 8;
    *reinterpret_cast<float2*>(pair) = make_float2(sums[i], sums[i + 1]);
    meets_nan |= isnan(sums[i]) | isnan(sums[i + 1]);
  }
  return meets_nan;
}

// Adds what another warpgroup has written there.
template <class Tile, int kNextRow, int kCount>
__device__ void add_sums(float (&sums)[kCount], const float* corner) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const float2 pair = *reinterpret_cast<const float2*>(corner + i % 4 / 2 * kNextRow * Tile::kSumPitch + i / 4 * 8);
    sums[i] += pair.x, sums[i + 1] += pair.y;
  }
}

// Shared memory -> this cluster's partial sums, or the result. A thread has four columns of every few lines.
template <class Tile>
__device__ void store_lines(const WeightProblem<typename Tile::Element>& p, const WeightBlock& b, int cluster, WeightLines lines,
                            const float* sums) {
  constexpr int kQuads = Tile::kCols / 4, kLinesAtOnce = kBlockThreads / kQuads;
  const int col = threadIdx.x % kQuads * 4, share = threadIdx.x / kQuads, panel = b.first_panel + col / Tile::kPanelChannels;
  if (share >= kLinesAtOnce || panel >= p.panels) return;
  const int last = smaller(lines.last, b.last_row - b.first_row);
  const auto for_lines = [&](const auto& store) {
#pragma unroll 4
    for (int line = lines.first + share; line < last; line += kLinesAtOnce) {
      store(b.first_row + line, *reinterpret_cast<const float4*>(sums + line * Tile::kSumPitch + col));
    }
  };
  if (p.partials != nullptr) {
    const int64_t line_sums = static_cast<int64_t>(p.panels) * Tile::kPanelChannels;
    float* target = p.partials + cluster * p.g.groups * p.g.group_out * line_sums + b.first_panel * Tile::kPanelChannels + col;
    return for_lines([&](int k, const float4& quad) { *reinterpret_cast<float4*>(target + k * line_sums) = quad; });
  }
  const Panel at = panel_at(p, panel, Tile::kPanelChannels);
  const int channel = at.first_channel + col % Tile::kPanelChannels;
  for_lines([&](int k, const float4& quad) { store_quad(p, k, at, channel, quad); });
}

// Gemm offers
//   Tile, kBlocks                          its tile, and how many blocks share a multiprocessor
//   kOwnBytes                              of shared memory in front of the stages or behind them
//   Gemm(problem, block)
//   accumulate(shared, barriers)           sums up the products of the block's pixels; afterwards shared memory is free
//   bool write(sums)                       registers -> shared memory; whether there is a NaN among this thread's sums
//
// Blocks are numbered by place in their cluster, row tile, column tile, cluster: those that read the same pixels run together.
template <class Gemm>
__global__ void __launch_bounds__(kBlockThreads, Gemm::kBlocks)
    backward_weight_wgmma(const __grid_constant__ WeightProblem<typename Gemm::Tile::Element> p) {
  using Tile = typename Gemm::Tile;
  __shared__ __align__(8) uint64_t barriers[kMostStages];
  if (threadIdx.x == 0) {
    prefetch_map(p.grad_output_map);
    prefetch_map(p.input_map);
  }
  init_pipeline(barriers, p.stages);
  const int place = blockIdx.x % p.cluster_blocks, tile = blockIdx.x / p.cluster_blocks, row_tiles = p.group_row_tiles * p.g.groups;
  const int row_tile = tile % row_tiles, group = row_tile / p.group_row_tiles, first_row_tile = group * p.group_row_tiles;
  const int rest = tile / row_tiles, col_tile = rest % p.col_tiles, cluster = rest / p.col_tiles;
  const int first_split = cluster * p.cluster_blocks, split = first_split + place;
  WeightBlock b{group * p.g.group_out + (row_tile - first_row_tile) * Tile::kRows,
                (group + 1) * p.g.group_out,
                group * p.g.group_in,
                col_tile * Tile::kPanels,
                split * p.split_pixels,
                smaller(p.pixels, (split + 1) * p.split_pixels)};
  unsigned char* shared = dynamic_shared<unsigned char>();
  float* sums = reinterpret_cast<float*>(shared);
  wait_for_launch_before();
  bool meets_nan;
  {
    Gemm gemm(p, b);
    gemm.accumulate(shared, barriers);
    meets_nan = gemm.write(sums);
  }
  WeightLines lines{0, Tile::kRows};
  if (p.cluster_blocks > 1) {
    cluster_barrier();
    const int share = Tile::kRows / p.cluster_blocks;
    lines = {place * share, (place + 1) * share};
    constexpr int kQuads = Tile::kCols / 4;
    meets_nan = add_up_cluster(p.cluster_blocks, share * kQuads,
                               [&](int quad) { return sums + (lines.first + quad / kQuads) * Tile::kSumPitch + quad % kQuads * 4; });
    b.begin = first_split * p.split_pixels, b.end = smaller(p.pixels, (first_split + p.cluster_blocks) * p.split_pixels);
  }
  if (__syncthreads_or(meets_nan)) {
    add_up_again<Tile>(p, b, lines, sums);
    __syncthreads();
  }
  store_lines<Tile>(p, b, cluster, lines, sums);
  if (p.cluster_blocks > 1) cluster_barrier();  // the others read this block's shared memory
}

// step_cycles: that a step takes a block, once its operands are there.
template <class Gemm>
constexpr WeightTileSizes tile_sizes(int64_t step_cycles) {
  using Tile = typename Gemm::Tile;
  return {Tile::kRows, Tile::kPanels, Tile::kPanelChannels, Tile::kStepPixels, Tile::kStageBytes, Gemm::kBlocks, step_cycles};
}

struct WeightOperand {
  const void* data;
  Strides strides;
};

// All of a problem but its maps and stages.
template <class T>
WeightProblem<T> weight_problem(const Conv2dShape& s, const WeightDivision& d, const WeightOperand& input, const WeightOperand& grad_output,
                                void* partials, void* grad_weight) {
  const Conv2dGeometry g(s);
  if (!is_aligned(input.data) || !is_aligned(grad_output.data)) {
    throw std::invalid_argument("this kernel wants tensors aligned to 16 bytes");
  }
  return {{},
          {},
          static_cast<const T*>(grad_output.data),
          static_cast<const T*>(input.data),
          d.partial_bytes > 0 ? static_cast<float*>(partials) : nullptr,
          static_cast<T*>(grad_weight),
          g,
          input.strides,
          grad_output.strides,
          static_cast<int>(d.panels_of_tap),
          static_cast<int>(d.panels),
          static_cast<int>(pixels_of(s)),
          static_cast<int>(d.splits.size),
          static_cast<int>(d.row_tiles / s.groups),
          static_cast<int>(d.col_tiles),
          static_cast<int>(d.splits.clusters),
          static_cast<int>(d.splits.cluster_blocks),
          0,
          FastDivisor(static_cast<int>(d.panels_of_tap)),
          FastDivisor(g.kernel_w),
          g.filter.c == 1 && g.group_in % 4 == 0 && reinterpret_cast<uintptr_t>(grad_weight) % (4 * sizeof(T)) == 0,
          PlaneDecoder(g.out_h, g.out_w),
          {1, 1, 1, 1, 1, 0}};
}

// The sums, and where there are several clusters, theirs.
template <class Gemm>
void launch_weight_tile(WeightProblem<typename Gemm::Tile::Element>& problem, const WeightDivision& d, cudaStream_t stream) {
  using Tile = typename Gemm::Tile;
  const int stage_bytes = static_cast<int>(d.tile.stage_bytes);
  problem.stages = pipeline_stages(stage_bytes, Gemm::kBlocks == 2 && d.blocks() > blocks_at_once(problem.cluster_blocks), Gemm::kOwnBytes);
  launch(backward_weight_wgmma<Gemm>,
         overlapping(Grid(d.blocks(), kBlockThreads, std::max(Gemm::kOwnBytes + problem.stages * stage_bytes, Tile::kSumBytes),
                          problem.cluster_blocks)),
         stream, problem);
  if (problem.partials != nullptr) launch_cluster_sums<typename Tile::Element, Tile::kPanelChannels>(problem, d, stream);
}

// A problem with channels innermost, where they are put first if they are not.
template <class T>
WeightProblem<T> staged_weight_problem(const Conv2dShape& s, const Conv2dBuffers& b, const WeightDivision& d, void* workspace,
                                       cudaStream_t stream) {
  auto* staged_input = static_cast<unsigned char*>(workspace);
  auto* staged_grad = staged_input + d.input_bytes;
  const Copy<T> input_copy{channels_innermost(s.layout, s.batch, s.in_channels, d.padded_in, s.in_h * s.in_w),
                           static_cast<const T*>(b.input), reinterpret_cast<T*>(staged_input)};
  const Copy<T> grad_copy{channels_innermost(s.layout, s.batch, s.out_channels, d.padded_out, s.out_h * s.out_w),
                          static_cast<const T*>(b.grad_output), reinterpret_cast<T*>(staged_grad)};
  launch_copies(d.stages_input ? &input_copy : nullptr, d.stages_grad ? &grad_copy : nullptr, stream);
  const WeightOperand input{d.stages_input ? staged_input : b.input, strides_of(Layout::nhwc, d.padded_in, s.in_h, s.in_w)};
  const WeightOperand grad_output{d.stages_grad ? staged_grad : b.grad_output, strides_of(Layout::nhwc, d.padded_out, s.out_h, s.out_w)};
  return weight_problem<T>(s, d, input, grad_output, staged_grad + d.grad_bytes, b.grad_weight);
}

template <class Gemm>
void run_weight_tile(const Conv2dShape& s, const Conv2dBuffers& b, const WeightDivision& d, void* workspace, cudaStream_t stream) {
  using Tile = typename Gemm::Tile;
  using T = typename Tile::Element;
  auto problem = staged_weight_problem<T>(s, b, d, workspace, stream);
  const Conv2dGeometry& g = problem.g;
  const int64_t pixels = pixels_of(s);
  const TensorAxes out_axes{{s.out_channels, pixels, 1, 1}, {d.padded_out, d.padded_out * pixels, d.padded_out * pixels}};
  problem.grad_output_map = tile_map<T>(problem.grad_output, out_axes, {Tile::kRowBox, Tile::kStepPixels, 1, 1});
  const TensorAxes in_axes{{s.in_channels, s.in_w, s.in_h, s.batch}, {problem.in.w, problem.in.h, problem.in.n}};
  problem.input_map = window_map<T>(problem.input, in_axes, {-g.pad_top, g.stride_h, g.out_h}, {-g.pad_left, g.stride_w, g.out_w},
                                    Tile::kPanelChannels, Tile::kStepPixels);
  launch_weight_tile<Gemm>(problem, d, stream);
}

}  // namespace cnn_ext::cuda
