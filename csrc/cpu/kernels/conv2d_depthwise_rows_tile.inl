// The register tiles of conv2d_depthwise_rows.cpp: rows of sums, which roll down the source rows where they lie in memory.
#pragma once

#include "cpu/kernels/conv2d_depthwise_planes_strip.inl"

namespace {

// A tap of a square kernel reaches so many columns beyond the map, at most, on either side.
constexpr int reach_of(int taps) { return taps / 2; }
constexpr int kMostReach = 2;

// The lanes whose source exists, all bits of them set.
struct LaneMask {
  alignas(kVectorBytes) int32_t lanes[kLanes<float>];
};
// [distance from the outermost tap column]
using EdgeMasks = LaneMask[kMostReach];

// Of a tile: 3 rows of sums, all weights and a vector of sources are 16 registers.
constexpr int kMostVectors = 2;

// Rows of some vectors of targets.
struct TileArguments {
  const float* source;  // row 0, at what lane 0 meets with tap column 0 (backward_input with a stride: at lane 0)
  int64_t source_row;
  int64_t source_rows;  // of the map
  int64_t pad_top;
  const float* weights;
  float initial;
  const EdgeMasks *left, *right;  // for the first vector's first tap columns, the last vector's last ones
  float* target;                  // row 0, lane 0
  int64_t target_row;
  int64_t first_target, last_target;       // rows to write
  const float* target_end;                 // of what may be written
  const float *next_source, *next_target;  // of the next block: what to fetch meanwhile
};

inline Vec<float> keep_lanes(Vec<float> v, const LaneMask& mask) {
  return (Vec<float>)((Vec<int32_t>)v & *reinterpret_cast<const Vec<int32_t>*>(mask.lanes));
}

// Lanes behind a row are written, too: they lie in the next row or map, which is computed later, unless the task ends there.
inline __attribute__((always_inline)) void store_before(float* p, Vec<float> v, const float* end) {
  if (__builtin_expect(p <= end - kLanes<float>, 1)) return store(p, v);
  if (p < end) store_first(p, v, static_cast<int>(end - p));
}

inline bool is_below(int64_t index, int64_t count) { return static_cast<uint64_t>(index) < static_cast<uint64_t>(count); }

// Fetches the next kFloats elements towards the second cache.
template <int kFloats>
inline void fetch(const float*& next) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(float));
#pragma GCC unroll 4
  for (int i = 0; i < kFloats; i += kLine) __builtin_prefetch(next + i, 0, 2);
  next += kFloats;
}

// The weight of a tap; backward_input takes the taps in reverse.
template <int kTaps, bool kReverse>
inline Vec<float> weight_of(const float* weights, int row, int column) {
  const int tap = row * kTaps + column;
  return broadcast_from(weights + (kReverse ? kTaps * kTaps - 1 - tap : tap));
}

// The weights of a map, which are loaded wherever they are used: each once for all vectors of a tile.
template <int kTaps, bool kReverse>
struct Weights {
  static constexpr bool kStayInRegisters = false;
  const float* weights;
  explicit Weights(const float* p) : weights(p) {}
  Vec<float> operator()(int row, int column) const { return weight_of<kTaps, kReverse>(weights, row, column); }
};

// 9 weights stay in registers, beside the sums of two vectors.
template <bool kReverse>
struct Weights<3, kReverse> {
  static constexpr bool kStayInRegisters = true;
  static constexpr int kTaps = 3;
  Vec<float> weight[kTaps][kTaps];
  explicit Weights(const float* weights) {
#pragma GCC unroll 3
    for (int r = 0; r < kTaps; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < kTaps; ++c) weight[r][c] = weight_of<kTaps, kReverse>(weights, r, c);
    }
  }
  Vec<float> operator()(int row, int column) const { return weight[row][column]; }
};

