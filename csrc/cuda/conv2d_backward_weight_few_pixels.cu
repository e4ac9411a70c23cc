// grad_weight of few pixels and few weights, as one small image gives them, in a single launch: where there is next to no work, a second
// launch and every wait for memory after the first are what a problem takes.
//
// A block has one weight (c, r, s) of a chunk of neighbouring output channels k; its threads take the pixels (n, oh, ow), kPixelsAtOnce of
// them at a time, whose reads are all on their way together. Order of additions: those of a thread, those of a warp's threads as a tree,
// those of the warps.
//
// Padding never multiplies: its pixels are left out.
//
// Not handled: groups; more pixels or weights, of which tensor cores make more than a wait.
#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kWarp = 32, kWarps = kBlockThreads / kWarp;
constexpr int kPixelsAtOnce = 4;  // of a thread
constexpr int64_t kMostPixels = 4 * kPixelsAtOnce * kBlockThreads;

template <class T>
struct FewPixels {
  FewPixels(const Conv2dShape& s, const Conv2dBuffers& b)
      : g(s),
        input(static_cast<const T*>(b.input)),
        grad_output(static_cast<const T*>(b.grad_output)),
        grad_weight(static_cast<T*>(b.grad_weight)),
        pixels(g.batch * g.out_h * g.out_w),
        chunks(ceil_div(g.group_out, kChunk<T>)),
        pixel_decoder(g.out_h, g.out_w),
        tap_decoder(g.group_in, g.kernel_h, g.kernel_w),
        whole_chunks(s.layout == Layout::nhwc && s.out_channels % kChunk<T> == 0 && is_aligned(b.grad_output)) {}

  Conv2dGeometry g;
  const T* input;
  const T* grad_output;
  T* grad_weight;
  int pixels, chunks;  // of output channels
  PlaneDecoder pixel_decoder;
  TapDecoder<Layout::nchw> tap_decoder;
  bool whole_chunks;  // whether grad_output may be read by chunks
};

// What lies in grad_output of the first `count` channels from k on, of one pixel.
template <class T>
__device__ void load_channels(const FewPixels<T>& p, const PlaneIndex& at, int k, int count, Accumulate<T> (&values)[kChunk<T>]) {
  const T* source = p.grad_output + at.outer * p.g.out.n + at.h * p.g.out.h + at.w * p.g.out.w + k * p.g.out.c;
  if (p.whole_chunks) return load_chunk(source, count, true, values);
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) values[i] = widen(source[i < count ? i * p.g.out.c : 0]);
}

// Blocks are numbered by chunk, then by weight.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) few_pixels(FewPixels<T> p) {
  using Acc = Accumulate<T>;
  __shared__ Acc warp_sums[kWarps][kChunk<T>];
  const Conv2dGeometry& g = p.g;
  const int thread = static_cast<int>(threadIdx.x), weight = static_cast<int>(blockIdx.x) / p.chunks;
  const int k = (static_cast<int>(blockIdx.x) - weight * p.chunks) * kChunk<T>, count = smaller(kChunk<T>, g.group_out - k);
  const Tap tap = p.tap_decoder.at(weight);
  const int tap_h = tap.r * g.dilation_h - g.pad_top, tap_w = tap.s * g.dilation_w - g.pad_left;
  Acc sums[kChunk<T>] = {};
  for (int first = thread; first < p.pixels; first += kPixelsAtOnce * kBlockThreads) {
    Acc inputs[kPixelsAtOnce], gradients[kPixelsAtOnce][kChunk<T>];
    bool exists[kPixelsAtOnce];
#pragma unroll
    for (int i = 0; i < kPixelsAtOnce; ++i) {
      const int pixel = first + i * kBlockThreads;
      const PlaneIndex at = p.pixel_decoder.at(smaller(pixel, p.pixels - 1));
      const int h = at.h * g.stride_h + tap_h, w = at.w * g.stride_w + tap_w;
      exists[i] = pixel < p.pixels && h >= 0 && h < g.in_h && w >= 0 && w < g.in_w;
      inputs[i] = widen(p.input[exists[i] ? at.outer * g.in.n + tap.channel * g.in.c + h * g.in.h + w * g.in.w : 0]);
      load_channels(p, at, k, count, gradients[i]);
    }
#pragma unroll
    for (int i = 0; i < kPixelsAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) sums[j] = exists[i] ? fma(inputs[i], gradients[i][j], sums[j]) : sums[j];
    }
  }
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) {
#pragma unroll
    for (int half = kWarp / 2; half > 0; half /= 2) sums[j] += __shfl_down_sync(0xFFFFFFFF, sums[j], half);
    if (thread % kWarp == 0) warp_sums[thread / kWarp][j] = sums[j];
  }
  __syncthreads();
  if (thread >= count) return;
  Acc sum = warp_sums[0][thread];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += warp_sums[warp][thread];
  p.grad_weight[(k + thread) * g.filter.n + tap.channel * g.filter.c + tap.r * g.filter.h + tap.s * g.filter.w] = narrow<T>(sum);
}

int64_t chunk_of(DType dtype) {
  return dtype == DType::float64 ? kChunk<double> : dtype == DType::float32 ? kChunk<float> : kChunk<__half>;
}

int64_t blocks_of(const Conv2dShape& s) {
  return product({ceil_div(s.out_channels, chunk_of(s.dtype)), s.in_channels, s.kernel_h, s.kernel_w});
}

// Up to four blocks to a multiprocessor, all of which run at once.
bool accepts(const Conv2dShape& s) {
  const int64_t pixels = product({s.batch, s.out_h, s.out_w}), input_pixels = product({s.batch, s.in_h, s.in_w});
  return s.groups == 1 && has_int_extents(s) && pixels > 0 && pixels <= kMostPixels && input_pixels > 0 && input_pixels < kMaxExtent &&
         blocks_of(s) <= kWantedBlocks;
}

Plan plan(const Conv2dShape& s) { return {chunk_of(s.dtype), kPixelsAtOnce * kBlockThreads, blocks_of(s), 0}; }

void run(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    launch(few_pixels<T>, blocks_of(s), stream, FewPixels<T>(s, b));
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_few_pixels_sm80 = {
    "conv2d_backward_weight_few_pixels_sm80", 80, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cuda
