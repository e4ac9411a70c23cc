// Depthwise convolution in nhwc, forward and backward_input, in every type.
//
// A thread computes a strip of 4 pixels of a chunk of channels (see depthwise.cuh). Square kernels of 3, 5 and 7 are unrolled, their
// filters lie in shared memory, [taps][channels]; with stride and dilation 1 each input is read once for all pixels of the strip that it
// serves. Every other kernel reads its filters through the caches. backward_input with stride 1 is forward with the filter turned round;
// with a stride a thread computes one input and visits only the outputs whose windows hold it.
//
// A sum takes its taps (r, s) in order, one fused multiplication each, whatever the tile; padding is skipped, so it never multiplies.
//
// Not handled: nchw; several filters for a channel. Bound by memory up to 5 x 5, by multiplications beyond in 16 bits.
#include "cuda/depthwise.cuh"

namespace cnn_ext::cuda {
namespace {

struct Problem {
  Axis h, w;
  int channels;
  int strips;      // of the whole batch
  bool is_turned;  // the filter
  bool is_whole;
};

template <class T>
__device__ int64_t filter_index(const Problem& p, int channel, int tap) {
  const int taps = p.h.kernel * p.w.kernel;
  return static_cast<int64_t>(channel) * taps + (p.is_turned ? taps - 1 - tap : tap);
}

// Adds filter * value to a sum of the strip.
template <class T>
__device__ void add_products(const Accumulate<T>* filter, const Accumulate<T> (&value)[kChunk<T>], Accumulate<T> (&sum)[kChunk<T>]) {
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) sum[i] = fma(filter[i], value[i], sum[i]);
}

template <class T>
__device__ void add_bias(const T* bias, const ChannelChunk<T>& chunk, Accumulate<T> (&sum)[kChunk<T>]) {
  if (bias == nullptr) return;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) sum[i] += widen(bias[chunk.existing(i)]);
}

// One row of taps. filters: [kKernel][channels of the block], from this thread's first channel on.
template <class T, int kKernel>
__device__ void add_row(const Problem& p, const T* row, int first_w, int count, const Accumulate<T>* filters,
                        Accumulate<T> (&sums)[kStrip][kChunk<T>]) {
  const int64_t pitch = p.channels;
  if (p.w.stride == 1 && p.w.dilation == 1) {
#pragma unroll
    for (int x = 0; x < kKernel + kStrip - 1; ++x) {
      if (first_w + x < 0 || first_w + x >= p.w.in) continue;
      Accumulate<T> value[kChunk<T>];
      load_chunk(row + (first_w + x) * pitch, count, p.is_whole, value);
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        if (x - o >= 0 && x - o < kKernel) add_products<T>(filters + (x - o) * kLaneChannels<T>, value, sums[o]);
      }
    }
  } else {
#pragma unroll 1
    for (int s = 0; s < kKernel; ++s) {
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        const int w = first_w + o * p.w.stride + s * p.w.dilation;
        if (w < 0 || w >= p.w.in) continue;
        Accumulate<T> value[kChunk<T>];
        load_chunk(row + w * pitch, count, p.is_whole, value);
        add_products<T>(filters + s * kLaneChannels<T>, value, sums[o]);
      }
    }
  }
}

// A row of taps of any number, with the filters from global memory.
template <class T>
__device__ void add_any_row(const Problem& p, const T* row, int first_w, const ChannelChunk<T>& chunk, const T* weight, int first_tap,
                            Accumulate<T> (&sums)[kStrip][kChunk<T>]) {
#pragma unroll 1
  for (int s = 0; s < p.w.kernel; ++s) {
    Accumulate<T> filter[kChunk<T>];
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      filter[i] = widen(weight[filter_index<T>(p, chunk.existing(i), first_tap + s)]);
    }
#pragma unroll
    for (int o = 0; o < kStrip; ++o) {
      const int w = first_w + o * p.w.stride + s * p.w.dilation;
      if (w < 0 || w >= p.w.in) continue;
      Accumulate<T> value[kChunk<T>];
      load_chunk(row + static_cast<int64_t>(w) * p.channels, chunk.count, p.is_whole, value);
      add_products<T>(filter, value, sums[o]);
    }
  }
}

