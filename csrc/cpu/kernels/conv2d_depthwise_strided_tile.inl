// The register tile of conv2d_depthwise_strided.cpp: rows of sums of pairs of targets, which roll down the staged rows of grad_output.
#pragma once

#include "cpu/kernels/conv2d_depthwise_planes_strip.inl"

namespace {

constexpr int64_t kStride = 2;

// Vectors of pairs in a tile of so many rows of sums: they and one vector of weights stay in registers, beside the sums.
constexpr int most_vectors(int rows) {
  const int fitting = (kVectorRegisters - 1) / (2 * rows + 1);
  return fitting < 1 ? 1 : fitting > 4 ? 4 : fitting;
}

// Where a unit's targets lie that belong to a vector of pairs: lane 0 lies (or would) so many elements behind the strip's first target of
// the row, and its source behind that one's. Interleaved, they are two vectors.
struct PairPiece {
  int64_t target, source;
  uint32_t lanes[2];
};

// Rows of some pairs. Source row i adds its taps to the target rows i * stride - pad_top, ...
template <class T>
struct TileArguments {
  const T* source;  // staged: of source row 0 (which may not be there), for distance 0 and lane 0
  int64_t source_row;
  int64_t first_index, last_index;    // source rows, also outside the map, that the targets meet
  int64_t first_source, last_source;  // those that exist
  int64_t pad_top;
  int64_t first_target, last_target;  // rows to write
  int64_t distances;
  const uint8_t* halves;  // [distance]: bit h, whether half h has a tap there
  const T* weights;       // [distance, half that has a tap, tap row]
  T* target;              // of row 0 and the strip's first unit, column 0
  int64_t target_row;
  const T *next_source, *next_target;  // in place of row 0, in what is computed next
  int64_t next_source_row;
  const PairPiece* pieces;       // of the tile's vectors
  const int64_t* vector_pieces;  // [vector, or behind the last]: its first piece
};

// sum[row][half * kVectors + vector]
template <class T, int kRows, int kVectors>
using PairSums = Vec<T>[kRows][2 * kVectors];

template <class T, int kRows, int kVectors>
inline __attribute__((always_inline)) void add_source_row(const TileArguments<T>& a, const T* source, PairSums<T, kRows, kVectors>& sum) {
  const T* weights = a.weights;
  for (int64_t d = 0; d < a.distances; ++d) {
    Vec<T> x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load(source + d + v * kLanes<T>);
      keep_loaded(x[v]);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if ((a.halves[d] >> half & 1) == 0) continue;
#pragma GCC unroll 7
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> w = broadcast_from(weights + r);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][half * kVectors + v] = fma(x[v], w, sum[r][half * kVectors + v]);
      }
      weights += kRows;
    }
  }
}

// Writes a row of targets, and fetches what comes next in its place towards the second cache.
template <class T, int kVectors>
inline __attribute__((always_inline)) void write_pairs(const TileArguments<T>& a, int64_t row, const Vec<T> (&sum)[2 * kVectors]) {
  T* target = a.target + row * a.target_row;
  const T *next_target = a.next_target + row * a.target_row, *next_source = a.next_source + row / kStride * a.next_source_row;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> lower = interleave_lower<T>(sum[v], sum[kVectors + v]), upper = interleave_upper<T>(sum[v], sum[kVectors + v]);
    for (const PairPiece *piece = a.pieces + a.vector_pieces[v], *last = a.pieces + a.vector_pieces[v + 1]; piece < last; ++piece) {
      store_bits(target + piece->target, lower, piece->lanes[0]);
      store_bits(target + piece->target + kLanes<T>, upper, piece->lanes[1]);
      __builtin_prefetch(next_target + piece->target, 0, 2);
      __builtin_prefetch(next_target + piece->target + kLanes<T>, 0, 2);
      __builtin_prefetch(next_source + piece->source, 0, 2);
    }
  }
}

template <class T, int kRows, int kVectors>
void compute_tile(const TileArguments<T>& a) {
  PairSums<T, kRows, kVectors> sum = {};
  for (int64_t index = a.first_index; index < a.last_index; ++index) {
    if (index >= a.first_source && index < a.last_source) add_source_row<T, kRows, kVectors>(a, a.source + index * a.source_row, sum);
#pragma GCC unroll 2
    for (int r = 0; r < kStride; ++r) {
      const int64_t row = index * kStride - a.pad_top + r;
      if (row >= a.first_target && row < a.last_target) write_pairs<T, kVectors>(a, row, sum[r]);
    }
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * kVectors; ++v) sum[r][v] = r + kStride < kRows ? sum[r + kStride < kRows ? r + kStride : r][v] : Vec<T>{};
    }
  }
}

template <class T, int kRows, int kVectors = most_vectors(kRows)>
void compute_rows(const TileArguments<T>& a, int64_t vectors) {
  if (vectors == kVectors) return compute_tile<T, kRows, kVectors>(a);
  if constexpr (kVectors > 1) compute_rows<T, kRows, kVectors - 1>(a, vectors);
}

template <class T>
void compute_tile(const TileArguments<T>& a, int64_t rows, int64_t vectors) {
  if (rows == 3) return compute_rows<T, 3>(a, vectors);
  rows == 5 ? compute_rows<T, 5>(a, vectors) : compute_rows<T, 7>(a, vectors);
}

}  // namespace
