// Register tiles, as the loops around them see them: sums of a few output channels at a few grid points, over some steps (tap row, channel,
// tap column) of a block of the reduction. What sums is compiled once for all rows: conv2d_direct_channel_tile.cpp, _pixel_tile.cpp.
#pragma once

#include "cpu/kernels/conv2d_direct_ahead.inl"
#include "cpu/simd/vec.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {

// With AVX2, whose 16 registers leave a step few multiply-adds for each load, tap columns share what they load.
constexpr bool kHasSpans = kVectorRegisters == 16 && kVectorBytes == 32;

template <bool kThere>
struct TileSpans {
  // Steps come in spans of `span_taps`, whose elements lie beside each other: each `span_step`, 1 or -1, from the one before.
  int span_taps, span_step;
};
template <>
struct TileSpans<false> {};

template <class T>
struct TileTask : TileSpans<kHasSpans> {
  const T* weights;        // [steps][width]
  const T* staged;         // of the first grid point
  const int32_t* offsets;  // [steps], kOffsetUnit each element
  // The steps are `runs` of neighbouring ones, `gap` of which lie between the end of one and the beginning of the next.
  int64_t runs, run_steps, gap;
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
  int last;           // lanes to write of the last vector: of a pixel tile's rows, of a channel tile's grid points
  // What is fetched meanwhile: a part of what will be staged next, of where sums will go, and, in each run, of the weights that follow.
  Fetch source_ahead, dest_ahead, weights_ahead;
};

// A tile of 1 or 2 vectors of output channels x rows * cols grid points; in float32 with spans also of 4 vectors x a row of cols points.
void run_channel_tile(const TileTask<float>& task, int vectors, int rows, int cols);
void run_channel_tile(const TileTask<double>& task, int vectors, int rows, int cols);

// A tile of `width` output channels x `rows` rows of 1 or 2 vectors of grid points.
void run_pixel_tile(const TileTask<float>& task, int width, int rows, int vectors);
void run_pixel_tile(const TileTask<double>& task, int width, int rows, int vectors);

}  // namespace cnn_ext::cpu::CNN_EXT_ISA

namespace {

using cnn_ext::cpu::CNN_EXT_ISA::kHasSpans;
using cnn_ext::cpu::CNN_EXT_ISA::TileTask;

// What an offset of 1 element counts: with 16 registers, where each instruction of a step weighs more, its bytes, which an address takes as
// they are.
template <class T>
constexpr int64_t kOffsetUnit = kVectorRegisters == 32 ? 1 : sizeof(T);

template <class T>
inline const T* at_offset(const T* staged, int64_t offset) {
  if constexpr (kOffsetUnit<T> == 1) {
    return staged + offset;
  } else {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(staged) + offset);
  }
}

// With 16 registers a step has fewer multiply-adds, and what stands beside them counts: four steps share it, and what is fetched.
constexpr int kStepsTogether = kVectorRegisters == 32 ? 1 : 4;

// Whether the steps of a tile are too few to fetch so many lines on the way, and are done before memory answers.
template <class T>
inline bool has_few_steps(const TileTask<T>& task, int64_t lines) {
  return kStepsTogether > 1 && 2 * kStepsTogether * lines > task.run_steps;
}

constexpr int kAccumulators = kVectorRegisters == 32 ? 28 : 12;
// Output channels of a pixel tile: in float64 as many as first layers have, for every width is compiled for itself.
template <class T>
constexpr int kPixelTileWidth = sizeof(T) == sizeof(float) ? kAccumulators / 2 : 4;

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

// ChannelTile has output channels in the lanes: 2 vectors of them x up to 14 grid points (6 with 16 registers). A step loads 2 vectors of
// weights and broadcasts one input value for every 2 FMAs, so that the two load ports feed the two FMA ports with a third of their slots to
// spare. Rows of at most half a tile are taken two at a time. One vector of channels leaves room for twice as many points: two rows,
// always.
template <class T>
struct ChannelTile {
  static constexpr int kV = kLanes<T>;
  static constexpr int kMaxWidth = 2 * kV;
  static constexpr int kMaxPoints = kAccumulators / 2;
  static constexpr int kSums = kAccumulators * kV;
  static constexpr bool kChannelsInner = true;
  // With 16 registers a tile of a plane would be written in runs of 6 points at most: the sums of all tiles of a unit are written at once.
  static constexpr bool kWritesUnits = kVectorRegisters < 32;

  // The output channels of a group are cut into units of at most kMaxWidth, padded to whole vectors.
  static int64_t units(int64_t outputs) { return (outputs + kMaxWidth - 1) / kMaxWidth; }
  static int64_t first(int64_t, int64_t unit) { return unit * kMaxWidth; }
  static int64_t width(int64_t outputs, int64_t unit) { return outputs - unit * kMaxWidth > kV ? kMaxWidth : kV; }

