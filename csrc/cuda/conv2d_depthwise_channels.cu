// Depthwise convolution in nhwc, forward and backward_input, of square kernels of 3 and 5 with strides 1 and 2 and of 7 with stride 1,
// without dilation, of an even number of channels.
//
// A block computes a tile of results of 32 channels from a staged tile of inputs (channel_tile.cuh): chunks of 16 bytes, each copied once,
// all at a time, and read again at fixed distances from one address. Bound are these layers by instructions beside the multiplications and
// by waiting, not by multiplications: a thread that fetches its own windows spends five instructions on the address of each pair. A thread
// computes a strip of 7 or 8 results of two channels, as the width is wasted less, of two neighbouring rows for 3 x 3 with stride 1: a row
// of inputs is read and widened once for all of them.
//
// backward_input with stride 1 is forward with the filter turned round. With stride 2 a strip is two rows of 8 places from an even place
// of the padded input on, so that which taps meet which outputs is known while compiling.
//
// A sum takes its taps (forward) or its outputs (backward_input with stride 2) row by row, one fused multiplication each, whatever the
// tile. Outside the tensor are zeros; a thread whose sums are not numbers sums again what is inside, so padding never multiplies.
//
// Not handled: float64; several filters for a channel.
#include "cuda/channel_tile.cuh"
#include "cuda/depthwise.cuh"
#include "cuda/thread_places.h"

