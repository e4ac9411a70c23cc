// Depthwise convolution in nhwc, forward and backward_input, of square kernels of 3 and 5 with strides 1 and 2 and of 7 with stride 1,
// without dilation, of an even number of channels.
//
// A thread computes a tile of 4 x 4 results (2 x 4 of forward with stride 2) of two channels, a row of taps at a time: it holds the rows of
// inputs that these meet in registers, moves them up for the next row of taps and meanwhile reads one more. 16 threads share a tile, 64
// bytes of a pixel in 16 bits; a block is 4 tiles of 32 channels, whose filters come through shared memory, read as they lie: neighbouring
// threads need taps that are k * k elements apart, a line of memory for each.
//
// backward_input with stride 1 is forward with the filter turned round. With stride 2 a tile begins at an even place of the padded input,
// so that which taps meet which outputs is known while compiling.
//
// A sum takes its taps (forward) or its outputs (backward_input with stride 2) row by row, one fused multiplication each, whatever the
// tile. Outside the tensor are zeros; a block with a filter that is not finite leaves them out, so padding never multiplies.
//
// Not handled: float64; several filters for a channel. Bound by the second-level cache at 3 x 3, by multiplications at 7 x 7.
#include "cuda/channel_pair.cuh"
#include "cuda/depthwise.cuh"
#include "cuda/thread_places.h"

