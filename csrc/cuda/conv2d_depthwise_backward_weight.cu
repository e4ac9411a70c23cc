// Depthwise convolution, backward_weight, in both layouts, of square kernels of 3 and 5 with strides 1 and 2 and of 7 with stride 1,
// without dilation: grad_weight[c, r, s] = sum over n, oh, ow of grad_output[n, c, oh, ow] * input[n, c, ih, iw].
//
// A thread keeps the sums of all taps of a channel in registers and walks over columns of some outputs: each row of inputs is read once for
// all outputs that it serves. In nchw a block sums for one channel, neighbouring threads taking neighbouring columns; in nhwc for 32
// channels, one to a lane, and the warps take turns at the columns. Then the block's threads add up their sums as a tree. The columns are
// divided into splits, whose partial sums a second launch adds up (pixel_reduction.cuh).
//
// The order of additions follows the shape alone. A column or a tap outside the tensors is a zero; a thread whose sums are not numbers sums
// again over what is inside, so that padding never multiplies.
//
// Not handled: several filters for a channel; float64.
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/thread_places.h"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kWarp = 32, kWarps = kBlockThreads / kWarp;

// Outputs of a column, as registers allow.
CNN_EXT_HOST_DEVICE constexpr int column_of(int64_t kernel, int64_t stride) { return kernel + 2 * stride > 7 ? 4 : 8; }

struct ColumnProblem {
  int channels, in_h, in_w, out_h, out_w, pad_top, pad_left;
};

// One column of outputs of a channel.
template <class T, Layout kLayout, int kKernel, int kStride>
struct Column {
  static constexpr int kCount = column_of(kKernel, kStride);

  __device__ Column(const ColumnProblem& problem, const ThreadPlaces::Place& place, int channel, const T* grad_output, const T* input)
      : p(problem),
        pitch(kLayout == Layout::nchw ? 1 : p.channels),
        first_out(place.row * kCount),
        out_w(place.column),
        first_h(first_out * kStride - p.pad_top),
        first_w(out_w * kStride - p.pad_left) {
    const int64_t plane = kLayout == Layout::nchw ? static_cast<int64_t>(place.image) * p.channels + channel : place.image;
    const int first = kLayout == Layout::nchw ? 0 : channel;
    gradients = grad_output + plane * p.out_h * p.out_w * pitch + first;
    inputs = input + plane * p.in_h * p.in_w * pitch + first;
  }
  __device__ bool has_output(int j) const { return first_out + j < p.out_h; }
  __device__ bool has_row(int y) const { return first_h + y >= 0 && first_h + y < p.in_h; }
  __device__ bool has_tap(int s) const { return first_w + s >= 0 && first_w + s < p.in_w; }
  __device__ float gradient(int j) const { return value_if(has_output(j), gradients + ((first_out + j) * p.out_w + out_w) * pitch); }
  __device__ float input(int y, int s) const {
    return value_if(has_row(y) && has_tap(s), inputs + ((first_h + y) * p.in_w + first_w + s) * pitch);
  }
  // Widened outside of the condition: what is only loaded needs no branch.
  __device__ static float value_if(bool exists, const T* source) {
    Vector<T, 1> value = {};
    if (exists) value = load_vector<1>(source);
    return widen(value.element[0]);
  }

  const ColumnProblem& p;
  int pitch, first_out, out_w, first_h, first_w;
  const T *gradients, *inputs;
};

template <class AnyColumn, int kKernel, int kStride>
__device__ void add_column(const AnyColumn& column, float (&sums)[kKernel][kKernel]) {
  float gradients[AnyColumn::kCount];
#pragma unroll
  for (int j = 0; j < AnyColumn::kCount; ++j) gradients[j] = column.gradient(j);
#pragma unroll
  for (int y = 0; y < (AnyColumn::kCount - 1) * kStride + kKernel; ++y) {
    float row[kKernel];
#pragma unroll
    for (int s = 0; s < kKernel; ++s) row[s] = column.input(y, s);
#pragma unroll
    for (int j = 0; j < AnyColumn::kCount; ++j) {
      const int r = y - j * kStride;
      if (r < 0 || r >= kKernel) continue;
#pragma unroll
      for (int s = 0; s < kKernel; ++s) sums[r][s] = fma(gradients[j], row[s], sums[r][s]);
    }
  }
}

