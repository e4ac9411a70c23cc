// A chunk: 16 bytes of neighbouring elements, the widest access that a thread has.
#pragma once

#include <cstdint>

#include "cuda/common.cuh"

namespace cnn_ext::cuda {

constexpr int kChunkBytes = 16;
template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));  // elements

struct alignas(kChunkBytes) ChunkWords {
  uint32_t word[4];
} __attribute__((may_alias));

// Whether a tensor may be read and written by chunks, as far as its address says.
inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0; }

// The first `count` >= 1 elements of a chunk, widened; the others are zeros. whole: it is 16 aligned bytes.
template <class T>
__device__ void load_chunk(const T* source, int count, bool whole, Accumulate<T> (&values)[kChunk<T>]) {
  T elements[kChunk<T>];
  if (whole) {
    const ChunkWords words = *reinterpret_cast<const ChunkWords*>(source);
    __builtin_memcpy(elements, &words, kChunkBytes);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      const T element = source[i < count ? i : 0];  // without a branch
      elements[i] = i < count ? element : narrow<T>(0);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) values[i] = widen(elements[i]);
}

// Rounds and stores them.
template <class T>
__device__ void store_chunk(T* target, int count, bool whole, const Accumulate<T> (&values)[kChunk<T>]) {
  T elements[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) elements[i] = narrow<T>(values[i]);
  if (whole) {
    ChunkWords words;
    __builtin_memcpy(&words, elements, kChunkBytes);
    *reinterpret_cast<ChunkWords*>(target) = words;
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (i < count) target[i] = elements[i];
    }
  }
}

}  // namespace cnn_ext::cuda