namespace cnn_ext::cuda {
namespace {

constexpr int kTilePairs = 16, kBlockTiles = 4, kTileThreads = kTilePairs * kBlockTiles;
constexpr int kBlockChannels = kPair * kTilePairs, kFilterPitch = kBlockChannels + kPair;  // the pitch spreads a filter's taps over banks
constexpr int kTileCols = 4, kBackwardRows = 4;
CNN_EXT_HOST_DEVICE constexpr int forward_rows(int64_t stride) { return stride == 1 ? 4 : 2; }

// Blocks to a multiprocessor, as registers allow.
template <class T, int kKernel>
constexpr int kResidentBlocks = 6;

struct ChannelsProblem {
  Axis h, w;  // of the forward convolution, where backward_input has a stride
  int channels, blocks_of_channels;
  bool is_turned;  // the filter
};

// The tile and the channels of a thread. Where there are none it stages filters and fetches what its neighbour does.
struct PairTile {
  __device__ PairTile(const ChannelsProblem& p, const ThreadPlaces& tiles)
      : first_channel(static_cast<int>(blockIdx.x) % p.blocks_of_channels * kBlockChannels),
        of_block(static_cast<int>(threadIdx.x) % kTilePairs * kPair),
        channel(smaller(first_channel + of_block, p.channels - kPair)) {
    const int tile = static_cast<int>(blockIdx.x) / p.blocks_of_channels * kBlockTiles + static_cast<int>(threadIdx.x) / kTilePairs;
    exists = first_channel + of_block < p.channels && tile < tiles.count();
    place = tiles.at(smaller(tile, tiles.count() - 1));
  }
  int first_channel, of_block, channel;
  bool exists;
  ThreadPlaces::Place place;
};

template <int kKernel>
using BlockFilters = float[kKernel * kKernel][kFilterPitch];

// Stages the filters of the block's channels. Whether all are finite.
template <class T, int kKernel>
__device__ bool stage_filters(const ChannelsProblem& p, const T* weight, int first_channel, BlockFilters<kKernel>& filters) {
  constexpr int kTaps = kKernel * kKernel, kMost = kBlockChannels * kTaps;
  const int count = smaller(kBlockChannels, p.channels - first_channel) * kTaps;
  bool is_finite = true;
#pragma unroll
  for (int step = 0; step < ceil_div(kMost, kTileThreads); ++step) {
    const int i = step * kTileThreads + static_cast<int>(threadIdx.x), tap = i % kTaps;
    if (i >= count) continue;
    const float filter = widen(weight[first_channel * kTaps + i]);
    is_finite &= isfinite(filter);
    filters[p.is_turned ? kTaps - 1 - tap : tap][i / kTaps] = filter;
  }
  return __syncthreads_and(is_finite) != 0;
}

// The filters of a pair of channels: a row of taps.
template <int kKernel>
__device__ void load_filter_row(const BlockFilters<kKernel>& filters, int of_block, int r, float (&row)[kKernel][kPair]) {
#pragma unroll
  for (int s = 0; s < kKernel; ++s) {
    const Vector<float, kPair> pair = load_vector<kPair>(&filters[r * kKernel + s][of_block]);
#pragma unroll
    for (int e = 0; e < kPair; ++e) row[s][e] = pair.element[e];
  }
}

template <bool kWhole, class T>
__device__ void store_pair(T* target, const T* bias, int channel, const float (&sum)[kPair]) {
  Vector<T, kPair> pair;
#pragma unroll
  for (int e = 0; e < kPair; ++e) pair.element[e] = narrow<T>(sum[e] + (bias == nullptr ? 0.0f : widen(bias[channel + e])));
  store_some(target, pair, kPair, kWhole);
}

// One result of a channel, from what is inside the tensor alone.
template <class T, int kKernel>
__device__ float sum_inside(const ChannelsProblem& p, const T* image, const BlockFilters<kKernel>& filters, int of_block, int out_h,
                            int out_w) {
  const int first_h = out_h * p.h.stride + p.h.first, first_w = out_w * p.w.stride + p.w.first;
  const Range rows = taps_inside(first_h, 1, kKernel, p.h.in), cols = taps_inside(first_w, 1, kKernel, p.w.in);
  float sum = 0;
#pragma unroll 1
  for (int r = rows.begin; r < rows.end; ++r) {
#pragma unroll 1
    for (int s = cols.begin; s < cols.end; ++s) {
      sum = fma(filters[r * kKernel + s][of_block], widen(image[((first_h + r) * p.w.in + first_w + s) * p.channels]), sum);
    }
  }
  return sum;
}

// The same of backward_input with a stride, for a place of the padded input.
template <class T, int kKernel>
__device__ float sum_inside_backward(const ChannelsProblem& p, const T* image, const BlockFilters<kKernel>& filters, int of_block,
                                     int padded_h, int padded_w) {
  const Range rows = windows_over(padded_h, p.h.stride, 1, kKernel, p.h.out);
  const Range cols = windows_over(padded_w, p.w.stride, 1, kKernel, p.w.out);
  float sum = 0;
#pragma unroll 1
  for (int h = rows.begin; h < rows.end; ++h) {
#pragma unroll 1
    for (int w = cols.begin; w < cols.end; ++w) {
      const int tap = (padded_h - h * p.h.stride) * kKernel + padded_w - w * p.w.stride;
      sum = fma(filters[tap][of_block], widen(image[(h * p.w.out + w) * p.channels]), sum);
    }
  }
  return sum;
}

// kWhole: pairs of channels are aligned.
template <class T, int kKernel, int kStride, bool kWhole>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<T, kKernel>)
    convolve_channels(ChannelsProblem p, ThreadPlaces tiles, const T* __restrict__ input, const T* __restrict__ weight,
                      const T* __restrict__ bias, T* __restrict__ output) {
  constexpr int kRows = forward_rows(kStride);
  constexpr int kWindow = (kRows - 1) * kStride + 1, kInCols = (kTileCols - 1) * kStride + kKernel;  // that a row of taps meets
  __shared__ BlockFilters<kKernel> filters;
  const PairTile tile(p, tiles);
  const int out_h = tile.place.row * kRows, out_w = tile.place.column * kTileCols;
  const int first_h = out_h * kStride + p.h.first, first_w = out_w * kStride + p.w.first;
  const T* image = input + static_cast<int64_t>(tile.place.image) * p.h.in * p.w.in * p.channels + tile.channel;
  PairWords<T> window[kWindow][kInCols];
  const auto fetch = [&](int y, PairWords<T>(&row)[kInCols]) {
#pragma unroll
    for (int x = 0; x < kInCols; ++x) row[x] = pair_at<kWhole>(image, p.h.in, p.w.in, p.channels, first_h + y, first_w + x);
  };
#pragma unroll
  for (int y = 0; y < kWindow; ++y) fetch(y, window[y]);
  const bool is_finite = stage_filters<T, kKernel>(p, weight, tile.first_channel, filters);
  if (!tile.exists) return;
  T* target = output + ((static_cast<int64_t>(tile.place.image) * p.h.out + out_h) * p.w.out + out_w) * p.channels + tile.channel;
  const auto store = [&](int j, int i, const float (&sum)[kPair]) {
    store_pair<kWhole>(target + (j * p.w.out + i) * p.channels, bias, tile.channel, sum);
  };
  const int result_rows = smaller(kRows, p.h.out - out_h), result_cols = smaller(kTileCols, p.w.out - out_w);
  if (!is_finite) {
#pragma unroll 1
    for (int i = 0; i < result_rows * result_cols; ++i) {
      const int row = i / result_cols, col = i % result_cols;
      float sum[kPair];
#pragma unroll
      for (int e = 0; e < kPair; ++e) {
        sum[e] = sum_inside<T, kKernel>(p, image + e, filters, tile.of_block + e, out_h + row, out_w + col);
      }
      store(row, col, sum);
    }
    return;
  }
  float sums[kRows][kTileCols][kPair] = {};
#pragma unroll kKernel == 7 ? 2 : kKernel  // as registers allow
  for (int r = 0; r < kKernel; ++r) {
    float filter[kKernel][kPair];
    load_filter_row<kKernel>(filters, tile.of_block, r, filter);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
#pragma unroll
        for (int i = 0; i < kTileCols; ++i) {
#pragma unroll
          for (int e = 0; e < kPair; ++e) {
            sums[j][i][e] = fma(filter[s][e], window[j * kStride][i * kStride + s].at(e), sums[j][i][e]);
          }
        }
      }
    }
#pragma unroll
    for (int x = 0; x < kInCols; ++x) {
#pragma unroll
      for (int y = 0; y < kWindow - 1; ++y) window[y][x] = window[y + 1][x];
    }
    if (r < kKernel - 1) fetch(kWindow + r, window[kWindow - 1]);
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
#pragma unroll
    for (int i = 0; i < kTileCols; ++i) {
      if (j < result_rows && i < result_cols) store(j, i, sums[j][i]);
    }
  }
}

