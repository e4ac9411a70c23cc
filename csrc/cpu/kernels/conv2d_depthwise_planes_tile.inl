// The register tile of conv2d_depthwise_planes.cpp: the sums of some rows of a strip, which roll down its staged source rows.
#pragma once

#include "cpu/kernels/conv2d_depthwise_planes_strip.inl"

namespace {

constexpr int kMostSums = 7;
// Vectors of a tile with so many sums in each: they and one vector of weights stay in registers, beside the sums.
constexpr int most_vectors(int64_t sums) {
  const int64_t most = sums <= 3 ? 7 : 4, fitting = (kVectorRegisters - 1) / (sums + 1);
  return static_cast<int>(fitting < most ? fitting : most);
}

// Target rows t = 0, 1, ... of a tile. Row t adds tap row r, of `tap_rows` of them, where it meets the source row of index t * stride + r.
template <class T>
struct TileArguments {
  const T* source;                  // staged: of index 0, for tap column 0 and lane 0
  int64_t source_index;             // elements from an index to the next
  int64_t first_index, last_index;  // that exist
  int64_t stride;
  int64_t tap_rows, tap_columns;
  const int64_t* columns;  // [tap column]: elements to its source
  const T* weights;        // [r % stride, tap column, r / stride]
  int64_t rows;
  const T* initial;  // what the sums begin with, in the form of `sums`; distances in elements, or 0
  int64_t initial_row, initial_vector;
  T* sums;  // where they go to: [row, vector]; or, if null, to the target
  int64_t sums_row;
  T* target;  // of row 0 and the strip's first unit, lane 0
  int64_t target_row;
  const T *next_source, *next_target;  // in place of row 0 and the first unit's first source and target, in what is computed next
  int64_t next_source_row;
  const Piece* pieces;           // of the tile's vectors
  const int64_t* vector_pieces;  // [vector, or behind the last]: its first piece
};

// Adds one source row to the sums of the targets that meet it: sum j with the weight j of each tap column. kColumns of them, which are
// neighbours, or any number, with 0.
template <class T, int kTaps, int kColumns, int kSums, int kVectors>
inline __attribute__((always_inline)) void add_source_row(const TileArguments<T>& a, const T* source, const T* weights,
                                                          Vec<T> (&sum)[kSums][kVectors]) {
  const int64_t columns = kColumns != 0 ? kColumns : a.tap_columns;
#pragma GCC unroll 7
  for (int64_t c = 0; c < columns; ++c) {
    const T* p = source + (kColumns != 0 ? c : a.columns[c]);
    Vec<T> x[kVectors];
#pragma GCC unroll 7
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load(p + v * kLanes<T>);
      keep_loaded(x[v]);
    }
#pragma GCC unroll 7
    for (int j = 0; j < kTaps; ++j) {
      const Vec<T> w = broadcast_from(weights + c * kTaps + j);
#pragma GCC unroll 7
      for (int v = 0; v < kVectors; ++v) sum[j][v] = fma(x[v], w, sum[j][v]);
    }
  }
}

// The source rows that belong to one step of the target: those of the tap rows 0, 1, ..., stride - 1 of the row that begins there. The
// first of them have a tap for each sum, the others one less.
template <class T, bool kStrided, int kColumns, int kSums, int kVectors>
inline __attribute__((always_inline)) void add_source_rows(const TileArguments<T>& a, int64_t index, Vec<T> (&sum)[kSums][kVectors]) {
  if constexpr (!kStrided) {
    if (index >= a.first_index && index < a.last_index) {
      add_source_row<T, kSums, kColumns>(a, a.source + index * a.source_index, a.weights, sum);
    }
    return;
  }
  const int64_t full = a.tap_rows - (kSums - 1) * a.stride, last = smaller(a.stride, a.last_index - index);
  for (int64_t r = larger(0, a.first_index - index); r < last; ++r) {
    const T* source = a.source + (index + r) * a.source_index;
    if (r < full) {
      add_source_row<T, kSums, kColumns>(a, source, a.weights + r * kSums * a.tap_columns, sum);
    } else {
      add_source_row<T, kSums - 1, kColumns>(a, source, a.weights + (r * (kSums - 1) + full) * a.tap_columns, sum);
    }
  }
}

