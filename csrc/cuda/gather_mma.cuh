// forward and backward_input on tensor cores. Both gather: a pixel of the result takes, tap by tap, the channels of a pixel of a source.
// forward is one such convolution, backward_input one for each stride phase (see Phase), whose pixels share their taps: with a stride no
// product is wasted, and nothing is scattered. Rows of the product are pixels of the result, columns its channels, the depth is (r, s,
// channel), with the channels padded to whole chunks.
#pragma once

#include <new>
#include <type_traits>

#include "cuda/chunk_loaders.cuh"
#include "cuda/gather_axis.h"
#include "cuda/limits.h"
#include "cuda/mma_gemm.cuh"
#include "cuda/relu_pool.cuh"

namespace cnn_ext::cuda {

// What the blocks of a phase share: both axes, and the depth of the product, (r, s, channel) of the phase's taps.
struct GatherTaps {
  GatherAxis h, w;
  int channels, terms;
  TapDecoder<Layout::nhwc> decoder;
};

template <class Tile, class T>
struct SourceChunks {
  using Element = T;
  static constexpr bool kAlongDepth = true;

  __device__ Place at_extent(int row) const {
    const int pixel = Tile::row_member(row), group = Tile::row_group(row);
    if (pixel >= pixels || group >= groups) return {0, kNowhere, 0, 0};
    const PlaneIndex p = pixel_decoder.at(pixel);
    const int h = taps.h.first + p.h * taps.h.step, w = taps.w.first + p.w * taps.w.step;
    return {p.outer * strides.n + h * strides.h + w * strides.w + group * taps.channels * strides.c, h, w, 0};
  }
  __device__ Place at_depth(int term) const {
    if (term >= taps.terms) return {0, kNowhere, 0, 0};
    const Tap tap = taps.decoder.at(term);
    const int h = tap.r * taps.h.tap_step, w = tap.s * taps.w.tap_step;
    return {h * strides.h + w * strides.w + tap.channel * strides.c, h, w, taps.channels - tap.channel};
  }

  const T* data;
  int channel_stride;
  int height, width;
  Strides strides;
  const GatherTaps& taps;
  int groups, pixels;
  PlaneDecoder pixel_decoder;
};

// The filters. A chunk is 16 bytes of their channels c: forward adds them up, in backward_input they are columns.
template <class Tile, class T, bool kForward>
struct FilterChunks {
  using Element = T;
  static constexpr bool kAlongDepth = kForward;
  static constexpr int height = 1, width = 1;

  __device__ Place at_extent(int col) const {
    const int channel = Tile::col_member(col), group = Tile::col_group(col);
    if (channel >= cols || group >= groups) return {0, kNowhere, 0, 0};
    return {channel * (kForward ? strides.n : strides.c) + group * of_group, 0, 0, cols - channel};
  }
  __device__ Place at_depth(int term) const {
    const Tap tap = taps.decoder.at(term);
    if (term >= taps.terms || tap.channel >= taps.channels) return {0, kNowhere, 0, 0};
    const int r = taps.h.first_tap + tap.r * taps.h.tap_distance, s = taps.w.first_tap + tap.s * taps.w.tap_distance;
    return {r * strides.h + s * strides.w + tap.channel * (kForward ? strides.c : strides.n), 0, 0, taps.channels - tap.channel};
  }

  const T* data;
  int channel_stride;
  Strides strides;
  int64_t of_group;  // elements
  const GatherTaps& taps;
  int groups, cols;
};

// Rounds the sums, with the bias and the ReLU where they are asked for, and stores them.
template <class Tile, class T, bool kVector>
struct PixelStore {
  static constexpr bool kChunks = kVector;

  __device__ bool along_rows() const { return strides.c != 1; }
  __device__ void store(int row, int col, const Accumulate<T>* sums) const {
    const int pixel = Tile::row_member(row), group = Tile::col_group(col), member = Tile::col_member(col);
    if (pixel >= pixels || member >= channels || group >= groups) return;
    const int channel = group * channels + member;
    const PlaneIndex p = pixel_decoder.at(pixel);
    const int h = phase.h.first_out + p.h * phase.h.out_step, w = phase.w.first_out + p.w * phase.w.out_step;
    if (h >= height || w >= width) return;  // the larger phases' last row and column are missing in the others
    T* target = result + p.outer * strides.n + h * strides.h + w * strides.w + channel * strides.c;
    if constexpr (kVector) {
      Accumulate<T> values[kChunk<T>];
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) values[i] = finished(sums[i], channel + i);
      store_chunk(target, kChunk<T>, true, values);
    } else {
      *target = narrow<T>(finished(*sums, channel));
    }
  }
  __device__ Accumulate<T> finished(Accumulate<T> sum, int channel) const {
    return activated(bias == nullptr ? sum : sum + widen(bias[channel]), relu);
  }

