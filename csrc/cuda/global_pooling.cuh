// What the kernels of pooling over whole planes share.
#pragma once

#include "cuda/pooling.cuh"

namespace cnn_ext::cuda {

constexpr int64_t kLargePlane = 4096;  // pixels

inline bool is_global(const Pool2dShape& s) {
  return s.out_h == 1 && s.out_w == 1 && s.kernel_h == s.in_h && s.kernel_w == s.in_w && s.dilation_h == 1 && s.dilation_w == 1 &&
         s.pad_top == 0 && s.pad_bottom == 0 && s.pad_left == 0 && s.pad_right == 0 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.channels, s.in_h, s.in_w})});
}

inline int64_t plane_size(const Pool2dShape& s) { return s.in_h * s.in_w; }
inline bool is_large(const Pool2dShape& s) { return plane_size(s) >= kLargePlane; }
inline int64_t divisor(const Pool2dShape& s) { return s.divisor_override != 0 ? s.divisor_override : plane_size(s); }

// Of a tensor in nhwc, what lies at some channels.
struct ChannelsOfPixels {
  int channels;   // of a pixel
  int count;      // that exist of this thread's chunk: none if not positive
  bool is_whole;  // all chunks of pixels are 16 aligned bytes
};

// Adds up a chunk of channels of `pixels` pixels for each of kChunks: threads with neighbouring numbers take neighbouring chunks, the
// kLanes threads of a chunk every kLanes-th pixel, and then their sums are added up as a tree, in whose root tree[0] they are. kAtOnce:
// loads of a thread on their way.
template <int kAtOnce, class T, int kLanes, int kChunks>
__device__ void add_up_pixels(const T* source, const ChannelsOfPixels& of, int pixels, Accumulate<T> (&tree)[kLanes][kChunks][kChunk<T>]) {
  const int chunk = threadIdx.x % kChunks, lane = threadIdx.x / kChunks;
  Accumulate<T> sums[kChunk<T>] = {};
  if (of.count > 0) {
#pragma unroll kAtOnce
    for (int pixel = lane; pixel < pixels; pixel += kLanes) {
      Accumulate<T> values[kChunk<T>];
      load_chunk(source + pixel * of.channels, of.count, of.is_whole, values);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) sums[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) tree[lane][chunk][i] = sums[i];
  __syncthreads();
  for (int half = kLanes / 2; half > 0; half /= 2) {
    if (lane < half) {
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) tree[lane][chunk][i] += tree[lane + half][chunk][i];
    }
    __syncthreads();
  }
}

}  // namespace cnn_ext::cuda
