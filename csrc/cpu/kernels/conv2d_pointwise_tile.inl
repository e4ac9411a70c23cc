// Register tiles of a 1x1 convolution: the sums of a few outputs at a few points over a block of channels. The source is read where it
// lies. 32 registers hold 28 sums, 16 hold 12.
//
// OutputLanes has outputs in the lanes: 2 vectors of them x up to 14 points (6 with 16 registers). A step loads 2 vectors of weights and
// broadcasts one source element for every 2 FMAs: 16 loads for 28 FMAs leave the load ports a third of their slots. The points may lie
// anywhere at equal distances, so it serves channels_last, strides, and the short lines of small planar maps.
//
// PointLanes has neighbouring points in the lanes: 2 vectors of them x up to 14 outputs, whose weights are broadcast. Its unaligned loads
// take two slots each where they cross a cache line: 18 slots for 28 FMAs. It stores planar lines as they lie.
#pragma once

#include "cpu/simd/transpose.h"
#include "cpu/simd/vec.h"

namespace {

constexpr int kTileSums = kVectorRegisters == 32 ? 28 : 12;
constexpr int64_t kAheadRun = 8;

template <class T>
struct PointwiseTile {
  const T* weights;  // [channels][width]
  const T* source;   // of the first point and channel
  int64_t channels;
  int64_t source_point, source_channel;  // distances in elements
  const T* bias;                         // [width]: what the sums are added to; null: what `out` holds already
  T* out;
  int64_t pitch;  // from point to point (outputs in the lanes) or from output to output (points in the lanes)
  int last;       // lanes of the last vector that exist
  // What a later tile will read, fetched towards the second cache on the way: a line at every step, `ahead_step` elements further, and,
  // with points in the lanes, after kAheadRun steps `ahead_jump` more, to the next plane.
  const T* ahead;
  int64_t ahead_step, ahead_jump;
  // Where sums will go, fetched at the first `out_steps` steps: a line at each, `out_step` elements further. 0: it is there.
  const T* out_ahead;
  int64_t out_step, out_steps;
};

// A function that takes sums by reference must vanish into its caller, or the sums live in memory.
#define CNN_EXT_INLINE inline __attribute__((always_inline))

// Whether a turn of a tile's loop takes two channels. A turn of 12 FMAs is so short that Zen 3 falls into rhythms in which a third of its
// FMA slots stay empty, depending on how the loop was entered; one of 28 FMAs has time enough.
constexpr bool kTurnsOfTwo = kVectorRegisters < 32;

template <class Body>
CNN_EXT_INLINE void for_each_channel(int64_t channels, const Body& add_channel) {
  if constexpr (kTurnsOfTwo) {
    for (; channels >= 2; channels -= 2) add_channel(), add_channel();
  }
  for (; channels > 0; --channels) add_channel();
}

// The end of every sum, and the only place that writes: the sum is added to the bias, or to what the destination holds.
template <class T>
CNN_EXT_INLINE void finish(T* place, bool has_bias, Vec<T> bias, Vec<T> sum, int lanes) {
  if (lanes == kLanes<T>) {
    store(place, (has_bias ? bias : load(place)) + sum);
  } else {
    store_first(place, (has_bias ? bias : load_first(place, lanes)) + sum, lanes);
  }
}

// The sums of one point, outputs in the lanes.
template <class T, int kVectors>
CNN_EXT_INLINE void finish_point(const PointwiseTile<T>& tile, int point, const Vec<T> (&sum)[kVectors]) {
  constexpr int kV = kLanes<T>;
  const bool has_bias = tile.bias != nullptr;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    finish(tile.out + point * tile.pitch + v * kV, has_bias, has_bias ? load(tile.bias + v * kV) : Vec<T>{}, sum[v],
           v + 1 < kVectors ? kV : tile.last);
  }
}

template <class T, int kVectors>
CNN_EXT_INLINE void add_products(Vec<T> (&sum)[kVectors], Vec<T> x, const Vec<T> (&weight)[kVectors]) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) sum[v] = fma(x, weight[v], sum[v]);
}

// The element kScale * bytes behind p in every lane. The addressing mode is spelt out: left to itself, GCC keeps one pointer for each of
// 14 points, which are more than there are registers.
template <int kScale, class T>
inline Vec<T> broadcast_scaled(const T* p, int64_t bytes) {
#if defined(__AVX2__)
  Vec<T> v;
  if constexpr (sizeof(T) == 4) {
    asm("vbroadcastss (%1,%2,%c4), %0" : "=v"(v) : "r"(p), "r"(bytes), "m"(*p), "i"(kScale));
  } else {
    asm("vbroadcastsd (%1,%2,%c4), %0" : "=v"(v) : "r"(p), "r"(bytes), "m"(*p), "i"(kScale));
  }
  return v;
#else
  return broadcast_from(reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + kScale * bytes));
#endif
}