namespace cnn_ext::cuda {
namespace {

constexpr int kMostStrips = kBlockThreads / kTilePairs;  // of a tile
constexpr int kMostTileBytes = 48 * 1024;                // four blocks to a multiprocessor
constexpr int kBackwardRows = 2;

// Rows of a strip of forward.
CNN_EXT_HOST_DEVICE constexpr int strip_rows(int64_t kernel, int64_t stride) { return kernel == 3 && stride == 1 ? 2 : 1; }

struct ChannelsProblem {
  Axis h, w;  // of the forward convolution, where backward_input has a stride
  int channels, blocks_of_channels;
  bool is_turned;         // the filter
  FastDivisor tile_rows;  // in strips
  int tile_cols;
  TileExtent source;  // what a tile of results reads
  bool has_whole_chunks, has_whole_pairs;
};

// The tile of a block, in strips of the image from its first one, and its channels.
struct BlockTile {
  __device__ BlockTile(const ChannelsProblem& p, const ThreadPlaces& tiles) {
    const int tile = static_cast<int>(blockIdx.x) / p.blocks_of_channels;
    const auto place = tiles.at(tile);
    image = place.image, row = place.row * p.tile_rows.divisor(), col = place.column * p.tile_cols;
    first_channel = (static_cast<int>(blockIdx.x) - tile * p.blocks_of_channels) * kTileChannels;
  }
  int image, row, col, first_channel;
};

// The strip of a thread in its tile, and its channels.
struct ThreadStrip {
  __device__ explicit ThreadStrip(const ChannelsProblem& p) {
    const int strip = static_cast<int>(threadIdx.x) / kTilePairs;
    col = p.tile_rows.quotient(strip), row = strip - col * p.tile_rows.divisor();
    of_block = static_cast<int>(threadIdx.x) % kTilePairs * kPair;
  }
  int row, col, of_block;
};

// Stages what the block needs from pixel (first_h, first_w) on. Its filters.
template <class T, int kKernel>
__device__ const float* stage_block(const ChannelsProblem& p, const ChannelsImage<T>& image, const T* weight, int first_channel,
                                    int first_h, int first_w) {
  unsigned char* staged = dynamic_shared<unsigned char>();
  float* filters = reinterpret_cast<float*>(staged + p.source.bytes());
  stage_tile(image, first_channel, first_h, first_w, p.source, staged);
  stage_filters<T, kKernel>(weight, p.channels, first_channel, p.is_turned, filters);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  return filters;
}

template <class T>
__device__ void store_pair(const ChannelsProblem& p, T* target, const PairValues& sum, const PairValues& added) {
  Vector<T, kPair> pair;
#pragma unroll
  for (int e = 0; e < kPair; ++e) pair.element[e] = narrow<T>(sum.value[e] + added.value[e]);
  store_some(target, pair, kPair, p.has_whole_pairs);
}

template <class T>
__device__ PairValues bias_of(const T* bias, int channel) {
  if (bias == nullptr) return {};
  return {{widen(bias[channel]), widen(bias[channel + 1])}};
}

// A result of forward from what is inside the tensor alone: from the staged pixel and the filters of a pair.
template <class T, int kKernel>
__device__ PairValues sum_inside(const ChannelsProblem& p, const unsigned char* staged, const float* filters, int out_h, int out_w) {
  const Range rows = taps_inside(out_h * p.h.stride + p.h.first, 1, kKernel, p.h.in);
  const Range cols = taps_inside(out_w * p.w.stride + p.w.first, 1, kKernel, p.w.in);
  PairValues sum = {};
#pragma unroll 1
  for (int r = rows.begin; r < rows.end; ++r) {
#pragma unroll 1
    for (int s = cols.begin; s < cols.end; ++s) {
      const PairValues filter = tap_at(filters, r * kKernel + s);
      add_product(sum, filter, staged_pair<T>(staged + r * p.source.pitch + s * kPixelBytes<T>));
    }
  }
  return sum;
}

// The same of backward_input with stride 2, for a place of the padded input; the staged pixel is the one of its last output, which the
// first two of its taps meet.
template <class T, int kKernel>
__device__ PairValues sum_inside_backward(const ChannelsProblem& p, const unsigned char* staged, const float* filters, int padded_h,
                                          int padded_w) {
  const Range rows = windows_over(padded_h, 2, 1, kKernel, p.h.out), cols = windows_over(padded_w, 2, 1, kKernel, p.w.out);
  PairValues sum = {};
#pragma unroll 1
  for (int h = rows.begin; h < rows.end; ++h) {
#pragma unroll 1
    for (int w = cols.begin; w < cols.end; ++w) {
      const PairValues filter = tap_at(filters, (padded_h - 2 * h) * kKernel + padded_w - 2 * w);
      add_product(sum, filter, staged_pair<T>(staged + (h - padded_h / 2) * p.source.pitch + (w - padded_w / 2) * kPixelBytes<T>));
    }
  }
  return sum;
}

template <class T, int kKernel, int kStride, int kWidth>
__global__ void __launch_bounds__(kBlockThreads,
                                  sizeof(T) == 4 && strip_rows(kKernel, kStride) > 1 && kWidth == kWideStrip ? 3 : 4)  // as registers allow
    convolve_channels(ChannelsProblem p, ThreadPlaces tiles, const T* __restrict__ input, const T* __restrict__ weight,
                      const T* __restrict__ bias, T* __restrict__ output) {
  constexpr int kRows = strip_rows(kKernel, kStride), kInRows = (kRows - 1) * kStride + kKernel, kInCols = (kWidth - 1) * kStride + kKernel;
  const BlockTile tile(p, tiles);
  const ChannelsImage<T> image{input + static_cast<int64_t>(tile.image) * p.h.in * p.w.in * p.channels, p.h.in, p.w.in, p.channels,
                               p.has_whole_chunks};
  const float* filters = stage_block<T, kKernel>(p, image, weight, tile.first_channel, tile.row * kRows * kStride + p.h.first,
                                                 tile.col * kWidth * kStride + p.w.first);
  const ThreadStrip strip(p);
  const int channel = tile.first_channel + strip.of_block;
  const int out_h = (tile.row + strip.row) * kRows, out_w = (tile.col + strip.col) * kWidth;
  if (channel >= p.channels || out_h >= p.h.out || out_w >= p.w.out) return;
  const unsigned char* staged = dynamic_shared<unsigned char>() + strip.row * kRows * kStride * p.source.pitch +
                                strip.col * kWidth * kStride * kPixelBytes<T> + strip.of_block * static_cast<int>(sizeof(T));
  filters += strip.of_block;
  const auto has_tap_row = [](int y, int j) { return y >= j * kStride && y < j * kStride + kKernel; };
  PairValues sums[kRows][kWidth] = {};
#pragma unroll kKernel == 3 ? kInRows : 1
  for (int y = 0; y < kInRows; ++y) {
    PairValues taps[kRows][kKernel];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (has_tap_row(y, j)) load_taps(filters, y - j * kStride, taps[j]);
    }
#pragma unroll
    for (int x = 0; x < kInCols; ++x) {
      const PairValues input_pair = staged_pair<T>(staged + y * p.source.pitch + x * kPixelBytes<T>);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        if (!has_tap_row(y, j)) continue;
#pragma unroll
        for (int s = x % kStride; s <= smaller(x, kKernel - 1); s += kStride) {
          if ((x - s) / kStride < kWidth) add_product(sums[j][(x - s) / kStride], taps[j][s], input_pair);
        }
      }
    }
  }
  const PairValues added = bias_of(bias, channel);
  T* target = output + ((static_cast<int64_t>(tile.image) * p.h.out + out_h) * p.w.out + out_w) * p.channels + channel;
  const auto store = [&](int j, int i, const PairValues& sum) {
    if (out_h + j < p.h.out && out_w + i < p.w.out) store_pair(p, target + (j * p.w.out + i) * p.channels, sum, added);
  };
  if (!are_numbers(sums)) {
#pragma unroll 1
    for (int result = 0; result < kRows * kWidth; ++result) {
      const int j = result / kWidth, i = result % kWidth;
      const unsigned char* first = staged + j * kStride * p.source.pitch + i * kStride * kPixelBytes<T>;
      store(j, i, sum_inside<T, kKernel>(p, first, filters, out_h + j, out_w + i));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) store(j, i, sums[j][i]);
  }
}