// Of stride 2; h, w: of the forward convolution.
template <class T, int kKernel, bool kWhole>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<T, kKernel>)
    convolve_channels_backward(ChannelsProblem p, ThreadPlaces tiles, const T* __restrict__ grad_output, const T* __restrict__ weight,
                               const T* __restrict__ bias, T* __restrict__ grad_input) {
  constexpr int kBefore = (kKernel - 1) / 2;  // outputs before that of the tile's first place
  constexpr int kOutRows = kBefore + kBackwardRows / 2, kOutCols = kBefore + kTileCols / 2;
  __shared__ BlockFilters<kKernel> filters;
  const PairTile tile(p, tiles);
  const int padded_h = tile.place.row * kBackwardRows, padded_w = tile.place.column * kTileCols;
  const T* image = grad_output + static_cast<int64_t>(tile.place.image) * p.h.out * p.w.out * p.channels + tile.channel;
  PairWords<T> rows[kOutRows][kOutCols];
#pragma unroll
  for (int y = 0; y < kOutRows; ++y) {
#pragma unroll
    for (int x = 0; x < kOutCols; ++x) {
      rows[y][x] = pair_at<kWhole>(image, p.h.out, p.w.out, p.channels, padded_h / 2 - kBefore + y, padded_w / 2 - kBefore + x);
    }
  }
  const bool is_finite = stage_filters<T, kKernel>(p, weight, tile.first_channel, filters);
  if (!tile.exists) return;
  const int in_h = padded_h + p.h.first, in_w = padded_w + p.w.first;
  T* target = grad_input + static_cast<int64_t>(tile.place.image) * p.h.in * p.w.in * p.channels + tile.channel;
  const auto store = [&](int j, int i, const float (&sum)[kPair]) {
    const int h = in_h + j, w = in_w + i;
    if (h < 0 || h >= p.h.in || w < 0 || w >= p.w.in) return;
    store_pair<kWhole>(target + (h * p.w.in + w) * p.channels, bias, tile.channel, sum);
  };
  if (!is_finite) {
#pragma unroll 1
    for (int i = 0; i < kBackwardRows * kTileCols; ++i) {
      const int row = i / kTileCols, col = i % kTileCols;
      float sum[kPair];
#pragma unroll
      for (int e = 0; e < kPair; ++e) {
        sum[e] = sum_inside_backward<T, kKernel>(p, image + e, filters, tile.of_block + e, padded_h + row, padded_w + col);
      }
      store(row, col, sum);
    }
    return;
  }
  float sums[kBackwardRows][kTileCols][kPair] = {};
#pragma unroll
  for (int r = kKernel - 1; r >= 0; --r) {
    float filter[kKernel][kPair];
    load_filter_row<kKernel>(filters, tile.of_block, r, filter);
#pragma unroll
    for (int j = r % 2; j < kBackwardRows; j += 2) {
#pragma unroll
      for (int s = kKernel - 1; s >= 0; --s) {
#pragma unroll
        for (int i = s % 2; i < kTileCols; i += 2) {
#pragma unroll
          for (int e = 0; e < kPair; ++e) {
            sums[j][i][e] = fma(filter[s][e], rows[kBefore + (j - r) / 2][kBefore + (i - s) / 2].at(e), sums[j][i][e]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kBackwardRows; ++j) {
#pragma unroll
    for (int i = 0; i < kTileCols; ++i) store(j, i, sums[j][i]);
  }
}

bool accepts(const Conv2dShape& s) {
  const int64_t kernel = s.kernel_h, stride = s.stride_h;
  const bool has_kernel = s.kernel_w == kernel && (kernel == 3 || kernel == 5 || (kernel == 7 && stride == 1));
  const bool has_stride = s.stride_w == stride && (stride == 1 || stride == 2);
  return is_depthwise_nhwc(s) && has_kernel && has_stride && s.dilation_h == 1 && s.dilation_w == 1 && s.in_channels % kPair == 0 &&
         s.dtype != DType::float64 &&
         all_below(kMaxExtent, {product({s.batch, s.in_h + s.pad_top + kBackwardRows, s.in_w + s.pad_left + kTileCols}),
                                product({s.batch, s.out_h + forward_rows(1), s.out_w + kTileCols}),
                                product({s.in_h, s.in_w, s.in_channels}), product({s.out_h, s.out_w, s.in_channels})});
}

// What a launch takes from one tensor to another one.
struct Pass {
  ChannelsProblem problem;
  ThreadPlaces tiles;
  const void *input, *weight, *bias;
  void* output;
};

ChannelsProblem problem_of(const Conv2dShape& s, const Axis& h, const Axis& w, bool is_turned) {
  return {h, w, static_cast<int>(s.in_channels), static_cast<int>(ceil_div<int64_t>(s.in_channels, kBlockChannels)), is_turned};
}

ThreadPlaces tiles_of(const Conv2dShape& s, int64_t height, int64_t rows, int64_t width) {
  return ThreadPlaces(s.batch, ceil_div<int64_t>(height, rows), ceil_div<int64_t>(width, kTileCols), 1);
}

Pass forward_pass(const Conv2dShape& s, const Conv2dBuffers& b) {
  return {problem_of(s, forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, 1),
                     forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, 1), false),
          tiles_of(s, s.out_h, forward_rows(s.stride_h), s.out_w),
          b.input,
          b.weight,
          b.bias,
          b.output};
}

// With a stride, tiles begin above and left of the input, in its padding.
Pass backward_pass(const Conv2dShape& s, const Conv2dBuffers& b) {
  Pass pass = forward_pass(s, b);
  pass.input = b.grad_output, pass.output = b.grad_input;
  if (s.stride_h == 1) {
    pass.problem = problem_of(s, backward_axis(s.in_h, s.out_h, s.kernel_h, s.pad_top, 1),
                              backward_axis(s.in_w, s.out_w, s.kernel_w, s.pad_left, 1), true);
    pass.tiles = tiles_of(s, s.in_h, forward_rows(1), s.in_w);
  } else {
    pass.tiles = tiles_of(s, s.in_h + s.pad_top, kBackwardRows, s.in_w + s.pad_left);
  }
  return pass;
}

int64_t blocks_of(const Pass& pass) { return ceil_div<int64_t>(pass.tiles.count(), kBlockTiles) * pass.problem.blocks_of_channels; }

template <class T>
void launch_pass(void (*function)(ChannelsProblem, ThreadPlaces, const T*, const T*, const T*, T*), const Pass& pass, cudaStream_t stream) {
  launch(function, Grid(blocks_of(pass), kTileThreads), stream, pass.problem, pass.tiles, static_cast<const T*>(pass.input),
         static_cast<const T*>(pass.weight), static_cast<const T*>(pass.bias), static_cast<T*>(pass.output));
}

template <class T, bool kWhole>
void launch_forward(int64_t kernel, int64_t stride, const Pass& pass, cudaStream_t stream) {
  const auto function = kernel == 7   ? convolve_channels<T, 7, 1, kWhole>
                        : kernel == 5 ? (stride == 1 ? convolve_channels<T, 5, 1, kWhole> : convolve_channels<T, 5, 2, kWhole>)
                        : stride == 1 ? convolve_channels<T, 3, 1, kWhole>
                                      : convolve_channels<T, 3, 2, kWhole>;
  launch_pass<T>(function, pass, stream);
}

template <class T, bool kWhole>
void launch_backward_strided(int64_t kernel, const Pass& pass, cudaStream_t stream) {
  launch_pass<T>(kernel == 5 ? convolve_channels_backward<T, 5, kWhole> : convolve_channels_backward<T, 3, kWhole>, pass, stream);
}

template <class T>
bool has_whole_pairs(const Pass& pass) {
  return has_whole_vectors<kPair>(static_cast<const T*>(pass.input), pass.problem.channels) &&
         has_whole_vectors<kPair>(static_cast<T*>(pass.output), pass.problem.channels);
}

void run_forward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  const Pass pass = forward_pass(s, b);
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    (has_whole_pairs<T>(pass) ? launch_forward<T, true> : launch_forward<T, false>)(s.kernel_h, s.stride_h, pass, stream);
  });
}

