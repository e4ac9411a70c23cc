// A row of register tiles of sums with few terms, in one call: what a tile does beside its multiply-adds would take as long as they do.
#pragma once

#include "cpu/kernels/conv2d_direct_ahead.inl"
#include "cpu/simd/vec.h"

namespace {

// A tile is kVectors vectors x kItems elements that are broadcast: with channels in the lanes, vectors of weights and grid points; with
// grid points in the lanes, vectors of these and weights. 12 sums leave 4 registers, for the fewer ones of the two and one of the others.
struct TileRow {
  const float* weights;    // [terms][output channels of the unit]
  const float* staged;     // of the first grid point of the row
  const int32_t* offsets;  // [terms], in bytes, from a grid point to what it reads
  int64_t terms;
  const float* bias;  // of the unit
  float* out;         // of the first grid point and the first output channel of the unit
  int64_t pitch;      // from item to item: from grid point to grid point, or from channel to channel
  int64_t points;     // at least a tile of them
  int64_t ahead;      // elements from what a tile writes to what it fetches
  Fetch source;       // what will be staged next: a line with every kTermsTogether terms
};

constexpr int kTermsTogether = 3;  // kernels of 3 columns or 3 channels leave no rest
constexpr int64_t kLineElements = 64 / sizeof(float);

// Adds a term to the sums of a tile. What is broadcast is held where it takes fewer registers than the vectors.
template <int kVectors, int kItems>
inline __attribute__((always_inline)) void add_term(Vec<float> (&sum)[kItems][kVectors], const float* vectors, const float* items) {
  constexpr int kV = kLanes<float>;
  if constexpr (kItems < kVectors) {
    Vec<float> item[kItems];
#pragma GCC unroll 12
    for (int i = 0; i < kItems; ++i) item[i] = broadcast_from(items + i);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec<float> x = load(vectors + v * kV);
#pragma GCC unroll 12
      for (int i = 0; i < kItems; ++i) accumulate(sum[i][v], x, item[i]);
    }
  } else {
    Vec<float> x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(vectors + v * kV);
#pragma GCC unroll 12
    for (int i = 0; i < kItems; ++i) {
      const Vec<float> item = broadcast_from(items + i);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) accumulate(sum[i][v], x[v], item);
    }
  }
}

// Where memory is written soon: every line of an item.
template <int kVectors, int kItems>
inline __attribute__((always_inline)) void fetch_places(const float* place, int64_t pitch) {
#pragma GCC unroll 12
  for (int i = 0; i < kItems; ++i) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < kVectors * kLanes<float>; j += kLineElements) __builtin_prefetch(place + i * pitch + j, 0, 2);
  }
}

// The last tile of a row reaches as far back as it must to be whole: what it computes again it writes again.
template <bool kChannelLanes, int kVectors, int kItems>
__attribute__((noinline)) void run_tiles(const TileRow& row) {
  constexpr int kV = kLanes<float>, kWidth = kChannelLanes ? kVectors * kV : kItems, kPoints = kChannelLanes ? kItems : kVectors * kV;
  const int32_t* const end = row.offsets + row.terms;
  const int64_t last = row.points - kPoints, pitch = row.pitch;
  const char* source = row.source.at;
  for (int64_t x = 0; x < row.points; x += kPoints) {
    const int64_t first = x < last ? x : last;
    float* const out = row.out + first * (kChannelLanes ? pitch : 1);
    fetch_places<kVectors, kItems>(out + row.ahead, pitch);
    Vec<float> sum[kItems][kVectors] = {};
    const char* const staged = reinterpret_cast<const char*>(row.staged + first);
    const float* weights = row.weights;
    const auto add = [&](int64_t offset) __attribute__((always_inline)) {
      const float* const in = reinterpret_cast<const float*>(staged + offset);
      add_term<kVectors, kItems>(sum, kChannelLanes ? weights : in, kChannelLanes ? in : weights);
      weights += kWidth;
    };
    const int32_t* offset = row.offsets;
    for (; offset + kTermsTogether <= end; offset += kTermsTogether) {
      add(offset[0]), add(offset[1]), add(offset[2]);
      __builtin_prefetch(source, 0, 2);
      source += row.source.step;
    }
    for (; offset < end; ++offset) add(*offset);
#pragma GCC unroll 12
    for (int i = 0; i < kItems; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<float> bias = kChannelLanes ? load(row.bias + v * kV) : broadcast_from(row.bias + i);
        store(out + i * pitch + v * kV, bias + sum[i][v]);
      }
    }
  }
}

}  // namespace
