// The register tiles of conv2d_depthwise_rows.cpp: rows of sums, which roll down the source rows where they lie in memory.
#pragma once

#include <type_traits>

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
  int64_t first_target, last_target;  // rows to write
  const float* target_end;            // of what may be written
  int64_t next_source, next_target;   // elements to what is computed in the same place of the next block, or 0
};

inline Vec<float> keep_lanes(Vec<float> v, const LaneMask& mask) {
  return (Vec<float>)((Vec<int32_t>)v & *reinterpret_cast<const Vec<int32_t>*>(mask.lanes));
}

// Lanes behind a row are written, too: they lie in the next row or map, which is computed later, unless the task ends there.
inline void store_before(float* p, Vec<float> v, const float* end) {
  const int64_t left = end - p;
  if (left >= kLanes<float>) return store(p, v);
  if (left > 0) store_first(p, v, static_cast<int>(left));
}

// Fetches what kFloats neighbouring elements lie in, towards the second cache.
template <int kFloats>
inline void fetch(const float* p) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(float));
#pragma GCC unroll 2
  for (int i = 0; i < kFloats; i += kLine) __builtin_prefetch(p + i, 0, 2);
}

// The weight of a tap; backward_input takes the taps in reverse.
template <int kTaps, bool kReverse>
inline Vec<float> weight_of(const float* weights, int row, int column) {
  const int tap = row * kTaps + column;
  return broadcast_from(weights + (kReverse ? kTaps * kTaps - 1 - tap : tap));
}

// All weights of a map, in registers.
template <int kTaps, bool kReverse>
struct KeptWeights {
  Vec<float> weight[kTaps][kTaps];
  explicit KeptWeights(const float* weights) {
#pragma GCC unroll 3
    for (int r = 0; r < kTaps; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < kTaps; ++c) weight[r][c] = weight_of<kTaps, kReverse>(weights, r, c);
    }
  }
  Vec<float> operator()(int row, int column) const { return weight[row][column]; }
};

// Weights that are loaded wherever they are used.
template <int kTaps, bool kReverse>
struct LoadedWeights {
  const float* weights;
  explicit LoadedWeights(const float* p) : weights(p) {}
  Vec<float> operator()(int row, int column) const { return weight_of<kTaps, kReverse>(weights, row, column); }
};

// 9 weights stay in registers beside the sums of two vectors; of more, each is loaded once for both.
template <int kTaps>
constexpr bool kKeepsWeights = kTaps == 3;
template <int kTaps, bool kReverse>
using Weights = std::conditional_t<kKeepsWeights<kTaps>, KeptWeights<kTaps, kReverse>, LoadedWeights<kTaps, kReverse>>;

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

// Adds a source row, which meets tap rows kTapRow, kTapRow + kStride, ...: sum `begun` is that of the target row that begins there, those
// before it began earlier.
template <int kTaps, int kStride, int kVectors, int kTapRow, int kSums, class W>
inline __attribute__((always_inline)) void add_source_row(const TileArguments& a, const float* source, const W& weights, int begun,
                                                          Vec<float> (&sum)[kSums][kVectors]) {
  constexpr int kMeeting = (kTaps - kTapRow + kStride - 1) / kStride;
  if (a.next_source != 0) fetch<kStride * kVectors * kLanes<float>>(source + a.next_source);
#pragma GCC unroll 5
  for (int column = 0; column < kTaps; column += kStride) {
    Vec<float> x[kVectors][kStride];
    const int columns = kTaps - column < kStride ? kTaps - column : kStride;
    if constexpr (kKeepsWeights<kTaps>) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        load_columns<kTaps, kStride, kVectors>(a, source, column, v, x[v]);
#pragma GCC unroll 2
        for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 5
          for (int j = 0; j < kMeeting; ++j) {
            accumulate(sum[(begun - j + kSums) % kSums][v], x[v][k], weights(kTapRow + j * kStride, column + k));
          }
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
          for (int v = 0; v < kVectors; ++v) accumulate(sum[(begun - j + kSums) % kSums][v], x[v][k], w);
        }
      }
    }
  }
}

// A forward convolution. A step begins a target row, adds the source rows of its first kStride tap rows to all sums that meet them, and
// completes the row that began kSums - 1 steps ago: each source row is loaded once for each tap column. The sums stay where they are while
// their roles roll on.
template <int kTaps, int kStride, bool kReverse, int kVectors>
void compute_gather_tile(const TileArguments& a) {
  constexpr int kSums = (kTaps + kStride - 1) / kStride;
  const Weights<kTaps, kReverse> weights(a.weights);
  Vec<float> sum[kSums][kVectors] = {};
  const int64_t end = a.last_target + kSums - 1;
  for (int64_t first = a.first_target; first < end; first += kSums) {
#pragma GCC unroll 5
    for (int begun = 0; begun < kSums; ++begun) {
      const int64_t row = first + begun, index = row * kStride - a.pad_top, complete = row - (kSums - 1);
      if (row >= end) return;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[begun][v] = broadcast(a.initial);
      const float* source = a.source + index * a.source_row;
      if (index >= 0 && index < a.source_rows) add_source_row<kTaps, kStride, kVectors, 0>(a, source, weights, begun, sum);
      if constexpr (kStride == 2) {
        if (index + 1 >= 0 && index + 1 < a.source_rows) {
          add_source_row<kTaps, kStride, kVectors, 1>(a, source + a.source_row, weights, begun, sum);
        }
      }
      if (complete < a.first_target) continue;
      float* target = a.target + complete * a.target_row;
      if (a.next_target != 0) fetch<kVectors * kLanes<float>>(target + a.next_target);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store_before(target + v * kLanes<float>, sum[(begun + 1) % kSums][v], a.target_end);
    }
  }
}

// backward_input with a stride of 2: a lane has two neighbouring targets, which are interleaved at the store. Half h (0: even columns) of
// target row t meets grad_output's row i and column lane + d with the tap row t + pad - 2 * i and the tap column h + pad - 2 * d.
constexpr int kPairStride = 2;

template <int kTaps, class W>
inline __attribute__((always_inline)) void add_pairs(const TileArguments& a, const float* source, const W& weights,
                                                     Vec<float> (&sum)[kTaps][kPairStride]) {
  constexpr int kPad = reach_of(kTaps), kFirst = -((kTaps - 1 - kPad) / 2), kLast = (kPad + 1) / 2;
  if (a.next_source != 0) fetch<kLanes<float>>(source + a.next_source);
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
void compute_pairs_tile(const TileArguments& a) {
  const Weights<kTaps, false> weights(a.weights);
  Vec<float> sum[kTaps][kPairStride] = {};
  const int64_t first = floor_div(a.first_target + a.pad_top - (kTaps - kPairStride), kPairStride),
                last = floor_div(a.last_target - 1 + a.pad_top, kPairStride);
  for (int64_t index = first; index <= last; ++index) {
    if (index >= 0 && index < a.source_rows) add_pairs<kTaps>(a, a.source + index * a.source_row, weights, sum);
#pragma GCC unroll 2
    for (int r = 0; r < kPairStride; ++r) {
      const int64_t row = index * kPairStride - a.pad_top + r;
      if (row < a.first_target || row >= a.last_target) continue;
      float* target = a.target + row * a.target_row;
      if (a.next_target != 0) fetch<kPairStride * kLanes<float>>(target + a.next_target);
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