// Of stride 2; h, w: of the forward convolution.
template <class T, int kKernel>
__global__ void __launch_bounds__(kBlockThreads, kKernel == 5 ? 3 : 4)  // the same
    convolve_channels_backward(ChannelsProblem p, ThreadPlaces tiles, const T* __restrict__ grad_output, const T* __restrict__ weight,
                               const T* __restrict__ bias, T* __restrict__ grad_input) {
  constexpr int kBefore = (kKernel - 1) / 2;  // outputs before that of the strip's first place
  constexpr int kStep = kWideStrip / 2, kOutRows = kBefore + 1, kOutCols = kBefore + kStep;
  const BlockTile tile(p, tiles);
  const ChannelsImage<T> image{grad_output + static_cast<int64_t>(tile.image) * p.h.out * p.w.out * p.channels, p.h.out, p.w.out,
                               p.channels, p.has_whole_chunks};
  const float* filters = stage_block<T, kKernel>(p, image, weight, tile.first_channel, tile.row - kBefore, tile.col * kStep - kBefore);
  const ThreadStrip strip(p);
  const int channel = tile.first_channel + strip.of_block;
  const int padded_h = (tile.row + strip.row) * kBackwardRows, padded_w = (tile.col + strip.col) * kWideStrip;
  if (channel >= p.channels) return;
  const unsigned char* staged = dynamic_shared<unsigned char>() + strip.row * p.source.pitch + strip.col * kStep * kPixelBytes<T> +
                                strip.of_block * static_cast<int>(sizeof(T));
  filters += strip.of_block;
  PairValues sums[kBackwardRows][kWideStrip] = {};
#pragma unroll
  for (int y = 0; y < kOutRows; ++y) {
    PairValues outputs[kOutCols];
    load_pixels<T>(staged + y * p.source.pitch, outputs);
#pragma unroll
    for (int j = 0; j < kBackwardRows; ++j) {
      const int r = j + 2 * (kBefore - y);
      if (r >= kKernel) continue;
#pragma unroll
      for (int s = kKernel - 1; s >= 0; --s) {
        const PairValues tap = tap_at(filters, r * kKernel + s);
#pragma unroll
        for (int i = s % 2; i < kWideStrip; i += 2) add_product(sums[j][i], tap, outputs[kBefore + (i - s) / 2]);
      }
    }
  }
  const PairValues added = bias_of(bias, channel);
  T* target = grad_input + static_cast<int64_t>(tile.image) * p.h.in * p.w.in * p.channels + channel;
  const auto store = [&](int j, int i, const PairValues& sum) {
    const int h = padded_h + p.h.first + j, w = padded_w + p.w.first + i;
    if (h >= 0 && h < p.h.in && w >= 0 && w < p.w.in) store_pair(p, target + (h * p.w.in + w) * p.channels, sum, added);
  };
  if (!are_numbers(sums)) {
#pragma unroll 1
    for (int result = 0; result < kBackwardRows * kWideStrip; ++result) {
      const int j = result / kWideStrip, i = result % kWideStrip;
      const unsigned char* last = staged + kBefore * p.source.pitch + (kBefore + i / 2) * kPixelBytes<T>;
      store(j, i, sum_inside_backward<T, kKernel>(p, last, filters, padded_h + j, padded_w + i));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kBackwardRows; ++j) {
#pragma unroll
    for (int i = 0; i < kWideStrip; ++i) store(j, i, sums[j][i]);
  }
}

bool accepts(const Conv2dShape& s) {
  const int64_t kernel = s.kernel_h, stride = s.stride_h;
  const bool has_kernel = s.kernel_w == kernel && (kernel == 3 || kernel == 5 || (kernel == 7 && stride == 1));
  const bool has_stride = s.stride_w == stride && (stride == 1 || stride == 2);
  return is_depthwise_nhwc(s) && has_kernel && has_stride && s.dilation_h == 1 && s.dilation_w == 1 && s.in_channels % kPair == 0 &&
         s.dtype != DType::float64 &&
         all_below(kMaxExtent,
                   {product({s.batch, s.in_h + s.pad_top + 1, s.in_w + s.pad_left + 1}), product({s.batch, s.out_h + 1, s.out_w + 1}),
                    product({s.in_h, s.in_w, s.in_channels}), product({s.out_h, s.out_w, s.in_channels})});
}

// A strip of results: its extent, that of what it reads, and how far its neighbours' begins from there.
struct StripSize {
  int rows, cols, in_rows, in_cols, row_distance, col_distance;
};

StripSize forward_strip(const Conv2dShape& s, int width) {
  const int kernel = static_cast<int>(s.kernel_h), stride = static_cast<int>(s.stride_h), rows = strip_rows(kernel, stride);
  return {rows, width, (rows - 1) * stride + kernel, (width - 1) * stride + kernel, rows * stride, width * stride};
}

StripSize backward_strip(const Conv2dShape& s) {
  const int before = static_cast<int>(s.kernel_h - 1) / 2, step = kWideStrip / 2;
  return {kBackwardRows, kWideStrip, before + 1, before + step, 1, step};
}

// What a launch takes from one tensor to another one.
struct Pass {
  ChannelsProblem problem;
  ThreadPlaces tiles;
  int strip_width;
  const void *input, *weight, *bias;
  void* output;

  int64_t blocks() const { return int64_t{tiles.count()} * problem.blocks_of_channels; }
  int threads() const { return problem.tile_rows.divisor() * problem.tile_cols * kTilePairs; }
  size_t shared_bytes() const { return static_cast<size_t>(problem.source.bytes() + filter_bytes(problem.h.kernel)); }
};

// height, width: of the results. All tiles have about as many rows of strips.
Pass pass_of(const Conv2dShape& s, const Axis& h, const Axis& w, bool is_turned, int64_t height, int64_t width, const StripSize& strip) {
  const int pixel_bytes = kTileChannels * (s.dtype == DType::float32 ? 4 : 2);
  const int cols = static_cast<int>(tile_cols(width, strip.cols)), in_cols = (cols - 1) * strip.col_distance + strip.in_cols;
  const int in_rows = (kMostTileBytes - filter_bytes(s.kernel_h)) / ((in_cols + 1) * pixel_bytes);  // that fit
  const int most = smaller(kMostStrips / cols, (in_rows - strip.in_rows) / strip.row_distance + 1);
  const int64_t strips = larger<int64_t>(1, ceil_div<int64_t>(height, strip.rows)), tiles = ceil_div<int64_t>(strips, most);
  const int rows = static_cast<int>(ceil_div(strips, tiles));
  const ChannelsProblem problem{h,
                                w,
                                static_cast<int>(s.in_channels),
                                static_cast<int>(ceil_div<int64_t>(s.in_channels, kTileChannels)),
                                is_turned,
                                FastDivisor(rows),
                                cols,
                                TileExtent((rows - 1) * strip.row_distance + strip.in_rows, in_cols, pixel_bytes, strip.row_distance),
                                false,
                                false};
  return {problem, ThreadPlaces(s.batch, tiles, ceil_div<int64_t>(width, cols * strip.cols), 1), strip.cols, {}, {}, {}, {}};
}

Pass forward_pass(const Conv2dShape& s, const Conv2dBuffers& b) {
  Pass pass = pass_of(s, forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, 1),
                      forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, 1), false, s.out_h, s.out_w,
                      forward_strip(s, strip_width(s.out_w)));
  pass.input = b.input, pass.weight = b.weight, pass.bias = b.bias, pass.output = b.output;
  return pass;
}