// What vector v of the targets meets with the tap columns `column` to column + kStride - 1.
template <int kTaps, int kStride, int kVectors>
inline __attribute__((always_inline)) void load_columns(const TileArguments& a, const float* source, int column, int v,
                                                        Vec<float> (&x)[kStride]) {
  const float* p = source + column + v * kStride * kLanes<float>;
  if constexpr (kStride == 1) {
    x[0] = load(p);
  } else {
    const Vec<float> lower = load(p), upper = load(p + kLanes<float>);
    x[0] = even_lanes<float>(lower, upper);
    x[1] = odd_lanes<float>(lower, upper);
  }
#pragma GCC unroll 2
  for (int k = 0; k < kStride; ++k) {
    const int from_left = column + k, from_right = kTaps - 1 - from_left;
    if (v == 0 && from_left < reach_of(kTaps)) x[k] = keep_lanes(x[k], (*a.left)[from_left]);
    if (v == kVectors - 1 && from_right >= 0 && from_right < reach_of(kTaps)) x[k] = keep_lanes(x[k], (*a.right)[from_right]);
  }
}

// Adds a source row, which meets tap rows kTapRow, kTapRow + kStride, ...: sum j is that of the target row that began j steps ago.
template <int kTaps, int kStride, int kVectors, int kTapRow, int kSums, class W>
inline __attribute__((always_inline)) void add_source_row(const TileArguments& a, const float* source, const W& weights,
                                                          Vec<float> (&sum)[kSums][kVectors]) {
  constexpr int kMeeting = (kTaps - kTapRow + kStride - 1) / kStride;
#pragma GCC unroll 5
  for (int column = 0; column < kTaps; column += kStride) {
    Vec<float> x[kVectors][kStride];
    const int columns = kTaps - column < kStride ? kTaps - column : kStride;
    if constexpr (W::kStayInRegisters) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        load_columns<kTaps, kStride, kVectors>(a, source, column, v, x[v]);
#pragma GCC unroll 2
        for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 5
          for (int j = 0; j < kMeeting; ++j) accumulate(sum[j][v], x[v][k], weights(kTapRow + j * kStride, column + k));
        }
      }
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) load_columns<kTaps, kStride, kVectors>(a, source, column, v, x[v]);
#pragma GCC unroll 2
      for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 5
        for (int j = 0; j < kMeeting; ++j) {
          const Vec<float> w = weights(kTapRow + j * kStride, column + k);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) accumulate(sum[j][v], x[v][k], w);
        }
      }
    }
  }
}

// Where a tile of a forward convolution stands. A step begins a target row, adds the source rows of its first kStride tap rows to all sums
// that meet them, and completes the row that began kSums - 1 steps ago: each source row is loaded once for each tap column.
template <int kTaps, int kStride, bool kReverse, int kVectors>
struct GatherTile {
  static constexpr int kSums = (kTaps + kStride - 1) / kStride;

  const TileArguments a;  // a copy, which no store changes
  const Weights<kTaps, kReverse> weights;
  int64_t index;        // of the step's first source row
  const float* source;  // there
  float* target;        // the row that the step completes
  const float *next_source, *next_target;
  Vec<float> sum[kSums][kVectors];

  explicit __attribute__((always_inline)) GatherTile(const TileArguments& arguments)
      : a(arguments),
        weights(a.weights),
        index(a.first_target * kStride - a.pad_top),
        source(a.source + index * a.source_row),
        target(a.target + (a.first_target - (kSums - 1)) * a.target_row),
        next_source(a.next_source),
        next_target(a.next_target),
        sum{} {}

  // kAnyRow: whether source rows may be missing. kCompletes: whether the completed row is one to write.
  template <bool kAnyRow, bool kCompletes>
  inline __attribute__((always_inline)) void step() {
#pragma GCC unroll 5
    for (int j = kSums - 1; j > 0; --j) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[j][v] = sum[j - 1][v];
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[0][v] = broadcast(a.initial);
    if (!kAnyRow || is_below(index, a.source_rows)) add_source_row<kTaps, kStride, kVectors, 0>(a, source, weights, sum);
    if constexpr (kStride == 2) {
      if (!kAnyRow || is_below(index + 1, a.source_rows)) {
        add_source_row<kTaps, kStride, kVectors, 1>(a, source + a.source_row, weights, sum);
      }
    }
    if constexpr (kCompletes) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store_before(target + v * kLanes<float>, sum[kSums - 1][v], a.target_end);
    }
    if constexpr (kVectors == kMostVectors) {  // as many elements as a step reads and writes; rows of a vector need no help
      fetch<kStride * kStride * kVectors * kLanes<float>>(next_source);
      fetch<kVectors * kLanes<float>>(next_target);
    }
    index += kStride;
    source += kStride * a.source_row;
    target += a.target_row;
  }
};