  T* result;
  const T* bias;
  Strides strides;
  const GatherTaps& phase;
  int height, width, groups, pixels, channels;  // channels of a group
  PlaneDecoder pixel_decoder;
  bool relu;
};

// The pixels of a result; of the largest phase.
template <bool kForward>
int64_t gather_height(const Conv2dShape& s) {
  return kForward ? s.out_h : ceil_div(s.in_h, s.stride_h);
}
template <bool kForward>
int64_t gather_width(const Conv2dShape& s) {
  return kForward ? s.out_w : ceil_div(s.in_w, s.stride_w);
}
template <bool kForward>
int64_t gather_pixels(const Conv2dShape& s) {
  return s.batch * gather_height<kForward>(s) * gather_width<kForward>(s);
}

// The tensors of a gathering convolution, and the numbers that the host works out.
template <class T, bool kForward>
struct GatherProblem {
  GatherProblem(const Conv2dShape& s, const Conv2dBuffers& b, bool relu_ = false)
      : g(s),
        source(static_cast<const T*>(kForward ? b.input : b.grad_output)),
        weight(static_cast<const T*>(b.weight)),
        bias(static_cast<const T*>(b.bias)),
        result(static_cast<T*>(kForward ? b.output : b.grad_input)),
        relu(relu_),
        phases(kForward ? 1 : g.stride_h * g.stride_w),
        depth_channels(kForward ? g.group_in : g.group_out),
        cols(kForward ? g.group_out : g.group_in),
        pixel_decoder(static_cast<int>(gather_height<kForward>(s)), static_cast<int>(gather_width<kForward>(s))),
        pixels(static_cast<int>(gather_pixels<kForward>(s))),
        first_phase(taps_of(0)) {}

  CNN_EXT_HOST_DEVICE GatherTaps taps_of(int phase) const {
    const GatherAxis h = kForward ? forward_axis(g.kernel_h, g.stride_h, g.pad_top, g.dilation_h)
                                  : backward_axis(g.kernel_h, g.stride_h, g.pad_top, g.dilation_h, phase / g.stride_w);
    const GatherAxis w = kForward ? forward_axis(g.kernel_w, g.stride_w, g.pad_left, g.dilation_w)
                                  : backward_axis(g.kernel_w, g.stride_w, g.pad_left, g.dilation_w, phase % g.stride_w);
    const int padded = ceil_div(depth_channels, kChunk<T>) * kChunk<T>;
    return {h, w, depth_channels, h.taps * w.taps * padded, TapDecoder<Layout::nhwc>(padded, h.taps, w.taps)};
  }
  // Whether every chunk is 16 aligned bytes.
  bool has_vectors() const {
    return source_strides().c == 1 && g.filter.c == 1 && g.group_in % kChunk<T> == 0 && g.group_out % kChunk<T> == 0 &&
           is_aligned(source) && is_aligned(weight) && is_aligned(result);
  }
  CNN_EXT_HOST_DEVICE const Strides& source_strides() const { return kForward ? g.in : g.out; }
  CNN_EXT_HOST_DEVICE const Strides& result_strides() const { return kForward ? g.out : g.in; }

  // The operands and the store of the groups from `group` on.
  template <class Tile>
  __device__ SourceChunks<Tile, T> source_chunks(int group, const GatherTaps& taps) const {
    const Strides& strides = source_strides();
    return {source + group * depth_channels * strides.c,
            static_cast<int>(strides.c),
            kForward ? g.in_h : g.out_h,
            kForward ? g.in_w : g.out_w,
            strides,
            taps,
            g.groups - group,
            pixels,
            pixel_decoder};
  }
  template <class Tile>
  __device__ FilterChunks<Tile, T, kForward> filter_chunks(int group, const GatherTaps& taps) const {
    const int64_t of_group = g.group_out * g.filter.n;
    return {weight + group * of_group, static_cast<int>(g.filter.c), g.filter, of_group, taps, g.groups - group, cols};
  }
  template <class Tile, bool kVector>
  __device__ PixelStore<Tile, T, kVector> store(int group, const GatherTaps& taps) const {
    const Strides& strides = result_strides();
    return {result + group * cols * strides.c,
            bias == nullptr ? nullptr : bias + group * cols,
            strides,
            taps,
            kForward ? g.out_h : g.in_h,
            kForward ? g.out_w : g.in_w,
            g.groups - group,
            pixels,
            cols,
            pixel_decoder,
            relu};
  }

  Conv2dGeometry g;
  const T* source;
  const T* weight;
  const T* bias;
  T* result;
  bool relu;
  int phases, depth_channels, cols;
  PlaneDecoder pixel_decoder;
  int pixels;
  GatherTaps first_phase;
};