// With a stride, tiles begin above and left of the input, in its padding.
Pass backward_pass(const Conv2dShape& s, const Conv2dBuffers& b) {
  Pass pass = s.stride_h == 1 ? pass_of(s, backward_axis(s.in_h, s.out_h, s.kernel_h, s.pad_top, 1),
                                        backward_axis(s.in_w, s.out_w, s.kernel_w, s.pad_left, 1), true, s.in_h, s.in_w,
                                        forward_strip(s, strip_width(s.in_w)))
                              : pass_of(s, forward_axis(s.in_h, s.out_h, s.kernel_h, 2, s.pad_top, 1),
                                        forward_axis(s.in_w, s.out_w, s.kernel_w, 2, s.pad_left, 1), false, s.in_h + s.pad_top,
                                        s.in_w + s.pad_left, backward_strip(s));
  pass.input = b.grad_output, pass.weight = b.weight, pass.bias = b.bias, pass.output = b.grad_input;
  return pass;
}

template <class T>
void launch_pass(void (*function)(ChannelsProblem, ThreadPlaces, const T*, const T*, const T*, T*), const Pass& pass, cudaStream_t stream) {
  ChannelsProblem problem = pass.problem;
  const T* input = static_cast<const T*>(pass.input);
  T* output = static_cast<T*>(pass.output);
  problem.has_whole_chunks = has_whole_vectors<kChunk<T>>(input, problem.channels);
  problem.has_whole_pairs = has_whole_vectors<kPair>(output, problem.channels);
  launch(function, Grid(pass.blocks(), pass.threads(), pass.shared_bytes()), stream, problem, pass.tiles, input,
         static_cast<const T*>(pass.weight), static_cast<const T*>(pass.bias), output);
}