// Points at any distance with their channels at any other: 14 addresses from two pointers and the odd multiples of the distance. (Points
// side by side need less, but gain nothing by it: the FMAs are what a step waits for.)
template <class T>
struct Points {
  explicit Points(const PointwiseTile<T>& tile)
      : first(tile.source),
        eighth(tile.source + 8 * tile.source_point),
        once(tile.source_point * static_cast<int64_t>(sizeof(T))),
        thrice(3 * once),
        fivefold(5 * once),
        sevenfold(7 * once),
        step(tile.source_channel) {}
  template <int kPoint>
  Vec<T> get() const {
    if constexpr (kPoint == 0) return broadcast_from(first);
    if constexpr (kPoint == 8) return broadcast_from(eighth);
    const T* const base = kPoint < 8 ? first : eighth;
    if constexpr (kPoint % 8 == 1) return broadcast_scaled<1>(base, once);
    if constexpr (kPoint % 8 == 2) return broadcast_scaled<2>(base, once);
    if constexpr (kPoint % 8 == 3) return broadcast_scaled<1>(base, thrice);
    if constexpr (kPoint % 8 == 4) return broadcast_scaled<4>(base, once);
    if constexpr (kPoint % 8 == 5) return broadcast_scaled<1>(base, fivefold);
    if constexpr (kPoint % 8 == 6) return broadcast_scaled<2>(base, thrice);
    if constexpr (kPoint % 8 == 7) return broadcast_scaled<1>(base, sevenfold);
  }
  void next() { first += step, eighth += step; }

  const T* first;
  const T* eighth;
  const int64_t once, thrice, fivefold, sevenfold, step;
};

template <class T, int kVectors, int... kPoint>
__attribute__((noinline)) void output_lanes(const PointwiseTile<T>& tile, Lanes<kPoint...>) {
  constexpr int kV = kLanes<T>;
  Vec<T> sum[sizeof...(kPoint)][kVectors] = {};
  Points<T> points(tile);
  const T* weights = tile.weights;
  const T* ahead = tile.out_ahead;
  int64_t ahead_step = tile.out_step, steps = tile.out_steps < tile.channels ? tile.out_steps : tile.channels;
  for (int64_t left = tile.channels - steps;; steps = left, left = 0) {
    for_each_channel(steps, [&]() __attribute__((always_inline)) {
      Vec<T> weight[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kV);
      (add_products<T>(sum[kPoint], points.template get<kPoint>(), weight), ...);
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
      weights += kVectors * kV;
      points.next();
    });
    if (left == 0) break;
    ahead = tile.ahead, ahead_step = tile.ahead_step;
  }
  (finish_point<T>(tile, kPoint, sum[kPoint]), ...);
}

// Whether each tile of points takes an even share of those that are left, rather than the last one the rest: of 7 x 7 points in tiles of 6
// that would be a single one, whose two sums wait for the latency of their own additions.
constexpr bool kEvenTiles = kVectorRegisters < 32;

// With 16 registers a step is short: the places of a tile of fewer steps than about these are fetched by an earlier one.
constexpr int64_t kFetchPixelSteps = kVectorRegisters < 32 ? 160 : 0;
constexpr int64_t kFetchPlaneSteps = kVectorRegisters < 32 ? 64 : 0;

// The units of both tiles: `outputs` channels are cut into units, each as wide as one tile.
template <class T>
struct OutputLanes {
  static constexpr int kV = kLanes<T>;
  static constexpr bool kPointsInLanes = false;
  static constexpr int kMaxWidth = 2 * kV;
  static constexpr int kMaxPoints = kTileSums / 2;
  static constexpr int64_t kFetchSteps = kFetchPixelSteps;

  static int64_t units(int64_t outputs) { return (outputs + kMaxWidth - 1) / kMaxWidth; }
  static int64_t first(int64_t, int64_t unit) { return unit * kMaxWidth; }
  static int64_t width(int64_t outputs, int64_t unit) { return outputs - unit * kMaxWidth > kV ? kMaxWidth : kV; }

  static int64_t tiles(int64_t points) { return (points + kMaxPoints - 1) / kMaxPoints; }
  static int64_t tile_points(int64_t points) { return (points + tiles(points) - 1) / tiles(points); }
  static int64_t next_tile(int64_t points_left) { return tile_points(points_left); }  // where tiles are even

  static void run(const PointwiseTile<T>& tile, int64_t width, int64_t points) {
    width == kMaxWidth ? run_points<2>(tile, points) : run_points<1>(tile, points);
  }

 private:
  template <int kVectors, int kPoints = kMaxPoints>
  static void run_points(const PointwiseTile<T>& tile, int64_t points) {
    if (points == kPoints) return output_lanes<T, kVectors>(tile, typename CountedLanes<kPoints>::type{});
    if constexpr (kPoints > 1) run_points<kVectors, kPoints - 1>(tile, points);
  }
};

// Whether loading some lanes takes no more than loading all of them.
constexpr bool kMasksAreFree = kVectorBytes == 64;

// What a channel adds to the sums of points in the lanes.
template <class T, bool kMasked, int kVectors, int... kOutput>
CNN_EXT_INLINE void add_channel(Vec<T> (&sum)[sizeof...(kOutput)][kVectors], const T* source, const T* weights, int last,
                                Lanes<kOutput...>) {
  constexpr int kV = kLanes<T>;
  Vec<T> x[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) x[v] = kMasked && v + 1 == kVectors ? load_first(source + v * kV, last) : load(source + v * kV);
  const auto add_output = [&](Vec<T>(&sums)[kVectors], Vec<T> weight) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) accumulate(sums[v], x[v], weight);
  };
  (add_output(sum[kOutput], broadcast_from(weights + kOutput)), ...);
}

