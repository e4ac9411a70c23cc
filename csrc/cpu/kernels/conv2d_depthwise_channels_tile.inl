// The register tile of conv2d_depthwise_channels.cpp: pixels of a row times vectors of channels, read straight from nhwc memory.
#pragma once

#include "cpu/kernels/conv2d_depthwise.inl"

namespace {

constexpr bool kManyRegisters = kVectorRegisters == 32;
constexpr int kTileVectors = kManyRegisters ? 4 : 2;  // of groups of one channel
constexpr int kGroupedVectors = 2;
// Pixels of a tile: of 16 registers, a shuffled vector takes one that the sums of a seventh pixel would need.
constexpr int tile_pixels(int64_t group) { return kManyRegisters || group == 1 ? 7 : 6; }

// A tap of one axis that belongs to a phase: the distance of its source from the target's place, in positions and in elements, and where
// its weights lie.
struct Tap {
  int64_t offset;
  int64_t source;
  int64_t weight;
};

template <class T>
struct TileArguments {
  const T* source;            // at the tile's place, in source row 0
  int64_t source_step;        // from a pixel of the tile to the next
  const Tap *row, *last_row;  // taps of h; offset: source rows
  const Tap *column, *last_column;
  const uint32_t* masks;
  uint32_t stored;
  int64_t channels;
  const T* weights;  // [taps, channels of a group, channels]
  const T* initial;
  T* target;
  int64_t target_step;
};

// Pointers to pixels 0, 3 and 6 of a tile; the others lie 1, 2 or 4 steps (bytes) behind one of them, which a load's address can express.
template <class T>
struct TilePixels {
  const char *pixel_0, *pixel_3, *pixel_6;
  int64_t step;
  TilePixels(const T* first, int64_t step_bytes) : pixel_0(reinterpret_cast<const char*>(first)), step(step_bytes) {
    pixel_3 = pixel_0 + 3 * step;
    pixel_6 = pixel_3 + 3 * step;
    hide_origin(pixel_0);
    hide_origin(pixel_3);
    hide_origin(pixel_6);
  }
  const T* at(int i) const {
    const char* p = i < 3 ? pixel_0 + i * step : i < 6 ? pixel_3 + (i - 3) * step : pixel_6 + (i - 6) * step;
    return reinterpret_cast<const T*>(p);
  }
};

// Lane l takes the channel kTerm of its own group of kGroup neighbouring lanes.
template <class T, int kGroup, int kTerm, int... J>
inline Vec<T> spread(Vec<T> v, Lanes<J...>) {
  return __builtin_shufflevector(v, v, (J / kGroup * kGroup + kTerm)...);
}

template <class T, int kGroup, int kVectors>
using TileSums = Vec<T>[tile_pixels(kGroup)][kVectors];

// Adds one tap of one source channel of each group. bits: the pixels that have a source.
template <class T, int kGroup, int kTerm, int kVectors, bool kMasked>
inline __attribute__((always_inline)) void add_term(const TilePixels<T>& pixels, const T* weights, uint32_t bits,
                                                    TileSums<T, kGroup, kVectors>& sum) {
  constexpr int kPixels = tile_pixels(kGroup);
  Vec<T> w[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) w[v] = load(weights + v * kLanes<T>);
#pragma GCC unroll 7
  for (int i = 0; i < kPixels; ++i) {
    if (kMasked && (bits & (1u << i)) == 0) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> x = load(pixels.at(i) + v * kLanes<T>);
      if constexpr (kGroup == 1) {
        sum[i][v] = fma(x, w[v], sum[i][v]);
      } else {
        sum[i][v] = fma(spread<T, kGroup, kTerm>(x, typename CountedLanes<kLanes<T>>::type{}), w[v], sum[i][v]);
      }
    }
  }
}

template <class T, int kGroup, int kVectors, bool kMasked, int... kTerm>
inline __attribute__((always_inline)) void add_terms(const TilePixels<T>& pixels, const T* weights, int64_t channels, uint32_t bits,
                                                     TileSums<T, kGroup, kVectors>& sum, Lanes<kTerm...>) {
  (add_term<T, kGroup, kTerm, kVectors, kMasked>(pixels, weights + kTerm * channels, bits, sum), ...);
}

template <class T, int kGroup, int kVectors, bool kMasked>
void compute_tile(const TileArguments<T>& a) {
  constexpr int kPixels = tile_pixels(kGroup);
  TileSums<T, kGroup, kVectors> sum;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> initial = load(a.initial + v * kLanes<T>);
#pragma GCC unroll 7
    for (int i = 0; i < kPixels; ++i) sum[i][v] = initial;
  }
  constexpr int64_t kScalar = sizeof(T);
  const int64_t step = a.source_step * kScalar;
  const T* source = a.source;
  const int64_t channels = a.channels;
  const Tap *first_column = a.column, *last_column = a.last_column;
  for (const Tap* r = a.row; r < a.last_row; ++r) {
    const T* row = source + r->source;
    const T* weights = a.weights + r->weight;
    const uint32_t* mask = a.masks;
    for (const Tap* c = first_column; c < last_column; ++c) {
      const TilePixels<T> pixels(row + c->source, step);
      const T* tap_weights = weights + c->weight;
      hide_origin(tap_weights);
      const uint32_t bits = kMasked ? *mask++ : 0;
      add_terms<T, kGroup, kVectors, kMasked>(pixels, tap_weights, channels, bits, sum, typename CountedLanes<kGroup>::type{});
    }
  }
#pragma GCC unroll 7
  for (int i = 0; i < kPixels; ++i) {
    if (kMasked && (a.stored & (1u << i)) == 0) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(a.target + i * a.target_step + v * kLanes<T>, sum[i][v]);
  }
}

template <class T>
using Tile = void (*)(const TileArguments<T>&);

template <class T, int kGroup, bool kMasked>
Tile<T> tile_of(int64_t vectors) {
  if constexpr (kGroup > kLanes<T>) {
    return nullptr;
  } else if constexpr (kGroup == 1 && kManyRegisters) {
    static constexpr Tile<T> tiles[] = {compute_tile<T, 1, 1, kMasked>, compute_tile<T, 1, 2, kMasked>, compute_tile<T, 1, 3, kMasked>,
                                        compute_tile<T, 1, 4, kMasked>};
    return tiles[vectors - 1];
  } else {
    static constexpr Tile<T> tiles[] = {compute_tile<T, kGroup, 1, kMasked>, compute_tile<T, kGroup, 2, kMasked>};
    return tiles[vectors - 1];
  }
}

template <class T, bool kMasked>
Tile<T> tile_of(int64_t group, int64_t vectors) {
  if (group == 1) return tile_of<T, 1, kMasked>(vectors);
  if (group == 2) return tile_of<T, 2, kMasked>(vectors);
  return group == 4 ? tile_of<T, 4, kMasked>(vectors) : tile_of<T, 8, kMasked>(vectors);
}

}  // namespace
