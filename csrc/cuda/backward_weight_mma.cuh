// backward_weight on tensor cores. Rows of the product are weights (r, s, c), with the channels padded to whole chunks, columns the output
// channels of a group, depth the pixels (n, oh, ow): both operands lie across the depth. There are few tiles and a long depth, so the
// pixels are split among blocks and the partial sums added up by a second launch (pixel_reduction.cuh).
#pragma once

#include <type_traits>

#include "cuda/chunk_loaders.cuh"
#include "cuda/limits.h"
#include "cuda/mma_gemm.cuh"
#include "cuda/pixel_reduction.cuh"

namespace cnn_ext::cuda {

constexpr int kSplitMultiple = 32;  // whole steps of the depth in every type

template <class Tile, class T>
struct InputChunks {
  using Element = T;
  static constexpr bool kAlongDepth = false;

  __device__ Place at_extent(int row) const {
    const int weight = Tile::row_member(row), group = Tile::row_group(row);
    if (weight >= weights || !Tile::has_group(group, groups)) return {0, kNowhere, 0, 0};
    const Tap tap = tap_decoder.at(weight);
    const int h = tap.r * g.dilation_h - g.pad_top, w = tap.s * g.dilation_w - g.pad_left;
    return {(group * g.group_in + tap.channel) * g.in.c + h * g.in.h + w * g.in.w, h, w, g.group_in - tap.channel};
  }
  __device__ Place at_depth(int pixel) const {
    if (pixel >= pixels_end) return {0, kNowhere, 0, 0};
    const PlaneIndex p = pixel_decoder.at(pixel);
    const int h = p.h * g.stride_h, w = p.w * g.stride_w;
    return {p.outer * g.in.n + h * g.in.h + w * g.in.w, h, w, 0};
  }

  const T* data;
  int channel_stride;
  int height, width;
  const Conv2dGeometry& g;
  int groups, weights, pixels_end;
  const TapDecoder<Layout::nhwc>& tap_decoder;
  const PlaneDecoder& pixel_decoder;
};

template <class Tile, class T>
struct GradOutputChunks {
  using Element = T;
  static constexpr bool kAlongDepth = false;
  static constexpr int height = 1, width = 1;

  __device__ Place at_extent(int col) const {
    const int k = Tile::col_member(col), group = Tile::col_group(col);
    if (k >= g.group_out || !Tile::has_group(group, groups)) return {0, kNowhere, 0, 0};
    return {(group * g.group_out + k) * g.out.c, 0, 0, g.group_out - k};
  }
  __device__ Place at_depth(int pixel) const {
    if (pixel >= pixels_end) return {0, kNowhere, 0, 0};
    const PlaneIndex p = pixel_decoder.at(pixel);
    return {p.outer * g.out.n + p.h * g.out.h + p.w * g.out.w, 0, 0, 0};
  }

  const T* data;
  int channel_stride;
  const Conv2dGeometry& g;
  int groups, pixels_end;
  const PlaneDecoder& pixel_decoder;
};

template <class Tile, class Sum>
struct PartialStore {
  static constexpr bool kChunks = false;

  __device__ bool along_rows() const { return true; }
  __device__ void store(int row, int col, const Sum* sum) const {
    const int weight = Tile::row_member(row), k = Tile::col_member(col), group = Tile::col_group(col);
    if (weight >= weights || k >= g.group_out || !Tile::has_group(group, groups)) return;
    const Tap tap = tap_decoder.at(weight);
    if (tap.channel >= g.group_in) return;
    partials[(group * g.group_out + k) * g.filter.n + tap.channel * g.filter.c + tap.r * g.filter.h + tap.s * g.filter.w] = *sum;
  }

  Sum* partials;  // of the first group: [weights in memory order]
  const Conv2dGeometry& g;
  int groups, weights;
  const TapDecoder<Layout::nhwc>& tap_decoder;
};

// The tensors, and the numbers that the host works out.
template <class T>
struct WeightProblem {
  WeightProblem(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace)
      : g(s),
        grad_output(static_cast<const T*>(b.grad_output)),
        input(static_cast<const T*>(b.input)),
        partials(static_cast<Accumulate<T>*>(workspace)),
        padded_channels(ceil_div(g.group_in, kChunk<T>) * kChunk<T>),
        weights(padded_channels * g.kernel_h * g.kernel_w),
        pixels(g.batch * g.out_h * g.out_w),
        tap_decoder(padded_channels, g.kernel_h, g.kernel_w),
        pixel_decoder(g.out_h, g.out_w) {}

  // Whether every chunk is 16 aligned bytes.
  bool has_vectors() const {
    return g.in.c == 1 && g.out.c == 1 && g.group_in % kChunk<T> == 0 && g.group_out % kChunk<T> == 0 && is_aligned(grad_output) &&
           is_aligned(input);
  }