// kKernel: of a square kernel; 0: any. Blocks are numbered by channels, strips.
template <class T, int kKernel>
__global__ void __launch_bounds__(kBlockThreads, 2)
    depthwise(Problem p, int blocks_of_channels, const T* __restrict__ input, const T* __restrict__ weight, const T* __restrict__ bias,
              T* __restrict__ output) {
  using Acc = Accumulate<T>;
  __shared__ Acc filters[kKernel == 0 ? 1 : kKernel * kKernel][kLaneChannels<T>];
  const int channel_block = blockIdx.x % blocks_of_channels;
  if constexpr (kKernel != 0) {
    for (int i = threadIdx.x; i < kKernel * kKernel * kLaneChannels<T>; i += kBlockThreads) {
      const int lane = i / (kKernel * kKernel), tap = i % (kKernel * kKernel), channel = channel_block * kLaneChannels<T> + lane;
      filters[tap][lane] = channel < p.channels ? widen(weight[filter_index<T>(p, channel, tap)]) : Acc{0};
    }
    __syncthreads();
  }
  const ChannelChunk<T> chunk(channel_block, p.channels);
  const int strip = blockIdx.x / blocks_of_channels * kBlockStrips + threadIdx.x / kLaneChunks, row_strips = ceil_div(p.w.out, kStrip);
  if (chunk.count <= 0 || strip >= p.strips) return;
  const int out_w = strip % row_strips * kStrip, row = strip / row_strips, out_h = row % p.h.out, n = row / p.h.out;
  const int first_h = out_h * p.h.stride + p.h.first, first_w = out_w * p.w.stride + p.w.first;
  const Acc* lane_filters = filters[0] + threadIdx.x % kLaneChunks * kChunk<T>;
  Acc sums[kStrip][kChunk<T>] = {};
#pragma unroll 1
  for (int r = 0; r < p.h.kernel; ++r) {
    const int h = first_h + r * p.h.dilation;
    if (h < 0 || h >= p.h.in) continue;
    const T* in_row = input + (static_cast<int64_t>(n) * p.h.in + h) * p.w.in * p.channels + chunk.first;
    if constexpr (kKernel == 0) {
      add_any_row(p, in_row, first_w, chunk, weight, r * p.w.kernel, sums);
    } else {
      add_row<T, kKernel>(p, in_row, first_w, chunk.count, lane_filters + r * kKernel * kLaneChannels<T>, sums);
    }
  }
  T* target = output + ((static_cast<int64_t>(n) * p.h.out + out_h) * p.w.out + out_w) * p.channels + chunk.first;
#pragma unroll
  for (int o = 0; o < kStrip; ++o) {
    if (out_w + o >= p.w.out) continue;
    add_bias(bias, chunk, sums[o]);
    store_chunk(target + static_cast<int64_t>(o) * p.channels, chunk.count, p.is_whole, sums[o]);
  }
}

// One input for each thread. Blocks are numbered by channels, pixels.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    depthwise_backward_strided(Conv2dGeometry g, bool is_whole, int blocks_of_channels, int pixels, const T* __restrict__ grad_output,
                               const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ grad_input) {
  const ChannelChunk<T> chunk(blockIdx.x % blocks_of_channels, g.groups);
  const int pixel = blockIdx.x / blocks_of_channels * kBlockStrips + threadIdx.x / kLaneChunks;
  if (chunk.count <= 0 || pixel >= pixels) return;
  const int in_w = pixel % g.in_w, in_h = pixel / g.in_w % g.in_h, n = pixel / g.in_w / g.in_h;
  const int padded_h = in_h + g.pad_top, padded_w = in_w + g.pad_left;
  const Range rows = windows_over(padded_h, g.stride_h, g.dilation_h, g.kernel_h, g.out_h);
  const Range cols = windows_over(padded_w, g.stride_w, g.dilation_w, g.kernel_w, g.out_w);
  Accumulate<T> sum[kChunk<T>] = {};
  for (int oh = rows.begin; oh < rows.end; ++oh) {
    const int offset_h = padded_h - oh * g.stride_h;
    if (offset_h % g.dilation_h != 0) continue;
    for (int ow = cols.begin; ow < cols.end; ++ow) {
      const int offset_w = padded_w - ow * g.stride_w;
      if (offset_w % g.dilation_w != 0) continue;
      Accumulate<T> value[kChunk<T>], filter[kChunk<T>];
      load_chunk(grad_output + n * g.out.n + oh * g.out.h + ow * g.out.w + chunk.first, chunk.count, is_whole, value);
      const T* tap = weight + offset_h / g.dilation_h * g.filter.h + offset_w / g.dilation_w * g.filter.w;
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) filter[i] = widen(tap[chunk.existing(i) * g.filter.n]);
      add_products<T>(filter, value, sum);
    }
  }
  add_bias(bias, chunk, sum);
  store_chunk(grad_input + n * g.in.n + in_h * g.in.h + in_w * g.in.w + chunk.first, chunk.count, is_whole, sum);
}

