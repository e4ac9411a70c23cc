// grad_bias[k] = sum over n, oh, ow of grad_output[n, k, oh, ow]: a reduction over pixels. Through ReLU and pooling too: each window's
// gradient goes to one of its outputs, or to none.
//
// The gradient is read by chunks of 16 bytes: in nhwc a thread owns kChunk neighbouring channels and walks over pixels, in nchw a block
// owns a channel, and its threads walk over the chunks of its planes. Eight chunks are on their way at a time, and blocks have just as many
// terms where there are few: it waits for memory once. Chunks that are not aligned are read element by element and added up alike. Bound by
// memory; the partial sums of blocks are added up by a second launch (pixel_reduction.cuh).
//
// wide: pixel by pixel, where an int does not count them.
#include <type_traits>

#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {
namespace {

template <class T>
struct BiasTerms {
  using Element = T;
  using Acc = Accumulate<T>;
  using Target = int64_t;  // k

  __device__ Target target(int64_t k) const { return k; }
  template <class Integer>
  __device__ Acc term(Target k, const PlaneIndexOf<Integer>& pixel) const {
    return widen(grad_output[pixel.outer * out.n + k * out.c + pixel.h * out.h + pixel.w * out.w]);
  }
  __device__ int64_t offset(Target k) const { return k; }
  // The first `count` terms from an element on, of a chunk; the others are anything.
  __device__ void load(int64_t first, int count, bool is_whole, Acc (&terms)[kChunk<T>]) const {
    load_chunk(grad_output + first, count, is_whole, terms);
  }
  bool are_chunks_aligned() const { return is_aligned(grad_output); }

  const T* grad_output;
  Strides out;
  int64_t targets;
};

// Of the pooled gradient, in the pixels of the pooled output: what the ReLU stopped is left out.
template <class T>
struct PooledBiasTerms {
  using Element = T;
  using Acc = Accumulate<T>;
  using Target = int64_t;  // k

  __device__ Target target(int64_t k) const { return k; }
  template <class Integer>
  __device__ Acc term(Target k, const PlaneIndexOf<Integer>& pixel) const {
    const int64_t index = pixel.outer * pooled.n + k * pooled.c + pixel.h * pooled.h + pixel.w * pooled.w;
    const bool stops = offsets != nullptr ? offsets[index] == kNoGradient : widen(output[index]) <= 0;
    return stops ? Acc{0} : widen(grad_output[index]);
  }
  __device__ int64_t offset(Target k) const { return k; }
  __device__ void load(int64_t first, int count, bool is_whole, Acc (&terms)[kChunk<T>]) const {
    load_chunk(grad_output + first, count, is_whole, terms);
    if (offsets != nullptr) {
      const Vector<uint8_t, kChunk<T>> taps = load_some<kChunk<T>>(offsets + first, count, is_whole);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) terms[i] = taps.element[i] == kNoGradient ? Acc{0} : terms[i];
    } else {
      Acc outputs[kChunk<T>];
      load_chunk(output + first, count, is_whole, outputs);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) terms[i] = outputs[i] <= 0 ? Acc{0} : terms[i];
    }
  }
  bool are_chunks_aligned() const { return is_aligned(grad_output) && is_aligned(offsets) && is_aligned(output); }

  const T* grad_output;
  const uint8_t* offsets;  // null: there is no pooling
  const T* output;
  Strides pooled;
  int64_t targets;
};

constexpr int kChunksInFlight = 8;
constexpr int64_t kWantedBiasBlocks = 264;  // two for each of 132 multiprocessors

int64_t chunk_elements(DType dtype) {
  return dtype == DType::float64 ? kChunk<double> : dtype == DType::float32 ? kChunk<float> : kChunk<__half>;
}

