// Register tiles: sums of a few output channels at a few grid points, over some steps (tap row, channel, tap column) of a block of the
// reduction. 32 registers hold 28 accumulators, 16 hold 12.
//
// ChannelTile has output channels in the lanes: 2 vectors of them x up to 14 grid points (6 with 16 registers). A step loads 2 vectors of
// weights and broadcasts one input value for every 2 FMAs, so that the two load ports feed the two FMA ports with a third of their slots to
// spare. Rows of at most half a tile are taken two at a time.
//
// PixelTile has grid points in the lanes: up to 14 (6) output channels x 1 or 2 vectors of a row, of 1, 2 or 4 rows while the channels are
// few. For few output channels, which leave lanes of the other tile empty, and for short sums in nchw, where it stores without transposing.
#pragma once

#include "cpu/kernels/conv2d_direct_ahead.inl"
#include "cpu/simd/vec.h"

namespace {

constexpr int kAccumulators = kVectorRegisters == 32 ? 28 : 12;

template <class T>
struct TileTask {
  const T* weights;        // [steps][width]
  const T* staged;         // of the first grid point
  const int32_t* offsets;  // [steps]
  int64_t steps;
  int64_t row_step;  // from a grid point to the one below it in the staged block
  // What the sums are added to: the bias, [width] (a channel tile finds it at `before`, too, with pitches of 0), or, where that is null,
  // the sums of the steps before, in scratch. There, and where the new sums go (scratch, too, or the destination itself), every row has
  // vectors of channels for each grid point (channel tile) or vectors of grid points for each channel (pixel tile).
  const T* bias;
  const T* before;
  int64_t before_pitch, before_row_pitch;
  T* out;
  int64_t pitch;      // from one of these to the next
  int64_t row_pitch;  // from a row to the next
  int last;           // of a pixel tile: lanes to write of a row's last vector
  // What is fetched meanwhile: a part of what will be staged next, and of where sums will go.
  Fetch source_ahead, dest_ahead;
};

// The steps of a tile are gone through in two runs: while there is a destination to fetch, and after that.
template <class T, class Step>
inline __attribute__((always_inline)) void for_steps(const TileTask<T>& task, const Step& step) {
  const int32_t* offset = task.offsets;
  const int32_t* const end = offset + task.steps;
  const char* source = task.source_ahead.at;
  const char* dest = task.dest_ahead.at;
  int64_t source_step = task.source_ahead.step, dest_step = task.dest_ahead.step;
  const int32_t* stop = offset + (task.dest_ahead.count < task.steps ? task.dest_ahead.count : task.steps);
  while (true) {
    for (; offset != stop; ++offset) {
      step(*offset);
      __builtin_prefetch(source, 0, 2);
      __builtin_prefetch(dest, 0, 2);
      source += source_step, dest += dest_step;
    }
    if (stop == end) return;
    stop = end, dest_step = 0;
  }
}

// The positive part; NaN stays.
template <class T>
inline Vec<T> rectified(Vec<T> v) {
  return v < Vec<T>{} ? Vec<T>{} : v;
}

// What a tile has written becomes its positive part. Each of its rows has `count` runs of `length` elements.
template <class T>
void rectify_tile(const TileTask<T>& task, int64_t rows, int64_t count, int64_t length) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < count; ++i) {
      T* run = task.out + r * task.row_pitch + i * task.pitch;
      for (int64_t j = 0; j < length; j += kLanes<T>) {
        const int lanes = static_cast<int>(length - j < kLanes<T> ? length - j : kLanes<T>);
        store_first(run + j, rectified<T>(load_first(run + j, lanes)), lanes);
      }
    }
  }
}

template <class T, int kVectors, int kRows, int kCols>
void channel_tile(const TileTask<T>& task) {
  constexpr int kV = kLanes<T>, kPoints = kRows * kCols;
  Vec<T> sum[kPoints][kVectors] = {};
  const T* weights = task.weights;
  const T* const staged = task.staged;
  const int64_t row_step = task.row_step;
  for_steps(task, [&](int64_t offset) __attribute__((always_inline)) {
    const T* in = staged + offset;
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
  });
#pragma GCC unroll 14
  for (int i = 0; i < kPoints; ++i) {
    const T* from = task.before + i / kCols * task.before_row_pitch + i % kCols * task.before_pitch;
    T* to = task.out + i / kCols * task.row_pitch + i % kCols * task.pitch;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(to + v * kV, load(from + v * kV) + sum[i][v]);
  }
}

template <class T>
struct ChannelTile {
  static constexpr int kV = kLanes<T>;
  static constexpr int kMaxWidth = 2 * kV;
  static constexpr int kMaxPoints = kAccumulators / 2;
  static constexpr int kSums = kAccumulators * kV;
  static constexpr bool kChannelsInner = true;

  // The output channels of a group are cut into units of at most kMaxWidth, padded to whole vectors.
  static int64_t units(int64_t outputs) { return (outputs + kMaxWidth - 1) / kMaxWidth; }
  static int64_t first(int64_t, int64_t unit) { return unit * kMaxWidth; }
  static int64_t width(int64_t outputs, int64_t unit) { return outputs - unit * kMaxWidth > kV ? kMaxWidth : kV; }

