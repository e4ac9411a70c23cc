// The register tile of conv2d_depthwise.cpp: pixels of one or two rows times one vector of staged channels.
#pragma once

#include "cpu/kernels/conv2d_depthwise.inl"

namespace {

constexpr int kTilePixels = 14;
constexpr int kTwoRowPixels = kVectorRegisters == 32 ? 11 : 6;

struct Tap {
  int64_t offset;  // elements of the stage, from the pixel at the target's place
  int64_t weight;  // elements of the channel block's packed weights
  int64_t row;     // source rows from the target's place
};

// Taps of a list: a tile leaves out those whose source row is outside the map.
struct TapRange {
  const Tap *first, *last;
};

// How much later in a list the tap stands that meets, one target row earlier, the source of the first one; the whole list, if none does.
inline int64_t taps_between_rows(TapRange taps, int64_t source_step) {
  const Tap* tap = taps.first;
  while (tap < taps.last && tap->row - taps.first->row != source_step) ++tap;
  return tap - taps.first;
}

// Where a tile reads and writes. Distances in elements of the stages.
template <class T>
struct TileArguments {
  const T* source;  // at the place of pixel 0
  int64_t source_step, source_row;
  TapRange taps[2];      // of each row
  int64_t taps_between;  // row 0 has a tap so much later in the list than row 1 that meets the same source
  const T* weights;
  const T* initial;
  int64_t initial_step, initial_row;
  T* target;
  int64_t target_step, target_row;
};

template <class T, int kPixels>
using RowSums = Vec<T>[kPixels];

template <class T, int kPixels>
inline __attribute__((always_inline)) void load_sums(const T* initial, int64_t step, RowSums<T, kPixels>& sum) {
#pragma GCC unroll 14
  for (int i = 0; i < kPixels; ++i) sum[i] = load(initial + i * step);
}

template <class T, int kPixels>
inline __attribute__((always_inline)) void store_sums(const RowSums<T, kPixels>& sum, int64_t step, T* target) {
#pragma GCC unroll 14
  for (int i = 0; i < kPixels; ++i) store(target + i * step, sum[i]);
}

// Adds taps to one row of sums. kStep: distance of the pixels' sources in the stage, in vectors, 0 for `any_step` elements.
template <class T, int kPixels, int kStep>
inline __attribute__((always_inline)) void add_taps(const Tap* tap, const Tap* last, const T* source, const T* weights, int64_t any_step,
                                                    RowSums<T, kPixels>& sum) {
  const int64_t step = kStep != 0 ? kStep * kLanes<T> : any_step;
  for (; tap < last; ++tap) {
    const Vec<T> w = load(weights + tap->weight);
    const T* p = source + tap->offset;
#pragma GCC unroll 14
    for (int i = 0; i < kPixels; ++i) sum[i] = fma(load(p + i * step), w, sum[i]);
  }
}

template <class T, int kPixels, int kStep>
void compute_row(const TileArguments<T>& a) {
  RowSums<T, kPixels> sum;
  load_sums<T, kPixels>(a.initial, a.initial_step, sum);
  add_taps<T, kPixels, kStep>(a.taps[0].first, a.taps[0].last, a.source, a.weights, a.source_step, sum);
  store_sums<T, kPixels>(sum, a.target_step, a.target);
}

// Two rows: the source rows that both of them meet are loaded once.
template <class T, int kPixels, int kStep>
void compute_two_rows(const TileArguments<T>& a) {
  RowSums<T, kPixels> sum[2];
  load_sums<T, kPixels>(a.initial, a.initial_step, sum[0]);
  load_sums<T, kPixels>(a.initial + a.initial_row, a.initial_step, sum[1]);
  const int64_t step = kStep != 0 ? kStep * kLanes<T> : a.source_step, between = a.taps_between;
  const T *source = a.source, *weights = a.weights;
  const Tap* shared = a.taps[1].first + between < a.taps[0].last ? a.taps[1].first + between : a.taps[0].last;
  add_taps<T, kPixels, kStep>(a.taps[0].first, shared, source, weights, step, sum[0]);
  const Tap* tap = shared;
  for (const Tap* last = a.taps[0].last; tap < last; ++tap) {
    const Vec<T> w0 = load(weights + tap->weight), w1 = load(weights + (tap - between)->weight);
    const T* p = source + tap->offset;
#pragma GCC unroll 14
    for (int i = 0; i < kPixels; ++i) {
      Vec<T> x = load(p + i * step);
      keep_loaded(x);
      sum[0][i] = fma(x, w0, sum[0][i]);
      sum[1][i] = fma(x, w1, sum[1][i]);
    }
  }
  const Tap* rest = tap - between > a.taps[1].first ? tap - between : a.taps[1].first;
  add_taps<T, kPixels, kStep>(rest, a.taps[1].last, source + a.source_row, weights, step, sum[1]);
  store_sums<T, kPixels>(sum[0], a.target_step, a.target);
  store_sums<T, kPixels>(sum[1], a.target_step, a.target + a.target_row);
}

// kPixels: the most that is left to try.
template <class T, int kStep, int kPixels = kTilePixels>
void compute_pixels(const TileArguments<T>& a, int64_t rows, int64_t pixels) {
  if (pixels == kPixels) {
    if constexpr (kPixels <= kTwoRowPixels) {
      if (rows == 2) return compute_two_rows<T, kPixels, kStep>(a);
    }
    return compute_row<T, kPixels, kStep>(a);
  }
  if constexpr (kPixels > 1) compute_pixels<T, kStep, kPixels - 1>(a, rows, pixels);
}

template <class T>
void compute_tile(const TileArguments<T>& a, int64_t rows, int64_t pixels) {
  if (a.source_step == kLanes<T>) return compute_pixels<T, 1>(a, rows, pixels);
  a.source_step == 2 * kLanes<T> ? compute_pixels<T, 2>(a, rows, pixels) : compute_pixels<T, 0>(a, rows, pixels);
}

}  // namespace