// How the chunks of the gradient are shared: a column of a block is kChunk channels in nhwc, a channel in nchw, whose chunks are numbered
// and taken by the block's lanes.
struct BiasChunks {
  explicit BiasChunks(const Conv2dShape& s)
      : channels(static_cast<int>(s.out_channels)),
        plane(static_cast<int>(s.out_h * s.out_w)),
        plane_chunks(static_cast<int>(ceil_div(s.out_h * s.out_w, chunk_elements(s.dtype)))),
        columns(static_cast<int>(s.layout == Layout::nchw ? s.out_channels : ceil_div(s.out_channels, chunk_elements(s.dtype)))),
        chunks(static_cast<int>(s.batch * (s.layout == Layout::nchw ? ceil_div(s.out_h * s.out_w, chunk_elements(s.dtype)) : plane))) {
    while (s.layout == Layout::nhwc && width < 32 && width < columns) width *= 2;
  }
  CNN_EXT_HOST_DEVICE int lanes() const { return kBlockThreads / width; }
  CNN_EXT_HOST_DEVICE int column_blocks() const { return ceil_div(columns, width); }

  int channels, plane;
  FastDivisor plane_chunks;  // nchw: of a plane
  int columns, chunks;       // all of them, and of each
  int width = 1;             // columns of a block
};

template <class Terms, Layout kLayout, bool kWhole>
__global__ void __launch_bounds__(kBlockThreads, /*blocks=*/1)  // with more, the assembler spills a register
    reduce_chunks(Terms terms, BiasChunks b, int split_chunks, typename Terms::Acc* partials) {
  using Acc = typename Terms::Acc;
  constexpr int kElements = kChunk<typename Terms::Element>, kSums = kLayout == Layout::nchw ? 1 : kElements;
  __shared__ Acc shared[kSums][kBlockThreads];
  const int split = static_cast<int>(blockIdx.x) / b.column_blocks();
  const int column = static_cast<int>(blockIdx.x) % b.column_blocks() * b.width + static_cast<int>(threadIdx.x) % b.width;
  const int begin = split * split_chunks + static_cast<int>(threadIdx.x) / b.width;
  const int end = column < b.columns ? smaller(b.chunks, (split + 1) * split_chunks) : begin;
  Acc sums[kSums] = {};
  for (int chunk = begin; chunk < end; chunk += kChunksInFlight * b.lanes()) {
    Acc values[kChunksInFlight][kElements];
    int counts[kChunksInFlight];
#pragma unroll
    for (int i = 0; i < kChunksInFlight; ++i) {
      const int wanted = chunk + i * b.lanes(), taken = wanted < end ? wanted : chunk;
      int64_t first = static_cast<int64_t>(taken) * b.channels + column * kElements;
      int count = b.channels - column * kElements;
      if constexpr (kLayout == Layout::nchw) {
        const int image = b.plane_chunks.quotient(taken), place = (taken - image * b.plane_chunks.divisor()) * kElements;
        first = (static_cast<int64_t>(image) * b.channels + column) * b.plane + place;
        count = b.plane - place;
      }
      terms.load(first, kWhole ? kElements : count, kWhole, values[i]);
      counts[i] = wanted < end ? count : 0;
    }
#pragma unroll
    for (int i = 0; i < kChunksInFlight; ++i) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) sums[e % kSums] += e < counts[i] ? values[i][e] : Acc{0};
    }
  }
#pragma unroll
  for (int e = 0; e < kSums; ++e) shared[e][threadIdx.x] = sums[e];
  __syncthreads();
  for (int half = kBlockThreads / 2; half >= b.width; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
#pragma unroll
      for (int e = 0; e < kSums; ++e) shared[e][threadIdx.x] += shared[e][threadIdx.x + half];
    }
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) >= b.width || column >= b.columns) return;
  Acc* targets = partials + static_cast<int64_t>(split) * b.channels + column * kSums;
#pragma unroll
  for (int e = 0; e < kSums; ++e) {
    if (column * kSums + e < b.channels) targets[e] = shared[e][threadIdx.x];
  }
}

Splits bias_splits(const BiasChunks& b) {
  const int64_t wanted = ceil_div<int64_t>(kWantedBiasBlocks, larger(b.column_blocks(), 1));
  const int64_t size = larger<int64_t>(ceil_div<int64_t>(b.chunks, wanted), kChunksInFlight * b.lanes());
  return {larger<int64_t>(ceil_div<int64_t>(b.chunks, size), 1), size};
}

Plan plan_chunks(const Conv2dShape& s) {
  const BiasChunks b(s);
  const Splits splits = bias_splits(b);
  return {b.width * (s.layout == Layout::nchw ? 1 : chunk_elements(s.dtype)), b.lanes(), b.column_blocks() * splits.count,
          partials_bytes(s.dtype, splits, s.out_channels)};
}