// The same of what exists alone.
template <class AnyColumn, int kKernel, int kStride>
__device__ void add_inside(const AnyColumn& column, float (&sums)[kKernel][kKernel]) {
#pragma unroll 1
  for (int j = 0; j < AnyColumn::kCount && column.has_output(j); ++j) {
    const float gradient = column.gradient(j);
#pragma unroll
    for (int r = 0; r < kKernel; ++r) {
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
        const int y = j * kStride + r;
        if (column.has_row(y) && column.has_tap(s)) sums[r][s] = fma(gradient, column.input(y, s), sums[r][s]);
      }
    }
  }
}

// Blocks are numbered by channels, split.
template <class T, Layout kLayout, int kKernel, int kStride>
__global__ void __launch_bounds__(kBlockThreads, kKernel == 7 ? 1 : 2)
    sum_columns(ColumnProblem p, ThreadPlaces columns, int blocks_of_channels, int split_size, const T* __restrict__ grad_output,
                const T* __restrict__ input, float* __restrict__ partials) {
  using AnyColumn = Column<T, kLayout, kKernel, kStride>;
  constexpr int kTaps = kKernel * kKernel;
  constexpr bool kNchw = kLayout == Layout::nchw;
  __shared__ float tree[kNchw ? kWarps : kWarps / 2][kTaps][kNchw ? 1 : kWarp + 1];  // lanes and taps in different banks
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int channel_block = blockIdx.x % blocks_of_channels, split = blockIdx.x / blocks_of_channels;
  const int channel = kNchw ? channel_block : channel_block * kWarp + lane;
  const int begin = split * split_size + (kNchw ? static_cast<int>(threadIdx.x) : warp), step = kNchw ? kBlockThreads : kWarps;
  const int end = channel < p.channels ? smaller(columns.count(), (split + 1) * split_size) : 0;
  float sums[kKernel][kKernel] = {};
#pragma unroll 1
  for (int i = begin; i < end; i += step) {
    add_column<AnyColumn, kKernel, kStride>(AnyColumn(p, columns.at(i), channel, grad_output, input), sums);
  }
  bool are_numbers = true;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) are_numbers &= !isnan(sums[tap / kKernel][tap % kKernel]);
  if (!are_numbers) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) sums[tap / kKernel][tap % kKernel] = 0;
#pragma unroll 1
    for (int i = begin; i < end; i += step) {
      add_inside<AnyColumn, kKernel, kStride>(AnyColumn(p, columns.at(i), channel, grad_output, input), sums);
    }
  }
  float* result = partials + static_cast<int64_t>(split) * p.channels * kTaps;
  if constexpr (kNchw) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      float sum = sums[tap / kKernel][tap % kKernel];
#pragma unroll
      for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xFFFFFFFF, sum, half);
      if (lane == 0) tree[warp][tap][0] = sum;
    }
    __syncthreads();
    for (int tap = threadIdx.x; tap < kTaps; tap += kBlockThreads) {
      float sum = tree[0][tap][0];
#pragma unroll
      for (int i = 1; i < kWarps; ++i) sum += tree[i][tap][0];
      result[channel * kTaps + tap] = sum;
    }
  } else {
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2) {
      if (warp >= half && warp < 2 * half) {
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) tree[warp - half][tap][lane] = sums[tap / kKernel][tap % kKernel];
      }
      __syncthreads();
      if (warp < half) {
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) sums[tap / kKernel][tap % kKernel] += tree[warp][tap][lane];
      }
      __syncthreads();
    }
    if (warp == 0) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) tree[0][tap][lane] = sums[tap / kKernel][tap % kKernel];
    }
    __syncthreads();
    const int first = channel_block * kWarp, count = smaller(kWarp, p.channels - first) * kTaps;
    for (int i = threadIdx.x; i < count; i += kBlockThreads) result[first * kTaps + i] = tree[0][i % kTaps][i / kTaps];
  }
}

