// The products between the transforms: for each of the alpha * alpha points, [tiles x channels] times [channels x outputs].
//
// Register tile: 2 vectors of output channels x up to 14 Winograd tiles (6 with 16 registers), as in the direct convolution: 28 of 32
// registers accumulate, and a step loads 2 vectors and broadcasts one value for every 2 FMAs. Transformed inputs lie as
// [point][channel block][panel][channel vector][tile][lane], a panel being the tiles of a register tile: the products read them from
// beginning to end, broadcasting one lane after the other, and fetch what follows ahead, a line of it and of the next point's weights at
// a step, for bursts would make the tile wait for its own loads. A plane of a point has an odd number of vectors: both transforms touch all
// planes at once, and powers of two would share their sets of the first cache.
#pragma once

#include "cpu/simd/vec.h"

namespace {

// Vectors of a point's plane: at least `vectors`, and odd.
inline int64_t plane_vectors(int64_t vectors) { return vectors | 1; }

constexpr int kUnitVectors = 2;  // of output channels: a unit
constexpr int kProductTiles = kVectorRegisters == 32 ? 14 : 6;
constexpr int kVectorsAhead = 2;  // channel vectors of a panel: it may come from the third cache

// One register tile's operands. Pitches in elements.
template <class T>
struct Product {
  const T* weights;       // [channels][kVectors * lanes]
  const T* tiles;         // a panel, at the point, from the first channel vector of a block on
  int64_t channels;       // to add up
  const T* weights_next;  // fetched ahead: a share of the weights at the next point
  int64_t weights_step;   // of which every channel fetches so many elements
  T* sums;                // of the first output vector and tile, at the point
  int64_t sums_pitch;     // from an output vector to the next
  bool add;               // to what `sums` holds
};

template <class T, int kVectors, int kTiles>
void multiply_tile(const Product<T>& p) {
  constexpr int kV = kLanes<T>;
  Vec<T> sum[kTiles][kVectors] = {};
  const T* weights = p.weights;
  const T* block = p.tiles;
  const T* weights_next = p.weights_next;
  const T* tiles_next = block + kVectorsAhead * kTiles * kV;
  const int64_t weights_step = p.weights_step;
  for (int64_t left = p.channels; left > 0; left -= kV, block += kTiles * kV) {
    const T* const end = block + (left < kV ? left : kV);
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
      __builtin_prefetch(tiles_next);
      __builtin_prefetch(weights_next);
      tiles_next += kTiles, weights_next += weights_step;
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