  Conv2dGeometry g;
  const T* grad_output;
  const T* input;
  Accumulate<T>* partials;  // [splits][the weights in memory order]
  int padded_channels, weights, pixels;
  TapDecoder<Layout::nhwc> tap_decoder;
  PlaneDecoder pixel_decoder;
};

// Blocks are numbered by row tile, column tile, groups, split: those that read the same pixels run together.
template <class Tile, bool kVector, class T>
__global__ void __launch_bounds__(kBlockThreads, kMmaBlocks<Tile, T>)
    backward_weight_mma(WeightProblem<T> problem, int row_tiles, int col_tiles, int split_size) {
  const Conv2dGeometry& g = problem.g;
  const int row_tile = blockIdx.x % row_tiles, tiles = blockIdx.x / row_tiles;
  const int group_tiles = ceil_div(g.groups, Tile::kGroups);
  const int col_tile = tiles % col_tiles, group = tiles / col_tiles % group_tiles * Tile::kGroups, groups = g.groups - group;
  const int split = tiles / col_tiles / group_tiles;
  const int begin = split * split_size, end = smaller(problem.pixels, begin + split_size);

  using Input = InputChunks<Tile, T>;
  using GradOutput = GradOutputChunks<Tile, T>;
  const Input rows{problem.input + group * g.group_in * g.in.c,
                   static_cast<int>(g.in.c),
                   g.in_h,
                   g.in_w,
                   g,
                   groups,
                   problem.weights,
                   end,
                   problem.tap_decoder,
                   problem.pixel_decoder};
  const GradOutput cols{
      problem.grad_output + group * g.group_out * g.out.c, static_cast<int>(g.out.c), g, groups, end, problem.pixel_decoder};
  const PartialStore<Tile, Accumulate<T>> store{
      problem.partials + (static_cast<int64_t>(split) * g.groups + group) * g.group_out * g.filter.n, g, groups, problem.weights,
      problem.tap_decoder};

  using RowLoader = std::conditional_t<kVector, VectorLoader<Input, Tile::kRows>, ElementLoader<Input, Tile::kRows>>;
  using ColLoader = std::conditional_t<kVector, VectorLoader<GradOutput, Tile::kCols>, ElementLoader<GradOutput, Tile::kCols>>;
  MmaGemm<Tile, RowLoader, ColLoader> gemm(rows, cols, row_tile * Tile::kRows, col_tile * Tile::kCols, g.in.c == 1);
  gemm.run(begin, end, store);
}

inline int64_t weight_elements(const Conv2dShape& s) { return s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w; }

inline int64_t padded_weights(const Conv2dShape& s) {
  const int64_t chunk = s.dtype == DType::float64 ? kChunk<double> : s.dtype == DType::float32 ? kChunk<float> : kChunk<__half>;
  return ceil_div(s.in_channels / s.groups, chunk) * chunk * s.kernel_h * s.kernel_w;
}

// The tiles of all groups, and how the pixels are divided among blocks for each of them.
template <class Tile>
struct WeightDivision {
  explicit WeightDivision(const Conv2dShape& s)
      : row_tiles(ceil_div<int64_t>(padded_weights(s), Tile::kGroupRows)),
        col_tiles(ceil_div<int64_t>(s.out_channels / s.groups, Tile::kGroupCols)),
        tiles(row_tiles * col_tiles * ceil_div<int64_t>(s.groups, Tile::kGroups)),
        splits(split_sum(pixels_of(s), tiles, weight_elements(s), kSplitMultiple)) {}
  int64_t row_tiles, col_tiles, tiles;
  Splits splits;
};

template <class Tile>
Plan backward_weight_mma_plan(const Conv2dShape& s) {
  const WeightDivision<Tile> division(s);
  return {Tile::kCols, Tile::kGroupRows, division.tiles * division.splits.count,
          partials_bytes(s.dtype, division.splits, weight_elements(s))};
}

template <class Tile, bool kVector, class T>
void launch_backward_weight_mma(const Conv2dShape& s, const WeightProblem<T>& problem, const Splits& splits, cudaStream_t stream) {
  const WeightDivision<Tile> division(s);
  launch(backward_weight_mma<Tile, kVector, T>, Grid(division.tiles * splits.count, kBlockThreads, Tile::template kSharedBytes<T>), stream,
         problem, static_cast<int>(division.row_tiles), static_cast<int>(division.col_tiles), static_cast<int>(splits.size));
}

// With the one tile, whichever loader runs.
template <class Tile, class T>
void run_backward_weight_tile(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const WeightProblem<T> problem(s, b, workspace);
  const Splits splits = WeightDivision<Tile>(s).splits;
  problem.has_vectors() ? launch_backward_weight_mma<Tile, true>(s, problem, splits, stream)
                        : launch_backward_weight_mma<Tile, false>(s, problem, splits, stream);
  launch_sum_partials<T>(workspace, splits, weight_elements(s), b.grad_weight, stream);
}

}  // namespace cnn_ext::cuda