bool accepts(const Conv2dShape& s) {
  const int64_t kernel = s.kernel_h, stride = s.stride_h;
  const bool has_kernel = s.kernel_w == kernel && (kernel == 3 || kernel == 5 || (kernel == 7 && stride == 1));
  return s.groups == s.in_channels && s.in_channels == s.out_channels && has_kernel && s.stride_w == stride &&
         (stride == 1 || stride == 2) && s.dilation_h == 1 && s.dilation_w == 1 && s.dtype != DType::float64 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.out_h + column_of(kernel, stride), s.out_w}), product({s.in_channels, kernel, kernel}),
                                product({s.in_h, s.in_w, s.in_channels}), product({s.out_h, s.out_w, s.in_channels})});
}

// How the columns are divided among blocks.
struct Division {
  explicit Division(const Conv2dShape& s)
      : columns(s.batch, ceil_div<int64_t>(s.out_h, column_of(s.kernel_h, s.stride_h)), s.out_w, 1),
        blocks_of_channels(s.layout == Layout::nchw ? s.in_channels : ceil_div<int64_t>(s.in_channels, kWarp)),
        targets(s.in_channels * s.kernel_h * s.kernel_w),
        splits(split_sum(columns.count(), blocks_of_channels, targets, s.layout == Layout::nchw ? kBlockThreads : kWarps,
                         s.layout == Layout::nchw ? kBlockThreads : 2 * kWarps)) {}
  ThreadPlaces columns;
  int64_t blocks_of_channels, targets;
  Splits splits;
};

Plan plan(const Conv2dShape& s) {
  const Division division(s);
  return {s.layout == Layout::nchw ? 1 : kWarp, column_of(s.kernel_h, s.stride_h), division.blocks_of_channels * division.splits.count,
          partials_bytes(s.dtype, division.splits, division.targets)};
}

template <class T, Layout kLayout>
void launch_weights(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Division division(s);
  const auto function = s.kernel_h == 7   ? sum_columns<T, kLayout, 7, 1>
                        : s.kernel_h == 5 ? (s.stride_h == 1 ? sum_columns<T, kLayout, 5, 1> : sum_columns<T, kLayout, 5, 2>)
                        : s.stride_h == 1 ? sum_columns<T, kLayout, 3, 1>
                                          : sum_columns<T, kLayout, 3, 2>;
  const ColumnProblem p{static_cast<int>(s.in_channels), static_cast<int>(s.in_h),  static_cast<int>(s.in_w),
                        static_cast<int>(s.out_h),       static_cast<int>(s.out_w), static_cast<int>(s.pad_top),
                        static_cast<int>(s.pad_left)};
  launch(function, division.blocks_of_channels * division.splits.count, stream, p, division.columns,
         static_cast<int>(division.blocks_of_channels), static_cast<int>(division.splits.size), static_cast<const T*>(b.grad_output),
         static_cast<const T*>(b.input), static_cast<float*>(workspace));
  launch_sum_partials<T>(workspace, division.splits, division.targets, b.grad_weight, stream);
}

template <class T>
void run_of(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  (s.layout == Layout::nchw ? launch_weights<T, Layout::nchw> : launch_weights<T, Layout::nhwc>)(s, b, workspace, stream);
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) { run_of<decltype(element)>(s, b, workspace, stream); });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_depthwise_sm80 = {
    "conv2d_backward_weight_depthwise_sm80", 80, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cuda
