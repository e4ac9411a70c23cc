// What backward_weight on the matrix unit of sm_90a is in every type:
//   grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw].
// Rows of the product are output channels, columns the weights (r, s, c) in panels of some channels of one tap, the depth runs over the
// pixels (n, oh, ow).
//
// Operands: the copy engine fetches boxes of both tensors, pixels x channels, padding as zeros, to shared memory. How they get from there
// to the matrix unit is the Gemm's affair. Tensors whose channels do not lie innermost in whole chunks of 16 bytes are put in that order by
// a launch of its own first (transposition.cuh).
//
// There are few tiles and a long depth: the pixels are split among blocks, and a second launch adds up the partial sums in order. The
// splits follow from the shape alone, so that every run has the same bits. With one split the tile is stored at once.
//
// Padding never multiplies: see gather_wgmma.cuh. Not handled: float64; groups; strides above 8, padding of more than 128, windows of more
// than 256.
#pragma once

#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/sm90a/overlap.cuh"
#include "cuda/sm90a/pipeline.cuh"
#include "cuda/sm90a/tensor_map.cuh"
#include "cuda/sm90a/transposition.cuh"

namespace cnn_ext::cuda {

// The tile of a block: rows x panels of channels. A step of the depth is kStepPixels, a row box some of the rows in one.
template <class T, int rows, int panels, int panel_channels, int step_pixels>
struct WeightTile {
  using Element = T;
  static constexpr int kRows = rows, kPanels = panels, kPanelChannels = panel_channels, kStepPixels = step_pixels;
  static constexpr int kCols = panels * panel_channels;
  static constexpr int kRowBox = 128 / static_cast<int>(sizeof(T)), kRowBoxBytes = step_pixels * 128;
  static constexpr int kRowTileBytes = rows / kRowBox * kRowBoxBytes;
  static constexpr int kPanelRowBytes = panel_channels * static_cast<int>(sizeof(T)), kPanelBytes = step_pixels * kPanelRowBytes;
  static constexpr int kStageBytes = kRowTileBytes + panels * kPanelBytes;
  static constexpr int kSumPitch = kCols + 4;
  static constexpr int kSumBytes = rows * kSumPitch * static_cast<int>(sizeof(float));
};

template <class T>
struct WeightProblem {
  CUtensorMap grad_output_map, input_map;
  const T* grad_output;
  const T* input;
  float* partials;  // [split][output channel][tap][channel, of whole panels]; null: one split, stored at once
  T* grad_weight;
  Conv2dGeometry g;
  Strides in;
  int64_t out_pixel;  // from one pixel of grad_output to the next
  int panels_of_tap, panels, pixels, split_pixels;
  int row_tiles, col_tiles, splits, stages;
  FastDivisor tap_decoder, width_decoder;
  PlaneDecoder pixel_decoder;
};

// A panel of the columns: some channels of one tap.
struct Panel {
  int first_channel, r, s;
};

template <class T>
__device__ Panel panel_at(const WeightProblem<T>& p, int panel, int panel_channels) {
  const int tap = p.tap_decoder.quotient(panel), r = p.width_decoder.quotient(tap);
  return {(panel - tap * p.panels_of_tap) * panel_channels, r, tap - r * p.g.kernel_w};
}

struct WeightBlock {
  int first_row, first_panel, begin, end;  // end: of the pixels
};

// Announces and fetches one step of both operands: boxes of the rows, then the panels.
template <class Tile>
__device__ void fetch_step(const WeightProblem<typename Tile::Element>& p, const WeightBlock& b, unsigned char* stage, uint64_t* barrier,
                           int pixel) {
  announce(barrier, Tile::kStageBytes);
#pragma unroll
  for (int i = 0; i < Tile::kRows / Tile::kRowBox; ++i) {
    fetch_box(stage + i * Tile::kRowBoxBytes, p.grad_output_map, b.first_row + i * Tile::kRowBox, pixel, 0, 0, barrier);
  }
  const PlaneIndex out = p.pixel_decoder.at(pixel);
#pragma unroll
  for (int i = 0; i < Tile::kPanels; ++i) {
    // A panel beyond the last one reads channels that do not exist.
    const bool exists = b.first_panel + i < p.panels;
    const Panel panel = panel_at(p, exists ? b.first_panel + i : 0, Tile::kPanelChannels);
    fetch_windows(stage + Tile::kRowTileBytes + i * Tile::kPanelBytes, p.input_map,
                  exists ? panel.first_channel : p.panels_of_tap * Tile::kPanelChannels, out.w * p.g.stride_w - p.g.pad_left,
                  out.h * p.g.stride_h - p.g.pad_top, out.outer, panel.s * p.g.dilation_w, panel.r * p.g.dilation_h, barrier);
  }
}

// Replaces every sum that is NaN by that of the products that exist.
template <class Tile>
__device__ __noinline__ void add_up_again(const WeightProblem<typename Tile::Element>& p, WeightBlock b, float* sums) {
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kCols; index += kBlockThreads) {
    const int k = b.first_row + index / Tile::kCols, col = index % Tile::kCols;
    const Panel panel = panel_at(p, b.first_panel + col / Tile::kPanelChannels, Tile::kPanelChannels);
    const int channel = panel.first_channel + col % Tile::kPanelChannels;
    float* sum = sums + index / Tile::kCols * Tile::kSumPitch + col;
    if (!isnan(*sum) || k >= p.g.group_out || channel >= p.g.group_in) continue;
    float exact = 0;
    for (int pixel = b.begin; pixel < b.end; ++pixel) {
      const PlaneIndex out = p.pixel_decoder.at(pixel);
      const int h = out.h * p.g.stride_h - p.g.pad_top + panel.r * p.g.dilation_h;
      const int w = out.w * p.g.stride_w - p.g.pad_left + panel.s * p.g.dilation_w;
      if (h < 0 || h >= p.g.in_h || w < 0 || w >= p.g.in_w) continue;
      const auto* input = p.input + channel + out.outer * p.in.n + h * p.in.h + w * p.in.w;
      exact = fmaf(widen(p.grad_output[k + pixel * p.out_pixel]), widen(*input), exact);
    }
    *sum = exact;
  }
}