template <class T, int kVectors>
inline __attribute__((always_inline)) void write_sums(const TileArguments<T>& a, int64_t row, const Vec<T> (&sum)[kVectors]) {
#pragma GCC unroll 7
  for (int v = 0; v < kVectors; ++v) store(a.sums + row * a.sums_row + v * kLanes<T>, sum[v]);
}

// Writes a row of the target, and fetches what comes next in its place towards the second cache: with strides, a vector of the target
// stands for two of two source rows.
template <class T, bool kStrided, int kVectors>
inline __attribute__((always_inline)) void write_target(const TileArguments<T>& a, int64_t row, const Vec<T> (&sum)[kVectors]) {
  T* target = a.target + row * a.target_row;
  const T *next_target = a.next_target + row * a.target_row, *next_source = a.next_source + row * a.next_source_row;
  const int64_t source_row = kStrided ? a.next_source_row / a.stride : 0;
#pragma GCC unroll 7
  for (int v = 0; v < kVectors; ++v) {
    for (const Piece *piece = a.pieces + a.vector_pieces[v], *last = a.pieces + a.vector_pieces[v + 1]; piece < last; ++piece) {
      store_bits(target + piece->target, sum[v], piece->lanes);
      __builtin_prefetch(next_target + piece->target, 0, 2);
      __builtin_prefetch(next_source + piece->source, 0, 2);
      if constexpr (kStrided) {
        __builtin_prefetch(next_source + piece->source + kLanes<T>, 0, 2);
        __builtin_prefetch(next_source + piece->source + source_row, 0, 2);
        __builtin_prefetch(next_source + piece->source + source_row + kLanes<T>, 0, 2);
      }
    }
  }
}

// sum[j] belongs to the target row that began j steps ago. Those before the first and behind the last are computed from what is there and
// written nowhere.
template <class T, bool kStrided, int kColumns, int kSums, int kVectors>
void compute_tile(const TileArguments<T>& a) {
  Vec<T> sum[kSums][kVectors] = {};
  for (int64_t row = 0; row < a.rows + kSums - 1; ++row) {
    if (row < a.rows) {
      const T* initial = a.initial + row * a.initial_row;
#pragma GCC unroll 7
      for (int v = 0; v < kVectors; ++v) sum[0][v] = load(initial + v * a.initial_vector);
    }
    add_source_rows<T, kStrided, kColumns>(a, row * a.stride, sum);
    if (row >= kSums - 1) {
      const int64_t complete = row - (kSums - 1);
      a.sums != nullptr ? write_sums<T>(a, complete, sum[kSums - 1]) : write_target<T, kStrided>(a, complete, sum[kSums - 1]);
    }
#pragma GCC unroll 7
    for (int j = kSums - 1; j > 0; --j) {
#pragma GCC unroll 7
      for (int v = 0; v < kVectors; ++v) sum[j][v] = sum[j - 1][v];
    }
  }
}

template <class T, bool kStrided, int kColumns, int kSums, int kVectors = most_vectors(kSums)>
void compute_vectors(const TileArguments<T>& a, int64_t vectors) {
  if (vectors == kVectors) return compute_tile<T, kStrided, kColumns, kSums, kVectors>(a);
  if constexpr (kVectors > 1) compute_vectors<T, kStrided, kColumns, kSums, kVectors - 1>(a, vectors);
}

// Square kernels of the usual sizes have tiles of their own.
template <class T, int kSums>
void compute_sums(const TileArguments<T>& a, int64_t vectors) {
  if (a.stride != 1) return compute_vectors<T, true, 0, kSums>(a, vectors);
  if constexpr (kSums % 2 == 1 && kSums > 1) {
    if (a.tap_columns == kSums && a.columns[1] == 1) return compute_vectors<T, false, kSums, kSums>(a, vectors);
  }
  compute_vectors<T, false, 0, kSums>(a, vectors);
}

template <class T>
void compute_tile(const TileArguments<T>& a, int64_t vectors) {
  switch (ceil_div(a.tap_rows, a.stride)) {
    case 1:
      return compute_sums<T, 1>(a, vectors);
    case 2:
      return compute_sums<T, 2>(a, vectors);
    case 3:
      return compute_sums<T, 3>(a, vectors);
    case 4:
      return compute_sums<T, 4>(a, vectors);
    case 5:
      return compute_sums<T, 5>(a, vectors);
    case 6:
      return compute_sums<T, 6>(a, vectors);
    default:
      return compute_sums<T, 7>(a, vectors);
  }
}

}  // namespace
