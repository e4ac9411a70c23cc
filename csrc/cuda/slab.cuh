// What the rows for narrow groups (conv2d_backward_weight_slab_mma.cu, conv2d_gather_slab_mma.cu) share. Groups of 2 to 16 channels lie
// whole in 16 neighbouring channels, which tensor cores multiply with 16 others in one or two instructions, as if they were one group: of
// these products those between two groups are left out or meet a zero. That wastes up to seven eighths of the arithmetic, of which there is
// plenty; memory is read by slabs of 16, 32 or 64 neighbouring channels, as wide as shared memory holds the pixels of a tile with its halo.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/patch.cuh"
#include "cuda/primitives.cuh"

namespace cnn_ext::cuda {

constexpr int kUnit = 16;  // channels on either side of a product, and pixels of a step
constexpr int kWarps = kBlockThreads / 32;

// Groups that lie whole in a unit, as many channels on both sides; what the indices hold.
inline bool suits_slabs(const Conv2dShape& s) {
  const int64_t group = s.in_channels / s.groups;
  return has_mma_type(s) && s.groups > 1 && group == s.out_channels / s.groups && group > 1 && group <= kUnit && kUnit % group == 0 &&
         has_int_extents(s) && all_below(kMostReach, {s.kernel_h * s.dilation_h, s.kernel_w * s.dilation_w}) &&
         all_below(kMostStride, {s.stride_h, s.stride_w}) &&
         all_below(kMaxExtent, {product({s.in_channels, s.in_h, s.in_w}), product({s.out_channels, s.out_h, s.out_w}),
                                product({s.batch, s.out_h, s.out_w}), product({s.out_channels, group, s.kernel_h, s.kernel_w})});
}

// The tiles of a map: up to `pixels` (256 or half of it), no higher than the map, in whole steps.
inline PatchTiles slab_tiles(int64_t map_h, int64_t map_w, int pixels = kTilePixels) {
  const int bits = width_bits_of(static_cast<int>(map_w)), most = pixels >> bits;
  const int64_t height = ceil_div<int64_t>(map_h, 2) * 2;
  return PatchTiles(bits, static_cast<int>(smaller<int64_t>(most, height)), static_cast<int>(map_h), static_cast<int>(map_w));
}

// Pixels of a tensor in shared memory, [row][column][channels of a slab]. Their distance keeps neighbours from meeting in a bank.
struct StagedPixels {
  StagedPixels(int height, int width_, int pitch_) : width(width_), count(height * width_), pitch(pitch_) {}
  CNN_EXT_HOST_DEVICE int bytes() const { return count.divisor() * pitch; }
  CNN_EXT_HOST_DEVICE int of_row() const { return width.divisor() * pitch; }

  FastDivisor width, count;
  int pitch;  // bytes
};

// Those of a tile's source: all that its windows read.
inline StagedPixels staged_source(const PatchTiles& tiles, int stride_h, int stride_w, int reach_h, int reach_w, int pitch) {
  return {(tiles.height - 1) * stride_h + reach_h + 1, (tiles.width - 1) * stride_w + reach_w + 1, pitch};
}

// One image of a tensor, from the slab's first channel on.
template <class T>
struct SlabImage {
  const T* data;
  int of_h, of_w, of_c;  // elements from one to the next
  int height, width, channels;
};

template <class T>
__device__ SlabImage<T> slab_image(const T* data, const Strides& strides, int n, int height, int width, int first_channel, int channels) {
  return {data + n * strides.n + first_channel * strides.c,
          static_cast<int>(strides.h),
          static_cast<int>(strides.w),
          static_cast<int>(strides.c),
          height,
          width,
          channels - first_channel};
}

template <class T>
__device__ ChunkWords round_chunk(ChunkWords chunk) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (uint32_t& word : chunk.word) word = to_tf32(__uint_as_float(word));
  }
  return chunk;
}