template <class T>
__device__ void store_weight(const WeightProblem<T>& p, int k, const Panel& panel, int channel, float sum) {
  p.grad_weight[k * p.g.filter.n + channel * p.g.filter.c + panel.r * p.g.filter.h + panel.s * p.g.filter.w] = narrow<T>(sum);
}

// Shared memory -> this split's partial sums, or the result.
template <class Tile>
__device__ void store_tile(const WeightProblem<typename Tile::Element>& p, const WeightBlock& b, int split, const float* sums) {
  const int64_t line = static_cast<int64_t>(p.panels) * Tile::kPanelChannels;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kCols; i += kBlockThreads) {
    const int k = b.first_row + i / Tile::kCols, col = i % Tile::kCols, panel = b.first_panel + col / Tile::kPanelChannels;
    if (k >= p.g.group_out || panel >= p.panels) continue;
    const float sum = sums[i / Tile::kCols * Tile::kSumPitch + col];
    if (p.partials != nullptr) {
      p.partials[(static_cast<int64_t>(split) * p.g.group_out + k) * line + b.first_panel * Tile::kPanelChannels + col] = sum;
      continue;
    }
    const Panel at = panel_at(p, panel, Tile::kPanelChannels);
    const int channel = at.first_channel + col % Tile::kPanelChannels;
    if (channel < p.g.group_in) store_weight(p, k, at, channel, sum);
  }
}

// Gemm offers
//   Tile, kBlocks                          its tile, and how many blocks share a multiprocessor
//   kOwnBytes                              of shared memory in front of the stages
//   Gemm(problem, block)
//   accumulate(shared, barriers)           sums up the products of the block's pixels; afterwards shared memory is free
//   bool write(sums)                       registers -> shared memory; whether there is a NaN among this thread's sums
//
// Blocks are numbered by row tile, column tile, split: those that read the same pixels run together.
template <class Gemm>
__global__ void __launch_bounds__(kBlockThreads, Gemm::kBlocks)
    backward_weight_wgmma(const __grid_constant__ WeightProblem<typename Gemm::Tile::Element> p) {
  using Tile = typename Gemm::Tile;
  __shared__ __align__(8) uint64_t barriers[kMostStages];
  init_pipeline(barriers, p.stages);
  const int row_tile = blockIdx.x % p.row_tiles, rest = blockIdx.x / p.row_tiles;
  const int col_tile = rest % p.col_tiles, split = rest / p.col_tiles;
  const WeightBlock b{row_tile * Tile::kRows, col_tile * Tile::kPanels, split * p.split_pixels,
                      smaller(p.pixels, (split + 1) * p.split_pixels)};
  Gemm gemm(p, b);
  unsigned char* shared = dynamic_shared<unsigned char>();
  wait_for_launch_before();
  gemm.accumulate(shared, barriers);
  float* sums = reinterpret_cast<float*>(shared);
  if (__syncthreads_or(gemm.write(sums))) {
    add_up_again<Tile>(p, b, sums);
    __syncthreads();
  }
  store_tile<Tile>(p, b, split, sums);
}

