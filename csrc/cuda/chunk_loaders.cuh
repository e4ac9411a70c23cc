// From global to shared memory, for the products on tensor cores (mma_gemm.cuh): the two ways to stage an operand by chunks of 16 bytes of
// neighbouring channels. Both stage the same values in the same places.
#pragma once

#include <type_traits>

#include "cuda/chunk.cuh"
#include "cuda/primitives.cuh"

namespace cnn_ext::cuda {

constexpr int kStepChunks = 4, kStepBytes = kStepChunks * kChunkBytes;
template <class T>
constexpr int kStepDepth = kStepChunks * kChunk<T>;

// Where an element lies: an operand's place is the sum of what its extent (row or column) and its depth say.
struct Place {
  int64_t offset;  // in elements
  int h, w;        // outside of the operand's plane: padding, or nothing at all
  int channels;    // of the chunk that exist; said by the side along which the chunk lies
};

constexpr int kNowhere = INT32_MIN / 2;  // as h: outside, whatever is added

// Operands offer
//   Element                  float, double, __half or __nv_bfloat16
//   kAlongDepth              whether a chunk's channels are neighbours in depth (else: neighbouring rows or columns)
//   data, channel_stride     of the tensor
//   height, width            of the plane; a place outside is padding
//   Place at_extent(int)     of a row or column; where chunks lie across the depth, of a multiple of kChunk
//   Place at_depth(int)      where chunks lie along the depth, of a multiple of kChunk
template <class Operand>
__device__ bool is_inside(const Operand& operand, const Place& extent, const Place& depth) {
  return static_cast<unsigned>(extent.h + depth.h) < static_cast<unsigned>(operand.height) &&
         static_cast<unsigned>(extent.w + depth.w) < static_cast<unsigned>(operand.width);
}

template <class Operand>
__device__ int chunk_channels(const Place& extent, const Place& depth) {
  return Operand::kAlongDepth ? depth.channels : extent.channels;
}

// The chunk at a place, of which `channels` elements exist; the others are zeros.
template <class Operand>
__device__ void fetch_chunk(const Operand& operand, const Place& extent, const Place& depth, int channels, ChunkWords& chunk) {
  using T = typename Operand::Element;
  // An element makes up two words, one or a half.
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  const T* first = operand.data + (channels > 0 ? extent.offset + depth.offset : 0);
  chunk = {};
#pragma unroll
  for (int channel = 0; channel < kChunk<T>; ++channel) {
    if (channel >= channels) continue;
    Bits bits;
    __builtin_memcpy(&bits, first + static_cast<int64_t>(channel) * operand.channel_stride, sizeof bits);
    constexpr int kBytes = static_cast<int>(sizeof(T));
    const int byte = channel * kBytes;
    chunk.word[byte / 4] |= static_cast<uint32_t>(bits) << (byte % 4 * 8);
    if constexpr (kBytes == 8) chunk.word[byte / 4 + 1] = static_cast<uint32_t>(bits >> 32);
  }
}

// One of its elements, which exists.
template <class Operand>
__device__ Accumulate<typename Operand::Element> fetch_element(const Operand& operand, const Place& extent, const Place& depth,
                                                               int channel) {
  return widen(operand.data[extent.offset + depth.offset + static_cast<int64_t>(channel) * operand.channel_stride]);
}

// The tile of an operand in shared memory, by chunks: [extent][4 of the depth] or [depth][extents / kChunk]. Chunks are swizzled or, where
// words lie across the depth that no ldmatrix transposes, rows are padded: neither staging nor reading fragments meets a bank twice.
constexpr int kTilePadding = 512;  // bytes

template <class Operand, int kExtent>
struct ChunkTile {
  using T = typename Operand::Element;
  static constexpr int kCount = kExtent * kStepChunks;
  static constexpr int kRowChunks = kExtent / kChunk<T>;  // across the depth