int64_t strips(const Conv2dShape& s, bool forward) {
  return forward ? s.batch * s.out_h * ceil_div<int64_t>(s.out_w, kStrip) : s.batch * s.in_h * ceil_div<int64_t>(s.in_w, kStrip);
}

int64_t blocks(const Conv2dShape& s, int64_t threads_along_pixels) {
  return channel_blocks(s.dtype, s.in_channels) * ceil_div<int64_t>(threads_along_pixels, kBlockStrips);
}

template <class T>
void launch_depthwise(const Problem& p, int64_t count, const void* input, const void* weight, const void* bias, void* output,
                      cudaStream_t stream) {
  const int kernel = p.h.kernel == p.w.kernel ? p.h.kernel : 0;
  const auto function = kernel == 3 ? depthwise<T, 3> : kernel == 5 ? depthwise<T, 5> : kernel == 7 ? depthwise<T, 7> : depthwise<T, 0>;
  launch(function, count, stream, p, static_cast<int>(channel_blocks<T>(p.channels)), static_cast<const T*>(input),
         static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(output));
}

Plan plan_forward(const Conv2dShape& s) { return {kLaneChunks, kBlockStrips * kStrip, blocks(s, strips(s, true)), 0}; }

void run_forward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const Problem p{forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h),
                    forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w),
                    static_cast<int>(s.in_channels),
                    static_cast<int>(strips(s, true)),
                    false,
                    are_chunks_whole<T>(static_cast<int>(s.in_channels), b.input, b.output)};
    launch_depthwise<T>(p, plan_forward(s).blocks, b.input, b.weight, b.bias, b.output, stream);
  });
}

bool has_stride(const Conv2dShape& s) { return s.stride_h != 1 || s.stride_w != 1; }

Plan plan_backward(const Conv2dShape& s) {
  if (has_stride(s)) return {kLaneChunks, kBlockStrips, blocks(s, s.batch * s.in_h * s.in_w), 0};
  return {kLaneChunks, kBlockStrips * kStrip, blocks(s, strips(s, false)), 0};
}

template <class T>
void run_backward_of(const Conv2dShape& s, const Conv2dBuffers& b, cudaStream_t stream) {
  const int channels = static_cast<int>(s.in_channels);
  const bool is_whole = are_chunks_whole<T>(channels, b.grad_output, b.grad_input);
  if (has_stride(s)) {
    launch(depthwise_backward_strided<T>, plan_backward(s).blocks, stream, Conv2dGeometry(s), is_whole,
           static_cast<int>(channel_blocks<T>(channels)), static_cast<int>(s.batch * s.in_h * s.in_w), static_cast<const T*>(b.grad_output),
           static_cast<const T*>(b.weight), static_cast<const T*>(b.bias), static_cast<T*>(b.grad_input));
    return;
  }
  const Problem p{backward_axis(s.in_h, s.out_h, s.kernel_h, s.pad_top, s.dilation_h),
                  backward_axis(s.in_w, s.out_w, s.kernel_w, s.pad_left, s.dilation_w),
                  channels,
                  static_cast<int>(strips(s, false)),
                  true,
                  is_whole};
  launch_depthwise<T>(p, plan_backward(s).blocks, b.grad_output, b.weight, b.bias, b.grad_input, stream);
}

void run_backward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) { run_backward_of<decltype(element)>(s, b, stream); });
}

}  // namespace

extern const Conv2dKernel conv2d_forward_depthwise_sm80 = {
    "conv2d_forward_depthwise_sm80", 80, Conv2dDirection::forward, is_depthwise_nhwc, plan_forward, run_forward};
extern const Conv2dKernel conv2d_backward_input_depthwise_sm80 = {"conv2d_backward_input_depthwise_sm80",
                                                                  80,
                                                                  Conv2dDirection::backward_input,
                                                                  is_depthwise_nhwc,
                                                                  plan_backward,
                                                                  run_backward,
                                                                  /*needs_proof=*/false,
                                                                  /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
