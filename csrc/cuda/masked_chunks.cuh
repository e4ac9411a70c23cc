// The gradient of a fused convolution's output (relu_pool.cuh) as an operand of the products on tensor cores: `Operand` tells places, as
// offsets of planes in the pooled tensors (MaskedGradient::planes) and coordinates in the convolution's output.
#pragma once

#include "cuda/chunk_loaders.cuh"
#include "cuda/relu_pool.cuh"

namespace cnn_ext::cuda {

template <class Operand>
struct MaskedChunks : Operand {
  using T = typename Operand::Element;

  __device__ MaskedChunks(const Operand& operand, const MaskedGradient<T>& gradient_, int64_t first_plane_, bool is_whole_)
      : Operand(operand), gradient(gradient_), first_plane(first_plane_), is_whole(is_whole_) {}

  const MaskedGradient<T>& gradient;
  int64_t first_plane;  // of the group
  bool is_whole;        // every chunk is 16 aligned bytes
};

template <class Operand>
__device__ void fetch_chunk(const MaskedChunks<Operand>& operand, const Place& extent, const Place& depth, int channels,
                            ChunkWords& chunk) {
  chunk = {};
  if (channels <= 0) return;
  const int64_t plane = operand.first_plane + extent.offset + depth.offset;
  const auto elements = operand.gradient.chunk_at(plane, extent.h + depth.h, extent.w + depth.w, channels, operand.is_whole);
  __builtin_memcpy(&chunk, &elements, kChunkBytes);
}

template <class Operand>
__device__ auto fetch_element(const MaskedChunks<Operand>& operand, const Place& extent, const Place& depth, int channel) {
  const int64_t plane = operand.first_plane + extent.offset + depth.offset + channel * operand.gradient.strides.c;
  return operand.gradient.at(plane, extent.h + depth.h, extent.w + depth.w);
}

}  // namespace cnn_ext::cuda