  __device__ static int along(int extent, int chunk) {
    const int pair = extent / 2 % kStepChunks;  // of rows; half a warp reads two pairs of float64, two chunks wide
    return extent * kStepBytes + (chunk ^ (sizeof(T) == 8 ? pair % 2 * 2 + pair / 2 : pair)) * kChunkBytes;
  }
  __device__ static int across(int depth, int chunk) {
    return (sizeof(T) == 2 ? depth * kRowChunks + (chunk ^ depth % 8) : depth * (kRowChunks + 2) + chunk) * kChunkBytes;
  }
  static_assert(sizeof(T) == 2 || kStepDepth<T> * 2 * kChunkBytes <= kTilePadding);
};

// Which chunks of a tile a thread stages: kLoads of them. Neighbouring threads take neighbouring chunks in the direction in which memory is
// contiguous: that of the channels, or of the pixels.
template <class Operand, int kExtent>
struct ChunkSlots {
  using T = typename Operand::Element;
  using Tile = ChunkTile<Operand, kExtent>;
  static constexpr int kLoads = Tile::kCount / kBlockThreads;
  static constexpr int kInner = Operand::kAlongDepth ? kStepChunks : kExtent / kChunk<T>;  // chunks along the channels
  static constexpr int kOuter = Tile::kCount / kInner;

  __device__ explicit ChunkSlots(bool channels_first) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int slot = i * kBlockThreads + threadIdx.x;
      const int inner = channels_first ? slot % kInner : slot / kOuter, outer = channels_first ? slot / kInner : slot % kOuter;
      extent[i] = Operand::kAlongDepth ? outer : inner * kChunk<T>;
      depth[i] = Operand::kAlongDepth ? inner * kChunk<T> : outer;
      where[i] = Operand::kAlongDepth ? Tile::along(outer, inner) : Tile::across(outer, inner);
    }
  }
  int extent[kLoads], depth[kLoads];
  int where[kLoads];  // bytes from the start of the tile
};

// Stages chunks by asynchronous copies of 16 bytes: needs channel_stride 1, aligned tensors, and no partial chunks.
template <class Operand_, int kExtent_>
class VectorLoader {
 public:
  using Operand = Operand_;
  static constexpr int kExtent = kExtent_;
  using Slots = ChunkSlots<Operand, kExtent>;

  __device__ VectorLoader(const Operand& operand, int first, bool) : operand_(operand), slots_(true) {
#pragma unroll
    for (int i = 0; i < Slots::kLoads; ++i) extents_[i] = operand.at_extent(first + slots_.extent[i]);
  }
  __device__ void begin(int depth, unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < Slots::kLoads; ++i) {
      const Place at = operand_.at_depth(depth + slots_.depth[i]);
      const bool exists = is_inside(operand_, extents_[i], at) && chunk_channels<Operand>(extents_[i], at) > 0;
      cp_async_16(tile + slots_.where[i], operand_.data + (exists ? extents_[i].offset + at.offset : 0), exists);
    }
  }
  __device__ void finish(unsigned char*) {}

 private:
  const Operand& operand_;
  Slots slots_;
  Place extents_[Slots::kLoads];
};

// Stages chunks element by element through registers: any strides, alignment and number of channels.
template <class Operand_, int kExtent_>
class ElementLoader {
 public:
  using Operand = Operand_;
  static constexpr int kExtent = kExtent_;
  using Slots = ChunkSlots<Operand, kExtent>;

  __device__ ElementLoader(const Operand& operand, int first, bool channels_first) : operand_(operand), slots_(channels_first) {
#pragma unroll
    for (int i = 0; i < Slots::kLoads; ++i) extents_[i] = operand.at_extent(first + slots_.extent[i]);
  }
  __device__ void begin(int depth, unsigned char*) {
#pragma unroll
    for (int i = 0; i < Slots::kLoads; ++i) {
      const Place at = operand_.at_depth(depth + slots_.depth[i]);
      const int channels = is_inside(operand_, extents_[i], at) ? chunk_channels<Operand>(extents_[i], at) : 0;
      fetch_chunk(operand_, extents_[i], at, channels, fetched_[i]);
    }
  }
  __device__ void finish(unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < Slots::kLoads; ++i) *reinterpret_cast<ChunkWords*>(tile + slots_.where[i]) = fetched_[i];
  }

 private:
  const Operand& operand_;
  Slots slots_;
  Place extents_[Slots::kLoads];
  ChunkWords fetched_[Slots::kLoads];
};

}  // namespace cnn_ext::cuda