// The first `count` elements of a chunk, `stride` apart; the others are zeros.
template <class T>
__device__ ChunkWords gather_chunk(const T* source, int stride, int count) {
  T elements[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) elements[i] = i < count ? source[i * stride] : narrow<T>(0);
  ChunkWords chunk;
  __builtin_memcpy(&chunk, elements, kChunkBytes);
  return chunk;
}

// Stages the pixels from (first_h, first_w) of an image on, zeros beside it: 1 << chunk_bits chunks of each. kVector: chunks are 16 aligned
// bytes. Neighbouring threads read neighbours in memory. Seen by other threads after finish_pixels() and a barrier.
// kLoads: of a thread, on their way at a time where chunks are gathered.
template <class T, bool kVector, int kLoads>
__device__ void begin_pixels(const SlabImage<T>& image, const StagedPixels& to, int chunk_bits, int first_h, int first_w,
                             unsigned char* shared) {
  const int items = to.count.divisor() << chunk_bits;
  // Calls take(target, source, count) for a chunk of which `count` elements exist.
  const auto with_chunk = [&](int index, const auto& take) {
    int pixel = index >> chunk_bits, chunk = index - (pixel << chunk_bits);
    if (!kVector && image.of_c != 1) chunk = to.count.quotient(index), pixel = index - chunk * to.count.divisor();
    const int row = to.width.quotient(pixel), h = first_h + row, w = first_w + pixel - row * to.width.divisor();
    const bool inside =
        static_cast<unsigned>(h) < static_cast<unsigned>(image.height) && static_cast<unsigned>(w) < static_cast<unsigned>(image.width);
    const int channel = chunk * kChunk<T>, count = inside ? image.channels - channel : 0;
    const T* source = image.data + (count > 0 ? h * image.of_h + w * image.of_w + channel * image.of_c : 0);
    take(shared + pixel * to.pitch + chunk * kChunkBytes, source, count);
  };
  if constexpr (kVector) {
#pragma unroll 2
    for (int index = threadIdx.x; index < items; index += kBlockThreads) {
      with_chunk(index, [](unsigned char* target, const T* source, int count) { cp_async_16(target, source, count > 0); });
    }
  } else {
    constexpr int kBatch = kLoads / kChunk<T>;  // chunks
#pragma unroll 1
    for (int first = threadIdx.x; first < items; first += kBatch * kBlockThreads) {
      unsigned char* targets[kBatch];
      ChunkWords chunks[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        with_chunk(smaller(first + b * kBlockThreads, items - 1), [&](unsigned char* target, const T* source, int count) {
          targets[b] = target, chunks[b] = gather_chunk(source, image.of_c, count);
        });
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * kBlockThreads < items) *reinterpret_cast<ChunkWords*>(targets[b]) = round_chunk<T>(chunks[b]);
      }
    }
  }
}

// Waits for what this thread has begun, and rounds it to TF32 where it is float32.
template <class T, bool kVector>
__device__ void finish_pixels(const StagedPixels& to, int chunk_bits, unsigned char* shared) {
  if constexpr (!kVector) return;
  cp_async_commit();
  cp_async_wait<0>();
  if constexpr (sizeof(T) == 4) {
    const int items = to.count.divisor() << chunk_bits;
    for (int index = threadIdx.x; index < items; index += kBlockThreads) {
      const int pixel = index >> chunk_bits;
      auto* chunk = reinterpret_cast<ChunkWords*>(shared + pixel * to.pitch + (index - (pixel << chunk_bits)) * kChunkBytes);
      *chunk = round_chunk<T>(*chunk);
    }
  }
}

// The widest slab that fits shared memory, in channels; 0: none. bytes_of(slab): what it takes.
template <class Bytes>
int slab_width(int64_t channels, const Bytes& bytes_of) {
  for (int width = 4 * kUnit; width >= kUnit; width /= 2) {
    if ((width == kUnit || width < channels + kUnit) && bytes_of(width) <= kMostSharedBytes) return width;
  }
  return 0;
}

}  // namespace cnn_ext::cuda
