// Register tiles: sums of a few output channels at a few grid points, over the steps (channel, tap) of one block of the reduction.
//
// ChannelTile keeps 2 vectors of output channels x up to 14 grid points (AVX-512: 28 accumulators, 2 weights and 1 broadcast input value of
// 32 registers) or x 6 (16 registers). A step loads 2 vectors of weights and broadcasts one value for every 2 FMAs, so that the two load
// ports serve the two FMA ports with a third of their slots to spare. Rows of at most half a tile are taken two at a time.
#pragma once

#include "cpu/simd/vec.h"

namespace {

template <class T>
struct TileTask {
  const T* weights;        // [steps][width], width = vectors * lanes
  const T* staged;         // of the first grid point
  const int32_t* offsets;  // [steps]
  int64_t steps;
  int64_t row_step;  // from a grid point to the one below it in the staged block
  const T* bias;     // [width] or null: what the sums are added to; null: `sums` itself
  T* sums;           // [grid points][width], of a channel tile
};

template <class T, int kVectors, int kRows, int kCols>
void channel_tile(const TileTask<T>& task) {
  constexpr int kV = kLanes<T>, kPoints = kRows * kCols;
  Vec<T> sum[kPoints][kVectors] = {};
  const T* weights = task.weights;
  const int64_t row_step = task.row_step;
  const int32_t* const end = task.offsets + task.steps;
  for (const int32_t* offset = task.offsets; offset != end; ++offset) {
    const T* in = task.staged + *offset;
    Vec<T> weight[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kV);
    weights += kVectors * kV;
#pragma GCC unroll 14
    for (int i = 0; i < kPoints; ++i) {
      const Vec<T> x = broadcast_from(in + (i / kCols) * row_step + i % kCols);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(x, weight[v], sum[i][v]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kPoints; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* place = task.sums + (i * kVectors + v) * kV;
      store(place, (task.bias != nullptr ? load(task.bias + v * kV) : load(place)) + sum[i][v]);
    }
  }
}

template <class T>
struct ChannelTile {
  static constexpr int kV = kLanes<T>;
  static constexpr int kMaxWidth = 2 * kV;
  static constexpr int kMaxPoints = kVectorRegisters == 32 ? 14 : 6;
  static constexpr int kMaxRows = 2;
  static constexpr bool kChannelsInner = true;  // sums are [grid point][channel]

  // The output channels of a group are cut into units of at most kMaxWidth, padded to whole vectors.
  static int64_t units(int64_t outputs) { return (outputs + kMaxWidth - 1) / kMaxWidth; }
  static int64_t first(int64_t, int64_t unit) { return unit * kMaxWidth; }
  static int64_t width(int64_t outputs, int64_t unit) { return outputs - unit * kMaxWidth > kV ? kMaxWidth : kV; }

  static int64_t rows(int64_t cols) { return 2 * cols <= kMaxPoints ? 2 : 1; }
  static int64_t tiles(int64_t cols) { return (cols + kMaxPoints - 1) / kMaxPoints; }
  static int64_t tile_begin(int64_t cols, int64_t tile) { return tile * cols / tiles(cols); }

  static void run(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) {
    if (width == kMaxWidth) {
      run_rows<2>(task, rows, cols);
    } else {
      run_rows<1>(task, rows, cols);
    }
  }

 private:
  template <int kVectors>
  static void run_rows(const TileTask<T>& task, int64_t rows, int64_t cols) {
    if (rows == 1) {
      run_cols<kVectors, 1, kMaxPoints>(task, cols);
    } else {
      run_cols<kVectors, 2, kMaxPoints / 2>(task, cols);
    }
  }

  template <int kVectors, int kRows, int kCols>
  static void run_cols(const TileTask<T>& task, int64_t cols) {
    if (cols == kCols) return channel_tile<T, kVectors, kRows, kCols>(task);
    if constexpr (kCols > 1) run_cols<kVectors, kRows, kCols - 1>(task, cols);
  }
};

}  // namespace
