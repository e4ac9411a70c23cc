// What the depthwise kernels share: in nhwc, where neighbouring channels are neighbours in memory and each has a filter of its own.
//
// A block is 8 chunks of channels (128 bytes of a pixel, a whole line) times 32 strips of kStrip neighbouring pixels of a row. The threads
// of a warp read four lines at a time; what overlapping windows share comes from the first-level cache or, along a strip, from registers.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/limits.h"

namespace cnn_ext::cuda {

constexpr int kLaneChunks = 8, kBlockStrips = kBlockThreads / kLaneChunks, kStrip = 4;
template <class T>
constexpr int kLaneChannels = kLaneChunks * kChunk<T>;  // of a block

// One axis: output o takes tap t from position o * stride + first + t * dilation.
struct Axis {
  int in, out, kernel, stride, first, dilation;
};

inline Axis forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return {static_cast<int>(in),     static_cast<int>(out),  static_cast<int>(kernel),
          static_cast<int>(stride), static_cast<int>(-pad), static_cast<int>(dilation)};
}

// Of stride 1: input i takes tap k - 1 - t from output i + pad - (k - 1 - t) * dilation.
inline Axis backward_axis(int64_t in, int64_t out, int64_t kernel, int64_t pad, int64_t dilation) {
  return forward_axis(out, in, kernel, 1, (kernel - 1) * dilation - pad, dilation);
}

inline bool is_depthwise_nhwc(const Conv2dShape& s) {
  return s.layout == Layout::nhwc && s.groups == s.in_channels && s.in_channels == s.out_channels && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.out_h, s.out_w + kStrip}), product({s.batch, s.in_h, s.in_w + kStrip}),
                                product({s.in_channels, s.kernel_h, s.kernel_w})});
}

// The channels of a thread.
template <class T>
struct ChannelChunk {
  __device__ ChannelChunk(int64_t block, int channels)
      : first(static_cast<int>(block) * kLaneChannels<T> + static_cast<int>(threadIdx.x) % kLaneChunks * kChunk<T>),
        count(smaller(channels - first, kChunk<T>)) {}
  // The i-th channel or, behind the last one, the first, so that it may be read.
  __device__ int existing(int i) const { return first + (i < count ? i : 0); }
  int first, count;  // count <= 0: none
};

template <class T>
int64_t channel_blocks(int64_t channels) {
  return ceil_div<int64_t>(channels, kLaneChannels<T>);
}

inline int64_t channel_blocks(DType dtype, int64_t channels) {
  switch (dtype) {
    case DType::float32:
      return channel_blocks<float>(channels);
    case DType::float64:
      return channel_blocks<double>(channels);
    case DType::float16:
    case DType::bfloat16:
      return channel_blocks<__half>(channels);
  }
  return 0;
}

// Whether all chunks of the tensors are 16 aligned bytes.
template <class T>
bool are_chunks_whole(int channels, const void* a, const void* b) {
  return channels % kChunk<T> == 0 && is_aligned(a) && is_aligned(b);
}

}  // namespace cnn_ext::cuda
