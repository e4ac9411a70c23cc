// The products between the transforms: for each of the alpha * alpha points, [tiles x channels] times [channels x outputs].
//
// Register tile: 2 vectors of output channels x up to 14 Winograd tiles (6 with 16 registers), as in the direct convolution: 28 of 32
// registers accumulate, and a step loads 2 vectors and broadcasts one value for every 2 FMAs. Transformed tensors lie as
// [point][channel vector][tile][lane]: the products read their tiles' vectors in one run, broadcasting one lane after the other. A plane of
// a point has an odd number of vectors: both transforms touch all planes at once, and powers of two would share their sets of the first
// cache.
#pragma once

#include "cpu/simd/vec.h"

namespace {

// Vectors of a point's plane: at least `vectors`, and odd.
inline int64_t plane_vectors(int64_t vectors) { return vectors | 1; }

constexpr int kUnitVectors = 2;  // of output channels: a unit
constexpr int kProductTiles = kVectorRegisters == 32 ? 14 : 6;

// One register tile's operands. Pitches in elements.
template <class T>
struct Product {
  const T* weights;      // [channels][kVectors * lanes]
  const T* tiles;        // of the first channel vector and tile, at the point
  int64_t channels;      // to add up
  int64_t vector_pitch;  // from a channel vector of `tiles` to the next
  T* sums;               // of the first output vector and tile, at the point
  int64_t sums_pitch;    // from an output vector to the next
  bool add;              // to what `sums` holds
};

template <class T, int kVectors, int kTiles>
void multiply_tile(const Product<T>& p) {
  constexpr int kV = kLanes<T>;
  Vec<T> sum[kTiles][kVectors] = {};
  const T* weights = p.weights;
  const T* block = p.tiles;
  const int64_t vector_pitch = p.vector_pitch;
  for (int64_t left = p.channels; left > 0; left -= kV, block += vector_pitch) {
    const T* const end = block + (left < kV ? left : kV);
    // The processor's own prefetching does not follow from one vector of channels to the next.
#pragma GCC unroll 14
    for (int i = 0; i < kTiles; ++i) __builtin_prefetch(block + vector_pitch + i * kV);
    for (const T* in = block; in != end; ++in, weights += kVectors * kV) {
      Vec<T> weight[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kV);
#pragma GCC unroll 14
      for (int i = 0; i < kTiles; ++i) {
        const Vec<T> x = broadcast_from(in + i * kV);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(x, weight[v], sum[i][v]);
      }
    }
  }
  T* const sums = p.sums;
  const int64_t sums_pitch = p.sums_pitch;
  if (p.add) {
#pragma GCC unroll 14
    for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += load(sums + i * kV + v * sums_pitch);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sums + i * kV + v * sums_pitch, sum[i][v]);
  }
}

template <class T, int kVectors, int kTiles = kProductTiles>
inline void multiply_tiles(const Product<T>& p, int64_t tiles) {
  if (tiles == kTiles) return multiply_tile<T, kVectors, kTiles>(p);
  if constexpr (kTiles > 1) multiply_tiles<T, kVectors, kTiles - 1>(p, tiles);
}

}  // namespace