  static int64_t rows(int64_t width, int64_t cols, int64_t available) {
    return (width == kV || 2 * cols <= kMaxPoints) && available > 1 ? 2 : 1;
  }
  // The columns of a row that are taken row by row. With 16 registers the last 2 or 3 that whole tiles leave (3 where they leave 1) are
  // taken two rows at a time: a tile of fewer than 4 points waits for its own additions.
  static int64_t body(int64_t width, int64_t cols) {
    const int64_t left = cols % kMaxPoints;
    if (kVectorRegisters == 32 || width == kV || cols < kMaxPoints || left == 0 || 2 * left > kMaxPoints) return cols;
    return cols - (left == 1 ? kMaxPoints / 2 : left);
  }
  static int64_t tiles(int64_t cols) { return (cols + kMaxPoints - 1) / kMaxPoints; }
  static int64_t tile_begin(int64_t cols, int64_t tile) { return tile * cols / tiles(cols); }
  // The sums of a row of grid points, [column][width].
  static int64_t row_sums(int64_t width, int64_t cols) { return cols * width; }
  // The neighbouring tap columns of a span. Pairs are those of the phases of backward_input, which read backwards.
  static int span_taps(int64_t taps, int64_t tap_step) { return taps % 3 == 0 ? 3 : taps == 2 && tap_step < 0 ? 2 : 1; }

  static void rectify(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) { rectify_tile(task, rows, cols, width); }

  static void run(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) {
    cnn_ext::cpu::CNN_EXT_ISA::run_channel_tile(task, static_cast<int>(width / kV), static_cast<int>(rows), static_cast<int>(cols));
  }
};

// WideTile has output channels in the lanes, too, in float32 with spans alone: 4 vectors of them x up to 3 grid points. The elements of 3
// points move on through 3 registers, so that a span of any length loads each vector of weights and each element once.
struct WideTile {
  static constexpr int kV = kLanes<float>;
  static constexpr int kVectors = 4;
  static constexpr int kMaxWidth = kVectors * kV;
  static constexpr int kMaxPoints = 3;
  static constexpr int kSums = kMaxWidth * kMaxPoints;
  static constexpr bool kChannelsInner = true;
  static constexpr bool kWritesUnits = true;

  static int64_t units(int64_t outputs) { return (outputs + kMaxWidth - 1) / kMaxWidth; }
  static int64_t first(int64_t, int64_t unit) { return unit * kMaxWidth; }
  static int64_t width(int64_t, int64_t) { return kMaxWidth; }

  static int64_t rows(int64_t, int64_t, int64_t) { return 1; }
  static int64_t body(int64_t, int64_t cols) { return cols; }
  static int64_t tiles(int64_t cols) { return (cols + kMaxPoints - 1) / kMaxPoints; }
  static int64_t tile_begin(int64_t cols, int64_t tile) { return tile * cols / tiles(cols); }
  static int64_t row_sums(int64_t width, int64_t cols) { return cols * width; }
  static int span_taps(int64_t taps, int64_t) { return taps == 3 || taps == 5 || taps == 7 ? static_cast<int>(taps) : 1; }

  static void rectify(const TileTask<float>& task, int64_t width, int64_t rows, int64_t cols) { rectify_tile(task, rows, cols, width); }

  static void run(const TileTask<float>& task, int64_t, int64_t, int64_t cols) {
    cnn_ext::cpu::CNN_EXT_ISA::run_channel_tile(task, kVectors, 1, static_cast<int>(cols));
  }
};

// PixelTile has grid points in the lanes: up to 14 (6; 4 in float64) output channels x 1 or 2 vectors of a row, of 1, 2 or 4 rows while the
// channels are few. For few output channels, which leave lanes of the other tile empty, and for short sums in nchw, where it stores without
// transposing.
template <class T>
struct PixelTile {
  static constexpr int kV = kLanes<T>;
  static constexpr int kMaxWidth = kPixelTileWidth<T>;
  static constexpr int kMaxPoints = 2 * kV;  // of a row
  static constexpr int kSums = 2 * kAccumulators * kV;
  static constexpr bool kChannelsInner = false;
  static constexpr bool kWritesUnits = false;

  // The output channels of a group are shared out evenly among the units.
  static int64_t units(int64_t outputs) { return (outputs + kMaxWidth - 1) / kMaxWidth; }
  static int64_t first(int64_t outputs, int64_t unit) { return unit * outputs / units(outputs); }
  static int64_t width(int64_t outputs, int64_t unit) { return first(outputs, unit + 1) - first(outputs, unit); }

  static int64_t rows(int64_t width, int64_t cols, int64_t available) {
    int64_t rows = 4;
    while (rows > 1 && (rows > available || rows * width * vectors(cols) > kAccumulators)) rows /= 2;
    return rows;
  }
  static int64_t body(int64_t, int64_t cols) { return cols; }
  static int64_t tiles(int64_t cols) { return (cols + kMaxPoints - 1) / kMaxPoints; }
  static int64_t tile_begin(int64_t cols, int64_t tile) { return tile * kMaxPoints < cols ? tile * kMaxPoints : cols; }
  // The sums of a row of grid points, [tile][width][kMaxPoints].
  static int64_t row_sums(int64_t width, int64_t cols) { return tiles(cols) * kMaxPoints * width; }
  static int span_taps(int64_t, int64_t) { return 1; }

  static void rectify(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) { rectify_tile(task, rows, width, cols); }

  static void run(const TileTask<T>& task, int64_t width, int64_t rows, int64_t cols) {
    cnn_ext::cpu::CNN_EXT_ISA::run_pixel_tile(task, static_cast<int>(width), static_cast<int>(rows), static_cast<int>(vectors(cols)));
  }

 private:
  static int64_t vectors(int64_t cols) { return cols > kV ? 2 : 1; }
};

// Calls run(first, count) for the columns of a row that are cut into tiles together: its body and what is left of it.
template <class Tile, class Run>
void for_column_ranges(int64_t width, int64_t cols, const Run& run) {
  const int64_t body = Tile::body(width, cols);
  run(0, body);
  if (body < cols) run(body, cols - body);
}

}  // namespace
