// Depthwise convolution in nhwc, backward_weight, of square kernels of 3 and 5 with strides 1 and 2 and of 7 with stride 1, without
// dilation, of an even number of channels:
//   grad_weight[c, r, s] = sum over n, oh, ow of grad_output[n, oh, ow, c] * input[n, ih, iw, c].
//
// A thread keeps the sums of two channels in registers, of 3 rows of taps or, of 7 x 7, of 2, and walks down columns of 4
// outputs a row: the inputs that a row meets stay in registers, move up for the next one, and what follows is read meanwhile. 16 threads
// share a column, a block takes 8 columns of 32 channels at a time and adds up its sums at the end. The columns are divided into splits,
// whose partial sums a second launch adds up (pixel_reduction.cuh).
//
// The order of additions follows the shape alone. Outside the tensors are zeros; a thread whose sums are not numbers sums again over what
// is inside, so that padding never multiplies.
//
// Not handled: several filters for a channel; float64. Bound by multiplications at 7 x 7, by the second-level cache at 3 x 3.
#include "cuda/channel_pair.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/thread_places.h"

namespace cnn_ext::cuda {
namespace {

constexpr int kWarp = 32, kColumnPairs = 16, kBlockColumns = 8, kThreads = kColumnPairs * kBlockColumns, kWarps = kThreads / kWarp;
constexpr int kBlockChannels = kPair * kColumnPairs, kWidth = 4;  // kWidth: outputs of a row of a column

// Rows of taps of a thread, as registers allow.
CNN_EXT_HOST_DEVICE constexpr int tap_rows_of(int64_t kernel) { return kernel == 7 ? 2 : 3; }

struct WeightProblem {
  int channels, in_h, in_w, out_h, out_w, pad_top, pad_left;
  int blocks_of_channels, parts, split_size;  // parts: of the rows of taps; split_size: columns
  int rows;                                   // of a column
};

// What a thread sums: the rows of taps from first_row on of the channels from `channel` on.
struct ThreadSums {
  __device__ ThreadSums(const WeightProblem& p, int tap_rows) {
    const int block = static_cast<int>(blockIdx.x), rest = block / p.blocks_of_channels;
    first_channel = block % p.blocks_of_channels * kBlockChannels;
    channel = first_channel + static_cast<int>(threadIdx.x) % kColumnPairs * kPair;
    split = rest / p.parts, first_row = rest % p.parts * tap_rows;
  }
  int first_channel, channel, split, first_row;
};

// A column of outputs of a pair of channels, and the inputs that its taps meet.
template <class T, int kKernel, int kStride, bool kWhole>
struct PairColumn {
  static constexpr int kInCols = (kWidth - 1) * kStride + kKernel;

  __device__ PairColumn(const WeightProblem& problem, const ThreadPlaces::Place& place, const ThreadSums& sums, const T* grad_output,
                        const T* input)
      : p(problem),
        out_h(place.row * p.rows),
        out_w(place.column * kWidth),
        rows(smaller(p.rows, p.out_h - out_h)),
        first_h(out_h * kStride - p.pad_top + sums.first_row),
        first_w(out_w * kStride - p.pad_left),
        gradients(grad_output + static_cast<int64_t>(place.image) * p.out_h * p.out_w * p.channels + sums.channel),
        inputs(input + static_cast<int64_t>(place.image) * p.in_h * p.in_w * p.channels + sums.channel) {}
  __device__ PairWords<T> gradient(int j, int i) const {
    return pair_at<kWhole>(gradients, p.out_h, p.out_w, p.channels, out_h + j, out_w + i);
  }
  __device__ PairWords<T> input(int y, int x) const {
    return pair_at<kWhole>(inputs, p.in_h, p.in_w, p.channels, first_h + y, first_w + x);
  }
  __device__ void fetch_gradients(int j, PairWords<T> (&row)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) row[i] = gradient(j, i);
  }
  __device__ void fetch_inputs(int y, PairWords<T> (&row)[kInCols]) const {
#pragma unroll
    for (int x = 0; x < kInCols; ++x) row[x] = input(y, x);
  }
  __device__ bool has_input(int y, int x) const {
    return first_h + y >= 0 && first_h + y < p.in_h && first_w + x >= 0 && first_w + x < p.in_w;
  }