// A few threads to a sum share its splits where there are many (sum_lanes).
template <class T, int kPanelChannels>
__global__ void __launch_bounds__(kBlockThreads) sum_splits(const __grid_constant__ WeightProblem<T> p, int64_t sums, int lanes) {
  __shared__ float shares[kBlockThreads];
  const int width = kBlockThreads / lanes, lane = static_cast<int>(threadIdx.x) / width;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * width + threadIdx.x % width;
  wait_for_launch_before();
  float sum = 0;
  if (index < sums) {
#pragma unroll 8
    for (int split = lane; split < p.splits; split += lanes) sum += p.partials[split * sums + index];
  }
  shares[threadIdx.x] = sum;
  __syncthreads();
  if (lane > 0 || index >= sums) return;
  const int line = p.panels * kPanelChannels;
  const int k = static_cast<int>(index / line), col = static_cast<int>(index % line);
  const Panel panel = panel_at(p, col / kPanelChannels, kPanelChannels);
  const int channel = panel.first_channel + col % kPanelChannels;
  if (channel >= p.g.group_in) return;
  for (int other = 1; other < lanes; ++other) sum += shares[other * width + threadIdx.x];
  store_weight(p, k, panel, channel, sum);
}

// A tile as the host sees it.
struct WeightTileSizes {
  int64_t rows, panels, panel_channels, step_pixels, blocks;  // blocks: that share a multiprocessor
};

template <class Gemm>
constexpr WeightTileSizes tile_sizes() {
  using Tile = typename Gemm::Tile;
  return {Tile::kRows, Tile::kPanels, Tile::kPanelChannels, Tile::kStepPixels, Gemm::kBlocks};
}

// What the host works out of a shape.
struct WeightDivision {
  WeightDivision(const Conv2dShape& s, const WeightTileSizes& sizes)
      : tile(sizes),
        element_bytes(s.dtype == DType::float32 ? 4 : 2),
        panels_of_tap(ceil_div(s.in_channels, tile.panel_channels)),
        panels(panels_of_tap * s.kernel_h * s.kernel_w),
        row_tiles(ceil_div(s.out_channels, tile.rows)),
        col_tiles(ceil_div(panels, tile.panels)),
        sums(s.out_channels * panels * tile.panel_channels),
        splits(split(pixels_of(s))),
        padded_in(whole_chunks(s.in_channels)),
        padded_out(whole_chunks(s.out_channels)),
        stages_input((s.layout == Layout::nchw && s.in_h * s.in_w > 1) || padded_in != s.in_channels),
        stages_grad((s.layout == Layout::nchw && s.out_h * s.out_w > 1) || padded_out != s.out_channels),
        input_bytes(stages_input ? aligned(s.batch * s.in_h * s.in_w * padded_in * element_bytes) : 0),
        grad_bytes(stages_grad ? aligned(s.batch * s.out_h * s.out_w * padded_out * element_bytes) : 0),
        partial_bytes(splits.count > 1 ? static_cast<int64_t>(sizeof(float)) * splits.count * sums : 0) {}

  static int64_t aligned(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }
  int64_t whole_chunks(int64_t channels) const {
    return ceil_div(channels * element_bytes, int64_t{kChunkBytes}) * kChunkBytes / element_bytes;
  }

  // As many blocks as 132 multiprocessors run at once, but at least eight steps to a split and at most 2^24 partial sums in all.
  Splits split(int64_t pixels) const {
    constexpr int64_t kLeastSteps = 8;
    if (pixels == 0 || sums == 0) return {1, tile.step_pixels};
    const int64_t tiles = std::max<int64_t>(row_tiles * col_tiles, 1);
    const int64_t wanted = std::max<int64_t>(
        1, std::min({tile.blocks * kMultiprocessors / tiles, ceil_div(pixels, kLeastSteps * tile.step_pixels), kMostPartials / sums}));
    const int64_t size = ceil_div(ceil_div(pixels, wanted), tile.step_pixels) * tile.step_pixels;
    return {ceil_div(pixels, size), size};
  }

  int64_t blocks() const { return row_tiles * col_tiles * splits.count; }
  Plan plan() const {
    return {tile.rows, tile.panels * tile.panel_channels, blocks(), static_cast<size_t>(input_bytes + grad_bytes + partial_bytes)};
  }

  WeightTileSizes tile;
  int64_t element_bytes, panels_of_tap, panels, row_tiles, col_tiles, sums;
  Splits splits;
  int64_t padded_in, padded_out;
  bool stages_input, stages_grad;
  int64_t input_bytes, grad_bytes, partial_bytes;  // of the workspace
};