template <class T, int kKernel, int kStride>
void launch_forward(const Pass& pass, cudaStream_t stream) {
  launch_pass<T>(pass.strip_width == kNarrowStrip ? convolve_channels<T, kKernel, kStride, kNarrowStrip>
                                                  : convolve_channels<T, kKernel, kStride, kWideStrip>,
                 pass, stream);
}

template <class T>
void launch_forward_of(int64_t kernel, int64_t stride, const Pass& pass, cudaStream_t stream) {
  const auto function = kernel == 7   ? launch_forward<T, 7, 1>
                        : kernel == 5 ? (stride == 1 ? launch_forward<T, 5, 1> : launch_forward<T, 5, 2>)
                        : stride == 1 ? launch_forward<T, 3, 1>
                                      : launch_forward<T, 3, 2>;
  function(pass, stream);
}

void run_forward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_single_type(s.dtype,
                   [&](auto element) { launch_forward_of<decltype(element)>(s.kernel_h, s.stride_h, forward_pass(s, b), stream); });
}

void run_backward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  const Pass pass = backward_pass(s, b);
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    if (s.stride_h == 1) return launch_forward_of<T>(s.kernel_h, 1, pass, stream);
    launch_pass<T>(s.kernel_h == 5 ? convolve_channels_backward<T, 5> : convolve_channels_backward<T, 3>, pass, stream);
  });
}

Plan plan_of(const Pass& pass, const StripSize& strip) {
  return {kTileChannels, static_cast<int>(pass.threads() / kTilePairs) * strip.rows * strip.cols, pass.blocks(), 0};
}
Plan plan_forward(const Conv2dShape& s) {
  const Pass pass = forward_pass(s, {});
  return plan_of(pass, forward_strip(s, pass.strip_width));
}
Plan plan_backward(const Conv2dShape& s) {
  const Pass pass = backward_pass(s, {});
  return plan_of(pass, s.stride_h == 1 ? forward_strip(s, pass.strip_width) : backward_strip(s));
}

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