  const WeightProblem& p;
  int out_h, out_w, rows, first_h, first_w;
  const T *gradients, *inputs;
};

// has_last: the last row of taps exists.
template <class T, int kKernel, int kStride, bool kWhole, int kTapRows>
__device__ void add_column(const PairColumn<T, kKernel, kStride, kWhole>& column, bool has_last, float (&sums)[kTapRows][kKernel][kPair]) {
  using Column = PairColumn<T, kKernel, kStride, kWhole>;
  PairWords<T> gradients[kWidth], window[kTapRows][Column::kInCols];
  column.fetch_gradients(0, gradients);
#pragma unroll
  for (int y = 0; y < kTapRows; ++y) column.fetch_inputs(y, window[y]);
#pragma unroll 1
  for (int j = 0; j < column.rows; ++j) {
    PairWords<T> next[kWidth];
    column.fetch_gradients(j + 1, next);
#pragma unroll
    for (int r = 0; r < kTapRows; ++r) {
      if (r == kTapRows - 1 && !has_last) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
#pragma unroll
        for (int s = 0; s < kKernel; ++s) {
#pragma unroll
          for (int e = 0; e < kPair; ++e) sums[r][s][e] = fma(gradients[i].at(e), window[r][i * kStride + s].at(e), sums[r][s][e]);
        }
      }
    }
#pragma unroll
    for (int x = 0; x < Column::kInCols; ++x) {
#pragma unroll
      for (int y = 0; y < kTapRows - kStride; ++y) window[y][x] = window[y + kStride][x];
    }
#pragma unroll
    for (int y = kTapRows - kStride; y < kTapRows; ++y) column.fetch_inputs((j + 1) * kStride + y, window[y]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) gradients[i] = next[i];
  }
}

// The same of what exists alone.
template <class T, int kKernel, int kStride, bool kWhole, int kTapRows>
__device__ void add_inside(const PairColumn<T, kKernel, kStride, kWhole>& column, float (&sums)[kTapRows][kKernel][kPair]) {
#pragma unroll 1
  for (int output = 0; output < column.rows * kWidth; ++output) {
    const int j = output / kWidth, i = output % kWidth;
    if (column.out_w + i >= column.p.out_w) continue;
    const PairWords<T> gradient = column.gradient(j, i);
#pragma unroll
    for (int r = 0; r < kTapRows; ++r) {
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
        const int y = j * kStride + r, x = i * kStride + s;
        if (!column.has_input(y, x)) continue;
        const PairWords<T> input = column.input(y, x);
#pragma unroll
        for (int e = 0; e < kPair; ++e) sums[r][s][e] = fma(gradient.at(e), input.at(e), sums[r][s][e]);
      }
    }
  }
}

// Whether none of them is a NaN, nor two of them infinities of different signs.
template <int kTapRows, int kKernel>
__device__ bool are_numbers(const float (&sums)[kTapRows][kKernel][kPair]) {
  float total = 0;
#pragma unroll
  for (int i = 0; i < kTapRows * kKernel * kPair; ++i) total += sums[i / kPair / kKernel][i / kPair % kKernel][i % kPair];
  return !isnan(total);
}

// Blocks to a multiprocessor, as registers allow.
template <int kKernel, int kStride>
constexpr int kResidentBlocks = (kKernel == 5 ? 3 : 4) - (kStride - 1);

// Blocks are numbered by channels, part, split.
template <class T, int kKernel, int kStride, bool kWhole>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kKernel, kStride>)
    sum_channels(WeightProblem p, ThreadPlaces columns, const T* __restrict__ grad_output, const T* __restrict__ input,
                 float* __restrict__ partials) {
  using Column = PairColumn<T, kKernel, kStride, kWhole>;
  constexpr int kTapRows = tap_rows_of(kKernel), kTaps = kTapRows * kKernel;
  __shared__ float of_warps[kWarps][kTaps][kBlockChannels + 1];  // channels and taps in different banks
  const ThreadSums thread(p, kTapRows);
  const bool has_last = thread.first_row + kTapRows <= kKernel;
  const int begin = thread.split * p.split_size + static_cast<int>(threadIdx.x) / kColumnPairs;
  const int end = thread.channel < p.channels ? smaller(columns.count(), (thread.split + 1) * p.split_size) : 0;
  float sums[kTapRows][kKernel][kPair] = {};
#pragma unroll 1
  for (int i = begin; i < end; i += kBlockColumns) {
    add_column(Column(p, columns.at(i), thread, grad_output, input), has_last, sums);
  }
  if (!are_numbers(sums)) {
#pragma unroll
    for (int i = 0; i < kTaps * kPair; ++i) sums[i / kPair / kKernel][i / kPair % kKernel][i % kPair] = 0;
#pragma unroll 1
    for (int i = begin; i < end; i += kBlockColumns) add_inside(Column(p, columns.at(i), thread, grad_output, input), sums);
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int e = 0; e < kPair; ++e) {
      float sum = sums[tap / kKernel][tap % kKernel][e];
      sum += __shfl_down_sync(0xFFFFFFFF, sum, kColumnPairs);
      if (lane < kColumnPairs) of_warps[warp][tap][lane * kPair + e] = sum;
    }
  }
  __syncthreads();
  const int first_tap = thread.first_row * kKernel, taps = smaller(kTaps, kKernel * kKernel - first_tap);
  const int count = smaller(kBlockChannels, p.channels - thread.first_channel) * taps;
  float* result = partials + (static_cast<int64_t>(thread.split) * p.channels + thread.first_channel) * kKernel * kKernel + first_tap;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int channel = i / taps, tap = i % taps;
    float sum = of_warps[0][tap][channel];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) sum += of_warps[other][tap][channel];
    result[channel * kKernel * kKernel + tap] = sum;
  }
}