  static int64_t rows(int64_t, int64_t cols, int64_t available) { return 2 * cols <= kMaxPoints && available > 1 ? 2 : 1; }
  static int64_t tiles(int64_t cols) { return (cols + kMaxPoints - 1) / kMaxPoints; }
  static int64_t tile_begin(int64_t cols, int64_t tile) { return tile * cols / tiles(cols); }
  // The sums of a row of grid points, [column][width].
  static int64_t row_sums(int64_t width, int64_t cols) { return cols * width; }

  static void rectify(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) { rectify_tile(task, rows, cols, width); }

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

template <class T, int kWidth, int kRows, int kVectors>
void pixel_tile(const TileTask<T>& task) {
  constexpr int kV = kLanes<T>, kPoints = kRows * kVectors;
  Vec<T> sum[kPoints][kWidth] = {};
  const T* weights = task.weights;
  const T* const staged = task.staged;
  const int64_t row_step = task.row_step;
  for_steps(task, [&](int64_t offset) __attribute__((always_inline)) {
    const T* in = staged + offset;
    if constexpr (kWidth < kPoints) {
      Vec<T> weight[kWidth];
#pragma GCC unroll 14
      for (int k = 0; k < kWidth; ++k) weight[k] = broadcast_from(weights + k);
#pragma GCC unroll 8
      for (int p = 0; p < kPoints; ++p) {
        const Vec<T> x = load(in + p / kVectors * row_step + p % kVectors * kV);
#pragma GCC unroll 14
        for (int k = 0; k < kWidth; ++k) sum[p][k] = fma(x, weight[k], sum[p][k]);
      }
    } else {
      Vec<T> x[kPoints];
#pragma GCC unroll 8
      for (int p = 0; p < kPoints; ++p) x[p] = load(in + p / kVectors * row_step + p % kVectors * kV);
#pragma GCC unroll 14
      for (int k = 0; k < kWidth; ++k) {
        const Vec<T> weight = broadcast_from(weights + k);
#pragma GCC unroll 8
        for (int p = 0; p < kPoints; ++p) sum[p][k] = fma(x[p], weight, sum[p][k]);
      }
    }
    weights += kWidth;
  });
  const T* const bias = task.bias;
  const int last = task.last;
#pragma GCC unroll 14
  for (int k = 0; k < kWidth; ++k) {
    const Vec<T> offset = bias != nullptr ? broadcast_from(bias + k) : Vec<T>{};
#pragma GCC unroll 8
    for (int p = 0; p < kPoints; ++p) {
      const int row = p / kVectors, column = p % kVectors * kV;
      const Vec<T> before = bias != nullptr ? offset : load(task.before + row * task.before_row_pitch + k * task.before_pitch + column);
      const Vec<T> total = before + sum[p][k];
      T* const to = task.out + row * task.row_pitch + k * task.pitch + column;
      if (column + kV < kVectors * kV || last == kV) {
        store(to, total);
      } else {
        store_first(to, total, last);
      }
    }
  }
}

template <class T>
struct PixelTile {
  static constexpr int kV = kLanes<T>;
  static constexpr int kMaxWidth = kAccumulators / 2;
  static constexpr int kMaxPoints = 2 * kV;  // of a row
  static constexpr int kSums = 2 * kAccumulators * kV;
  static constexpr bool kChannelsInner = false;

  // The output channels of a group are shared out evenly among the units.
  static int64_t units(int64_t outputs) { return (outputs + kMaxWidth - 1) / kMaxWidth; }
  static int64_t first(int64_t outputs, int64_t unit) { return unit * outputs / units(outputs); }
  static int64_t width(int64_t outputs, int64_t unit) { return first(outputs, unit + 1) - first(outputs, unit); }

  static int64_t rows(int64_t width, int64_t cols, int64_t available) {
    int64_t rows = 4;
    while (rows > 1 && (rows > available || rows * width * vectors(cols) > kAccumulators)) rows /= 2;
    return rows;
  }
  static int64_t tiles(int64_t cols) { return (cols + kMaxPoints - 1) / kMaxPoints; }
  static int64_t tile_begin(int64_t cols, int64_t tile) { return tile * kMaxPoints < cols ? tile * kMaxPoints : cols; }
  // The sums of a row of grid points, [tile][width][kMaxPoints].
  static int64_t row_sums(int64_t width, int64_t cols) { return tiles(cols) * kMaxPoints * width; }

  static void rectify(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) { rectify_tile(task, rows, width, cols); }

  static void run(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) { run_width<kMaxWidth>(task, width, rows, cols); }

 private:
  static int64_t vectors(int64_t cols) { return cols > kV ? 2 : 1; }

  template <int kWidth>
  static void run_width(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) {
    if (width == kWidth) return vectors(cols) == 2 ? run_rows<kWidth, 2, 4>(task, rows) : run_rows<kWidth, 1, 4>(task, rows);
    if constexpr (kWidth > 1) run_width<kWidth - 1>(task, width, rows, cols);
  }

  template <int kWidth, int kVectors, int kRows>
  static void run_rows(const TileTask<T>& task, int64_t rows) {
    if constexpr (kWidth * kVectors * kRows <= kAccumulators) {
      if (rows == kRows) return pixel_tile<T, kWidth, kRows, kVectors>(task);
    }
    if constexpr (kRows > 1) run_rows<kWidth, kVectors, kRows / 2>(task, rows);
  }
};

}  // namespace