// Blocks are numbered by column tile, groups, phase, row tile: those that read the same pixels run together.
template <class Tile, bool kVector, bool kForward, class T>
__global__ void __launch_bounds__(kBlockThreads, kMmaBlocks<Tile, T>) gather_mma(GatherProblem<T, kForward> problem, int col_tiles) {
  const Conv2dGeometry& g = problem.g;
  const int col_tile = blockIdx.x % col_tiles, tiles = blockIdx.x / col_tiles;
  const int group_tiles = ceil_div(g.groups, Tile::kGroups), group = tiles % group_tiles * Tile::kGroups;
  const int phase = tiles / group_tiles % problem.phases, row_tile = tiles / group_tiles / problem.phases;
  // Of a block's phase in shared memory: registers are scarce.
  __shared__ __align__(alignof(GatherTaps)) unsigned char phase_taps[sizeof(GatherTaps)];
  if (!kForward && threadIdx.x == 0) new (phase_taps) GatherTaps(problem.taps_of(phase));
  __syncthreads();
  const GatherTaps& taps = kForward ? problem.first_phase : *reinterpret_cast<const GatherTaps*>(phase_taps);

  using Source = SourceChunks<Tile, T>;
  using Filter = FilterChunks<Tile, T, kForward>;
  const Source rows = problem.template source_chunks<Tile>(group, taps);
  const Filter cols = problem.template filter_chunks<Tile>(group, taps);
  const PixelStore<Tile, T, kVector> store = problem.template store<Tile, kVector>(group, taps);

  using RowLoader = std::conditional_t<kVector, VectorLoader<Source, Tile::kRows>, ElementLoader<Source, Tile::kRows>>;
  using ColLoader = std::conditional_t<kVector, VectorLoader<Filter, Tile::kCols>, ElementLoader<Filter, Tile::kCols>>;
  MmaGemm<Tile, RowLoader, ColLoader> gemm(rows, cols, row_tile * Tile::kRows, col_tile * Tile::kCols, problem.source_strides().c == 1);
  gemm.run(0, taps.terms, store);
}

template <class Tile, bool kForward>
Plan gather_mma_plan(const Conv2dShape& s) {
  const int64_t cols = (kForward ? s.out_channels : s.in_channels) / s.groups, phases = kForward ? 1 : s.stride_h * s.stride_w;
  const int64_t blocks = ceil_div<int64_t>(cols, Tile::kGroupCols) * ceil_div<int64_t>(s.groups, Tile::kGroups) * phases *
                         ceil_div<int64_t>(gather_pixels<kForward>(s), Tile::kGroupRows);
  return {Tile::kCols, Tile::kGroupRows, blocks, 0};
}

template <class Tile, bool kVector, class T, bool kForward>
void launch_gather_mma(const Conv2dShape& s, const GatherProblem<T, kForward>& problem, cudaStream_t stream) {
  launch(gather_mma<Tile, kVector, kForward, T>,
         Grid(gather_mma_plan<Tile, kForward>(s).blocks, kBlockThreads, Tile::template kSharedBytes<T>), stream, problem,
         ceil_div(problem.cols, Tile::kGroupCols));
}

// With the one tile, whichever loader runs.
template <class Tile, class T, bool kForward>
void run_gather_tile(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  const GatherProblem<T, kForward> problem(s, b);
  problem.has_vectors() ? launch_gather_mma<Tile, true>(s, problem, stream) : launch_gather_mma<Tile, false>(s, problem, stream);
}

template <bool kForward>
bool is_narrow_gather(const Conv2dShape& s) {
  return has_few_cols((kForward ? s.out_channels : s.in_channels) / s.groups) || (!kForward && reads_words_across(s.dtype));
}

template <bool kForward>
Plan plan_gather_mma(const Conv2dShape& s) {
  return (is_narrow_gather<kForward>(s) ? gather_mma_plan<NarrowMmaTile, kForward> : gather_mma_plan<WideMmaTile, kForward>)(s);
}

template <bool kForward>
void run_activated_gather_mma(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const GatherProblem<T, kForward> problem(s, b, relu);
    if (!problem.has_vectors()) {
      launch_gather_mma<NarrowMmaTile, false>(s, problem, stream);
    } else if (is_narrow_gather<kForward>(s)) {
      launch_gather_mma<NarrowMmaTile, true>(s, problem, stream);
    } else if constexpr (kForward || !std::is_same_v<T, float>) {
      launch_gather_mma<WideMmaTile, true>(s, problem, stream);
    }
  });
}

template <bool kForward>
void run_gather_mma(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  run_activated_gather_mma<kForward>(s, b, false, stream);
}

}  // namespace cnn_ext::cuda