bool accepts(const Conv2dShape& s) {
  const int64_t kernel = s.kernel_h, stride = s.stride_h;
  const bool has_kernel = s.kernel_w == kernel && (kernel == 3 || kernel == 5 || (kernel == 7 && stride == 1));
  return s.layout == Layout::nhwc && s.groups == s.in_channels && s.in_channels == s.out_channels && s.in_channels % kPair == 0 &&
         has_kernel && s.stride_w == stride && (stride == 1 || stride == 2) && s.dilation_h == 1 && s.dilation_w == 1 &&
         s.dtype != DType::float64 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.out_h + kWidth, s.out_w + kWidth}), product({s.in_channels, kernel, kernel}),
                                product({s.in_h, s.in_w, s.in_channels}), product({s.out_h, s.out_w, s.in_channels})});
}

// Rows of a column: all columns have about as many.
int64_t column_rows(const Conv2dShape& s) {
  const int64_t most = s.stride_h == 1 ? 8 : 4;
  return s.out_h == 0 ? 1 : ceil_div(s.out_h, ceil_div(s.out_h, most));
}

// How the columns are divided among blocks.
struct Division {
  explicit Division(const Conv2dShape& s)
      : columns(s.batch, ceil_div(s.out_h, column_rows(s)), ceil_div<int64_t>(s.out_w, kWidth), 1),
        blocks_of_channels(ceil_div<int64_t>(s.in_channels, kBlockChannels)),
        parts(ceil_div<int64_t>(s.kernel_h, tap_rows_of(s.kernel_h))),
        targets(s.in_channels * s.kernel_h * s.kernel_w),
        splits(split_sum(columns.count(), blocks_of_channels * parts, targets, kBlockColumns, kBlockColumns)) {}
  int64_t blocks() const { return blocks_of_channels * parts * splits.count; }
  ThreadPlaces columns;
  int64_t blocks_of_channels, parts, targets;
  Splits splits;
};

Plan plan(const Conv2dShape& s) {
  const Division division(s);
  return {kBlockChannels, kBlockColumns * column_rows(s) * kWidth, division.blocks(),
          partials_bytes(s.dtype, division.splits, division.targets)};
}

template <class T, bool kWhole>
void launch_weights(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Division division(s);
  const auto function = s.kernel_h == 7   ? sum_channels<T, 7, 1, kWhole>
                        : s.kernel_h == 5 ? (s.stride_h == 1 ? sum_channels<T, 5, 1, kWhole> : sum_channels<T, 5, 2, kWhole>)
                        : s.stride_h == 1 ? sum_channels<T, 3, 1, kWhole>
                                          : sum_channels<T, 3, 2, kWhole>;
  const WeightProblem p{static_cast<int>(s.in_channels),  static_cast<int>(s.in_h),
                        static_cast<int>(s.in_w),         static_cast<int>(s.out_h),
                        static_cast<int>(s.out_w),        static_cast<int>(s.pad_top),
                        static_cast<int>(s.pad_left),     static_cast<int>(division.blocks_of_channels),
                        static_cast<int>(division.parts), static_cast<int>(division.splits.size),
                        static_cast<int>(column_rows(s))};
  launch(function, Grid(division.blocks(), kThreads), stream, p, division.columns, static_cast<const T*>(b.grad_output),
         static_cast<const T*>(b.input), static_cast<float*>(workspace));
  launch_sum_partials<T>(workspace, division.splits, division.targets, b.grad_weight, stream);
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_whole = has_whole_vectors<kPair>(static_cast<const T*>(b.input), s.in_channels) &&
                          has_whole_vectors<kPair>(static_cast<const T*>(b.grad_output), s.in_channels);
    (is_whole ? launch_weights<T, true> : launch_weights<T, false>)(s, b, workspace, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_depthwise_channels_sm80 = {
    "conv2d_backward_weight_depthwise_channels_sm80", 80, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cuda