template <int kTaps, int kStride, bool kReverse, int kVectors>
void compute_gather_tile(const TileArguments& a) {
  GatherTile<kTaps, kStride, kReverse, kVectors> tile(a);
  for (int i = 0; i < tile.kSums - 1; ++i) tile.template step<true, false>();
  int64_t rows = a.last_target - a.first_target;
  for (; rows > 0 && tile.index < 0; --rows) tile.template step<true, true>();
  for (; rows > 0 && tile.index + kStride <= tile.a.source_rows; --rows) tile.template step<false, true>();
  for (; rows > 0; --rows) tile.template step<true, true>();
}

// backward_input with a stride of 2: a lane has two neighbouring targets, which are interleaved at the store. Half h (0: even columns) of
// target row t meets grad_output's row i and column lane + d with the tap row t + pad - 2 * i and the tap column h + pad - 2 * d.
constexpr int kPairStride = 2;

template <int kTaps, class W>
inline __attribute__((always_inline)) void add_pairs(const TileArguments& a, const float* source, const W& weights,
                                                     Vec<float> (&sum)[kTaps][kPairStride]) {
  constexpr int kPad = reach_of(kTaps), kFirst = -((kTaps - 1 - kPad) / 2), kLast = (kPad + 1) / 2;
#pragma GCC unroll 3
  for (int d = kFirst; d <= kLast; ++d) {
    Vec<float> x = load(source + d);
    if (d < 0) x = keep_lanes(x, (*a.left)[d - kFirst]);
    if (d > 0) x = keep_lanes(x, (*a.right)[kLast - d]);
#pragma GCC unroll 2
    for (int half = 0; half < kPairStride; ++half) {
      const int column = half + kPad - kPairStride * d;
      if (column < 0 || column >= kTaps) continue;
#pragma GCC unroll 5
      for (int r = 0; r < kTaps; ++r) accumulate(sum[r][half], x, weights(r, column));
    }
  }
}

template <int kTaps>
void compute_pairs_tile(const TileArguments& arguments) {
  const TileArguments a = arguments;  // which no store changes
  const Weights<kTaps, false> weights(a.weights);
  int64_t index = floor_div(a.first_target + a.pad_top - (kTaps - kPairStride), kPairStride);
  int64_t row = index * kPairStride - a.pad_top;  // the first that the source row meets
  const float* source = a.source + index * a.source_row;
  float* target = a.target + row * a.target_row;
  const float *next_source = a.next_source, *next_target = a.next_target;
  Vec<float> sum[kTaps][kPairStride] = {};
  for (; row < a.last_target; ++index, source += a.source_row) {
    if (is_below(index, a.source_rows)) add_pairs<kTaps>(a, source, weights, sum);
    fetch<kLanes<float>>(next_source);
    fetch<kPairStride * kPairStride * kLanes<float>>(next_target);
#pragma GCC unroll 2
    for (int r = 0; r < kPairStride; ++r, ++row, target += a.target_row) {
      if (row < a.first_target || row >= a.last_target) continue;
      store_before(target, interleave_lower<float>(sum[r][0], sum[r][1]), a.target_end);
      store_before(target + kLanes<float>, interleave_upper<float>(sum[r][0], sum[r][1]), a.target_end);
    }
#pragma GCC unroll 5
    for (int r = 0; r < kTaps; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < kPairStride; ++half) {
        sum[r][half] = r + kPairStride < kTaps ? sum[r + kPairStride < kTaps ? r + kPairStride : r][half] : Vec<float>{};
      }
    }
  }
}

}  // namespace