template <class T, class Terms>
void run_chunks(const Conv2dShape& s, const Terms& terms, void* workspace, void* grad_bias, cudaStream_t stream) {
  const BiasChunks b(s);
  const Splits splits = bias_splits(b);
  const int64_t inner = s.layout == Layout::nchw ? b.plane : b.channels;
  const bool is_whole = inner % kChunk<T> == 0 && terms.are_chunks_aligned();
  const auto of_layout = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    return s.layout == Layout::nchw ? reduce_chunks<Terms, Layout::nchw, kWhole> : reduce_chunks<Terms, Layout::nhwc, kWhole>;
  };
  launch(is_whole ? of_layout(std::true_type{}) : of_layout(std::false_type{}), b.column_blocks() * splits.count, stream, terms, b,
         static_cast<int>(splits.size), static_cast<Accumulate<T>*>(workspace));
  launch_sum_partials<T>(workspace, splits, s.out_channels, grad_bias, stream);
}

// Chunks are numbered by ints.
bool accepts(const Conv2dShape& s) { return has_int_extents(s) && all_below(kMaxExtent, {product({s.batch, s.out_h, s.out_w})}); }

// A convolution whose output has the pooled size.
Conv2dShape pooled_conv(const Conv2dReluPoolShape& s) {
  Conv2dShape conv = s.conv;
  conv.out_h = s.pooled_h, conv.out_w = s.pooled_w;
  return conv;
}

bool accepts_pooled(const Conv2dReluPoolShape& s) { return accepts(pooled_conv(s)) && has_offset_taps(s); }

Plan plan_pooled(const Conv2dReluPoolShape& s) { return plan_chunks(pooled_conv(s)); }
Plan plan_pooled_wide(const Conv2dReluPoolShape& s) { return plan_reduction<int64_t>(pooled_conv(s), s.conv.out_channels); }
Plan plan_wide(const Conv2dShape& s) { return plan_reduction<int64_t>(s, s.out_channels); }

template <bool kWide, class T, class Terms>
void run_terms(const Conv2dShape& s, const Terms& terms, void* workspace, void* grad_bias, cudaStream_t stream) {
  if constexpr (kWide) {
    run_reduction<T, int64_t>(s, terms, workspace, grad_bias, stream);
  } else {
    run_chunks<T>(s, terms, workspace, grad_bias, stream);
  }
}

template <bool kWide>
void run_pooled(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, cudaStream_t stream) {
  const Conv2dShape conv = pooled_conv(s);
  with_element_type(conv.dtype, [&](auto element) {
    using T = decltype(element);
    const PooledBiasTerms<T> terms{static_cast<const T*>(b.grad_output), b.offsets, static_cast<const T*>(b.output),
                                   strides_of(conv.layout, conv.out_channels, conv.out_h, conv.out_w), conv.out_channels};
    run_terms<kWide, T>(conv, terms, workspace, b.grad_bias, stream);
  });
}

template <bool kWide>
void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const BiasTerms<T> terms{static_cast<const T*>(b.grad_output), strides_of(s.layout, s.out_channels, s.out_h, s.out_w), s.out_channels};
    run_terms<kWide, T>(s, terms, workspace, b.grad_bias, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_bias_reduction_sm80 = {
    "conv2d_backward_bias_reduction_sm80", 80, Conv2dDirection::backward_bias, accepts, plan_chunks, run<false>};
extern const Conv2dKernel conv2d_backward_bias_wide_sm80 = {
    "conv2d_backward_bias_wide_sm80", 80, Conv2dDirection::backward_bias, has_any_extents, plan_wide, run<true>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_bias_reduction_sm80 = {
    "conv2d_relu_max_pool2d_backward_bias_reduction_sm80",
    80,
    Conv2dDirection::backward_bias,
    accepts_pooled,
    plan_pooled,
    run_pooled<false>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_bias_wide_sm80 = {"conv2d_relu_max_pool2d_backward_bias_wide_sm80",
                                                                                    80,
                                                                                    Conv2dDirection::backward_bias,
                                                                                    has_offset_taps,
                                                                                    plan_pooled_wide,
                                                                                    run_pooled<true>};

}  // namespace cnn_ext::cuda