void run_backward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  const Pass pass = backward_pass(s, b);
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    if (s.stride_h == 1) {
      (has_whole_pairs<T>(pass) ? launch_forward<T, true> : launch_forward<T, false>)(s.kernel_h, 1, pass, stream);
    } else {
      (has_whole_pairs<T>(pass) ? launch_backward_strided<T, true> : launch_backward_strided<T, false>)(s.kernel_h, pass, stream);
    }
  });
}

Plan plan_of(const Pass& pass, int64_t rows) { return {kBlockChannels, kBlockTiles * rows * kTileCols, blocks_of(pass), 0}; }
Plan plan_forward(const Conv2dShape& s) { return plan_of(forward_pass(s, {}), forward_rows(s.stride_h)); }
Plan plan_backward(const Conv2dShape& s) { return plan_of(backward_pass(s, {}), s.stride_h == 1 ? forward_rows(1) : kBackwardRows); }

}  // namespace

extern const Conv2dKernel conv2d_forward_depthwise_channels_sm80 = {
    "conv2d_forward_depthwise_channels_sm80", 80, Conv2dDirection::forward, accepts, plan_forward, run_forward};
extern const Conv2dKernel conv2d_backward_input_depthwise_channels_sm80 = {"conv2d_backward_input_depthwise_channels_sm80",
                                                                           80,
                                                                           Conv2dDirection::backward_input,
                                                                           accepts,
                                                                           plan_backward,
                                                                           run_backward,
                                                                           /*needs_proof=*/false,
                                                                           /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
