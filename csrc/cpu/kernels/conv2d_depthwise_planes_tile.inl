// The register tile of conv2d_depthwise_planes.cpp: rows of a map times vectors of neighbouring columns, read straight from nchw memory.
#pragma once

#include "cpu/kernels/conv2d_depthwise_planes.inl"

namespace {

constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
// Tap rows of a group: larger kernels take several. Those of more than 5 rows rarely have a stride.
constexpr int most_tap_rows(int step) { return step == 1 ? 7 : 5; }
constexpr int kFewRows = 4;   // sums of a tile in one column
constexpr int kManyRows = 7;  // where the registers allow
constexpr int most_rows(int64_t vectors) { return vectors <= (kVectorRegisters == 32 ? 2 : 1) ? kManyRows : kFewRows; }

// A tile is made of `rows` sums in each vector of columns. Sum o meets the source row of index i with its tap row i - o * kStep; sums
// beyond `rows` are computed from what is there and not stored.
template <class T>
struct TileArguments {
  const T* source;  // sum 0, lane 0, tap 0 in the first of `maps` source maps; may lie outside
  int64_t maps, source_map;
  int64_t source_row;               // elements from an index to the next
  int64_t first_index, last_index;  // whose source rows exist
  int64_t source_column;            // elements from a tap column to the next
  const T* weights;                 // [maps, tap rows, tap columns]
  int64_t tap_rows, tap_columns;
  int64_t rows;
  const uint32_t* masks;  // [tap column, vector, step]: the lanes (elements, with a step of 2) that have a source
  T initial;
  T* target;               // sum 0, lane 0
  int64_t target_row;      // elements from a sum to the next
  const uint32_t* stored;  // [vector]
};

// Some tap rows of one source map.
template <class T>
struct TapGroup {
  const T* source;  // as of the tile, of the group's first tap row
  const T* weights;
  int64_t first_index, last_index;
};

// Pointers to the elements 0 to 6 steps behind p, in the forms that a load's address can express.
template <class T>
struct WeightRows {
  const char *row_0, *row_3, *row_6;
  int64_t step;
  WeightRows(const T* first, int64_t step_elements)
      : row_0(reinterpret_cast<const char*>(first)), step(step_elements * static_cast<int64_t>(sizeof(T))) {
    row_3 = row_0 + 3 * step;
    row_6 = row_3 + 3 * step;
    hide();
  }
  void hide() {
    hide_origin(row_0);
    hide_origin(row_3);
    hide_origin(row_6);
  }
  void advance() {
    row_0 += sizeof(T);
    row_3 += sizeof(T);
    row_6 += sizeof(T);
    hide();
  }
  const T* at(int i) const {
    return reinterpret_cast<const T*>(i < 3 ? row_0 + i * step : i < 6 ? row_3 + (i - 3) * step : row_6 + (i - 6) * step);
  }
};

// One vector of sources. The inner vectors of a tile are whole.
template <class T, int kVectors, int kStep>
inline Vec<T> load_source(const T* p, int v, const uint32_t* masks) {
  const T* q = p + v * kStep * kLanes<T>;
  const bool whole = v > 0 && v < kVectors - 1;
  if constexpr (kStep == 1) {
    if (whole) return load(q);
    return load_bits(q, masks[v]);
  } else {
    if (whole) return even_lanes<T>(load(q), load_bits(q + kLanes<T>, masks[2 * v + 1]));
    return even_lanes<T>(load_bits(q, masks[2 * v]), load_bits(q + kLanes<T>, masks[2 * v + 1]));
  }
}

// Adds the source row of index kIndex of a group of kTaps tap rows to the sums that have a tap there.
template <class T, int kRows, int kVectors, int kStep, int kTaps, int kIndex>
inline __attribute__((always_inline)) void add_source_row(const TileArguments<T>& a, const TapGroup<T>& group,
                                                          Vec<T> (&sum)[kRows][kVectors]) {
  if (kIndex < group.first_index || kIndex >= group.last_index) return;
  const T* source = group.source + kIndex * a.source_row;
  const uint32_t* masks = a.masks;
  WeightRows<T> rows(group.weights, a.tap_columns);
  const int64_t source_column = a.source_column;
  for (int64_t c = a.tap_columns; c > 0; --c) {
    Vec<T> x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load_source<T, kVectors, kStep>(source, v, masks);
      keep_loaded(x[v]);
    }
#pragma GCC unroll 7
    for (int o = 0; o < kRows; ++o) {
      if (kIndex - o * kStep < 0 || kIndex - o * kStep >= kTaps) continue;
      const Vec<T> w = broadcast_from(rows.at(kIndex - o * kStep));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[o][v] = fma(x[v], w, sum[o][v]);
    }
    source += source_column;
    masks += kVectors * kStep;
    rows.advance();
  }
}

template <class T, int kRows, int kVectors, int kStep, int kTaps, int... kIndex>
inline __attribute__((always_inline)) void add_source_rows(const TileArguments<T>& a, const TapGroup<T>& group,
                                                           Vec<T> (&sum)[kRows][kVectors], Lanes<kIndex...>) {
  (add_source_row<T, kRows, kVectors, kStep, kTaps, kIndex>(a, group, sum), ...);
}

template <class T, int kRows, int kVectors, int kStep, int... kBelow>
inline __attribute__((always_inline)) void add_group(const TileArguments<T>& a, int64_t taps, const TapGroup<T>& group,
                                                     Vec<T> (&sum)[kRows][kVectors], Lanes<kBelow...>) {
  ((taps == kBelow + 1 ? add_source_rows<T, kRows, kVectors, kStep, kBelow + 1>(
                             a, group, sum, typename CountedLanes<kBelow + 1 + (kRows - 1) * kStep>::type{})
                       : void()),
   ...);
}

template <class T, int kRows, int kVectors, int kStep>
void compute_sums(const TileArguments<T>& a) {
  Vec<T> sum[kRows][kVectors];
  const Vec<T> initial = broadcast(a.initial);
#pragma GCC unroll 7
  for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[o][v] = initial;
  }
  for (int64_t map = 0; map < a.maps; ++map) {
    for (int64_t tap = 0, taps; tap < a.tap_rows; tap += taps) {
      taps = ceil_div(a.tap_rows - tap, ceil_div(a.tap_rows - tap, most_tap_rows(kStep)));
      const TapGroup<T> group = {a.source + map * a.source_map + tap * a.source_row, a.weights + (map * a.tap_rows + tap) * a.tap_columns,
                                 a.first_index - tap, a.last_index - tap};
      add_group<T, kRows, kVectors, kStep>(a, taps, group, sum, typename CountedLanes<most_tap_rows(kStep)>::type{});
    }
  }
#pragma GCC unroll 7
  for (int o = 0; o < kRows; ++o) {
    if (o >= a.rows) break;
    T* target = a.target + o * a.target_row;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_bits(target + v * kLanes<T>, sum[o][v], a.stored[v]);
  }
}

}  // namespace