inline bool suits_weight_wgmma(const Conv2dShape& s) {
  const WindowAxis h{-static_cast<int>(s.pad_top), static_cast<int>(s.stride_h), static_cast<int>(s.out_h)};
  const WindowAxis w{-static_cast<int>(s.pad_left), static_cast<int>(s.stride_w), static_cast<int>(s.out_w)};
  return s.padding_mode == PaddingMode::zeros && s.groups == 1 && s.batch > 0 && suits_mma(s) &&
         fits_copy_engine(h, static_cast<int>(s.in_h), static_cast<int>((s.kernel_h - 1) * s.dilation_h)) &&
         fits_copy_engine(w, static_cast<int>(s.in_w), static_cast<int>((s.kernel_w - 1) * s.dilation_w));
}

// Puts channels innermost where they are not, and describes both tensors to the copy engine.
template <class Tile>
WeightProblem<typename Tile::Element> weight_problem(const Conv2dShape& s, const Conv2dBuffers& b, const WeightDivision& d, void* workspace,
                                                     cudaStream_t stream) {
  using T = typename Tile::Element;
  const Conv2dGeometry g(s);
  auto* staged_input = static_cast<unsigned char*>(workspace);
  auto* staged_grad = staged_input + d.input_bytes;
  if (d.stages_input) {
    launch_transposition<T>(channels_innermost(s.layout, s.batch, s.in_channels, d.padded_in, s.in_h * s.in_w), b.input, staged_input,
                            stream);
  }
  if (d.stages_grad) {
    launch_transposition<T>(channels_innermost(s.layout, s.batch, s.out_channels, d.padded_out, s.out_h * s.out_w), b.grad_output,
                            staged_grad, stream);
  }
  const int64_t pixels = pixels_of(s);
  WeightProblem<T> p{{},
                     {},
                     static_cast<const T*>(d.stages_grad ? staged_grad : b.grad_output),
                     static_cast<const T*>(d.stages_input ? staged_input : b.input),
                     d.splits.count > 1 ? reinterpret_cast<float*>(staged_grad + d.grad_bytes) : nullptr,
                     static_cast<T*>(b.grad_weight),
                     g,
                     strides_of(Layout::nhwc, d.padded_in, s.in_h, s.in_w),
                     d.padded_out,
                     static_cast<int>(d.panels_of_tap),
                     static_cast<int>(d.panels),
                     static_cast<int>(pixels),
                     static_cast<int>(d.splits.size),
                     static_cast<int>(d.row_tiles),
                     static_cast<int>(d.col_tiles),
                     static_cast<int>(d.splits.count),
                     0,
                     FastDivisor(static_cast<int>(d.panels_of_tap)),
                     FastDivisor(g.kernel_w),
                     PlaneDecoder(g.out_h, g.out_w)};
  if (!is_aligned(p.grad_output) || !is_aligned(p.input)) throw std::invalid_argument("this kernel wants tensors aligned to 16 bytes");
  const TensorAxes out_axes{{s.out_channels, pixels, 1, 1}, {d.padded_out, d.padded_out * pixels, d.padded_out * pixels}};
  p.grad_output_map = tile_map<T>(p.grad_output, out_axes, {Tile::kRowBox, Tile::kStepPixels, 1, 1});
  const TensorAxes in_axes{{s.in_channels, s.in_w, s.in_h, s.batch}, {p.in.w, p.in.h, p.in.n}};
  p.input_map = window_map<T>(p.input, in_axes, {-g.pad_top, g.stride_h, g.out_h}, {-g.pad_left, g.stride_w, g.out_w}, Tile::kPanelChannels,
                              Tile::kStepPixels);
  return p;
}

// All launches. two_blocks: whether two share the memory of a multiprocessor.
template <class Gemm>
void run_weight_tile(const Conv2dShape& s, const Conv2dBuffers& b, const WeightDivision& d, bool two_blocks, void* workspace,
                     cudaStream_t stream) {
  using Tile = typename Gemm::Tile;
  auto problem = weight_problem<Tile>(s, b, d, workspace, stream);
  problem.stages = pipeline_stages(Tile::kStageBytes, two_blocks, Gemm::kOwnBytes);
  launch(backward_weight_wgmma<Gemm>,
         overlapping(Grid(d.blocks(), kBlockThreads, std::max(Gemm::kOwnBytes + problem.stages * Tile::kStageBytes, Tile::kSumBytes))),
         stream, problem);
  if (d.splits.count == 1) return;
  const int lanes = sum_lanes(d.splits);
  launch(sum_splits<typename Tile::Element, Tile::kPanelChannels>, overlapping(Grid(ceil_div<int64_t>(d.sums, kBlockThreads / lanes))),
         stream, problem, d.sums, lanes);
}

}  // namespace cnn_ext::cuda