// With 16 registers a channel has 12 FMAs, and what stands beside them counts: there a turn takes a whole run of channels, with 2
// instructions for each FMA, and the destination is fetched in the first run alone.
constexpr bool kTurnsAreRuns = kVectorRegisters < 32;

template <class T, int kWidth, int kVectors, bool kMasked>
__attribute__((noinline)) void point_lanes(const PointwiseTile<T>& tile) {
  constexpr int kV = kLanes<T>;
  Vec<T> sum[kWidth][kVectors] = {};
  const T* weights = tile.weights;
  const T* source = tile.source;
  const T* ahead = tile.ahead;
  const int last = tile.last;
  const T* out_ahead = tile.out_ahead;
  if constexpr (kTurnsAreRuns) {
    int64_t left = tile.channels;
    const auto next = [&]() __attribute__((always_inline)) {
      add_channel<T, kMasked>(sum, source, weights, last, typename CountedLanes<kWidth>::type{});
      source += tile.source_channel, weights += kWidth;
      __builtin_prefetch(ahead, 0, 2);
      ahead += tile.ahead_step;
    };
    for (const int64_t rest = left > kAheadRun ? left - kAheadRun : 0; left > rest; --left) {
      next();
      __builtin_prefetch(out_ahead, 0, 2);
      out_ahead += tile.out_step;
    }
    ahead += tile.ahead_jump;
    for (; left >= kAheadRun; left -= kAheadRun) {
      static_assert(kAheadRun == 8);
      next(), next(), next(), next(), next(), next(), next(), next();
      ahead += tile.ahead_jump;
    }
    for (; left > 0; --left) next();
  } else {
    int64_t out_step = tile.out_step, out_runs = (tile.out_steps + kAheadRun - 1) / kAheadRun;
    for (int64_t left = tile.channels; left > 0; left -= kAheadRun) {
      if (out_runs-- <= 0) out_step = 0;
      for_each_channel(left < kAheadRun ? left : kAheadRun, [&]() __attribute__((always_inline)) {
        Vec<T> x[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) x[v] = kMasked && v + 1 == kVectors ? load_first(source + v * kV, last) : load(source + v * kV);
#pragma GCC unroll 14
        for (int k = 0; k < kWidth; ++k) {
          const Vec<T> weight = broadcast_from(weights + k);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[k][v] = fma(x[v], weight, sum[k][v]);
        }
        __builtin_prefetch(ahead, 0, 2);
        ahead += tile.ahead_step;
        __builtin_prefetch(out_ahead, 0, 2);
        out_ahead += out_step;
        weights += kWidth;
        source += tile.source_channel;
      });
      ahead += tile.ahead_jump;
    }
  }
#pragma GCC unroll 14
  for (int k = 0; k < kWidth; ++k) {
    const Vec<T> bias = tile.bias != nullptr ? broadcast_from(tile.bias + k) : Vec<T>{};
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      finish(tile.out + k * tile.pitch + v * kV, tile.bias != nullptr, bias, sum[k][v], kMasked && v + 1 == kVectors ? last : kV);
    }
  }
}

template <class T>
struct PointLanes {
  static constexpr int kV = kLanes<T>;
  static constexpr bool kPointsInLanes = true;
  static constexpr int kMaxWidth = kTileSums / 2;
  static constexpr int kMaxPoints = 2 * kV;
  static constexpr int64_t kFetchSteps = kFetchPlaneSteps;

  // The outputs of a group are shared out evenly among the units.
  static int64_t units(int64_t outputs) { return (outputs + kMaxWidth - 1) / kMaxWidth; }
  static int64_t first(int64_t outputs, int64_t unit) { return unit * outputs / units(outputs); }
  static int64_t width(int64_t outputs, int64_t unit) { return first(outputs, unit + 1) - first(outputs, unit); }

  static int64_t tiles(int64_t points) { return (points + kMaxPoints - 1) / kMaxPoints; }
  static int64_t tile_points(int64_t) { return kMaxPoints; }
  static int64_t next_tile(int64_t points_left) { return points_left < kMaxPoints ? points_left : kMaxPoints; }

  static void run(const PointwiseTile<T>& tile, int64_t width, int64_t points) { run_width<kMaxWidth>(tile, width, points); }

 private:
  template <int kWidth>
  static void run_width(const PointwiseTile<T>& tile, int64_t width, int64_t points) {
    if (width == kWidth) {
      if (points <= kV) return point_lanes<T, kWidth, 1, true>(tile);
      if constexpr (!kMasksAreFree) {
        if (tile.last == kV) return point_lanes<T, kWidth, 2, false>(tile);
      }
      return point_lanes<T, kWidth, 2, true>(tile);
    }
    if constexpr (kWidth > 1) run_width<kWidth - 1>(tile, width, points);
  }
};

}  // namespace
