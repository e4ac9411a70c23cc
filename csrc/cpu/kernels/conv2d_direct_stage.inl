// Staging: the part of the source that a block of grid points reads is copied into scratch as [channel][row][column phase][column], with
// zeros where it reaches over the edge. There every tap of a channel is a fixed offset, and the next grid point of a row is the next
// element: padding, stride, dilation and layout end here.
#pragma once

#include "cpu/kernels/conv2d_direct_ahead.inl"
#include "cpu/kernels/conv2d_direct_gather.inl"
#include "cpu/kernels/conv2d_direct_tile.inl"
#include "cpu/simd/lanes.h"
#include "cpu/simd/pieces.h"

namespace {

constexpr int64_t kFetchedBytes = 512 << 10;  // of a block in channels_last that is fetched ahead

// The source positions that `count` grid points in a row of an axis read, from the lowest one on.
struct Window {
  int64_t span;        // source positions
  int64_t tap_origin;  // where tap 0 of the first grid point lies among them
};

inline Window window_of(const Axis& a, int64_t count) {
  const int64_t before = a.staged_before + (a.source_first - a.lowest());
  return {(count - 1) * a.source_step + a.staged_before + a.reach() + a.staged_behind + 1, before};
}

// Whether any of `count` grid points reads position `at` of their window.
inline bool is_read(const Axis& a, int64_t count, int64_t at) {
  if (a.source_step == 1 && (a.tap_step * a.tap_step == 1 || a.is_shared)) return true;
  const int64_t origin = window_of(a, count).tap_origin;
  for (int64_t t = 0; t < a.taps; ++t) {
    const int64_t scaled = at - origin - t * a.tap_step;
    if (scaled >= 0 && scaled % a.source_step == 0 && scaled / a.source_step < count) return true;
  }
  return false;
}

inline bool is_phase_read(const Axis& a, int64_t phase) {
  const int64_t origin = window_of(a, 1).tap_origin;
  for (int64_t t = 0; t < a.taps; ++t) {
    if ((origin + t * a.tap_step) % a.source_step == phase) return true;
  }
  return false;
}

// The scratch for blocks of at most rows x cols grid points. Vectors are stored whole, in ascending order: what they write too much is
// overwritten by the next row, and behind the last one there is room.
struct StagedLayout {
  int64_t rows, cols;  // source rows; columns of one phase
  int64_t row_pitch, channel_pitch, image_pitch;
};

template <class T>
inline StagedLayout staged_layout(const Gather& g, int64_t channels, int64_t rows, int64_t cols) {
  if (g.taps() == 0) return {};
  StagedLayout l{};
  l.rows = window_of(g.h, rows).span;
  l.cols = (window_of(g.w, cols).span + g.w.source_step - 1) / g.w.source_step;
  l.row_pitch = l.cols * g.w.source_step;
  l.channel_pitch = l.rows * l.row_pitch + kLanes<T>;
  l.image_pitch = channels * l.channel_pitch;
  return l;
}

// From the place of a grid point in the staged block to what the steps of a block of channels read.
template <class T>
inline void fill_offsets(const Gather& g, const StagedLayout& l, int64_t channels, int32_t* offsets) {
  const int64_t origin_h = window_of(g.h, 1).tap_origin, origin_w = window_of(g.w, 1).tap_origin;
  const StepOrder order = step_order(g, channels);
  for (int64_t r = 0; r < g.h.taps; ++r) {
    for (int64_t s = 0; s < g.w.taps; ++s) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t row = origin_h + r * g.h.tap_step, col = origin_w + s * g.w.tap_step, step = g.w.source_step;
        const int64_t place = c * l.channel_pitch + row * l.row_pitch + col % step * l.cols + col / step;
        offsets[r * order.row + s * order.col + c * order.channel] = static_cast<int32_t>(place * kOffsetUnit<T>);
      }
    }
  }
}

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Columns [begin, end) of a phase lie inside the source: source column first + j * step for staged column j.
struct Inside {
  int64_t begin, end;
};

inline Inside inside(int64_t first, int64_t step, int64_t count, int64_t size) {
  const int64_t begin = clamp(first >= 0 ? 0 : (-first + step - 1) / step, 0, count);
  return {begin, clamp(first >= size ? 0 : (size - first + step - 1) / step, begin, count)};
}

// Lanes j of the result are src[(first + j) * step] for begin <= first + j < end, and zero elsewhere.
template <class T>
inline Vec<T> load_strided(const T* src, int64_t step, int64_t first, const Inside& cols) {
  constexpr int kV = kLanes<T>;
  const int begin = static_cast<int>(cols.begin - first), end = static_cast<int>(cols.end - first);
  const T* p = src + first * step;
  if (step == 1) return begin <= 0 && end >= kV ? load(p) : load_between(p, begin, end);
  if (step == 2) {
    const Vec<T> low = load_between(p, 2 * begin, 2 * end - 1), high = load_between(p + kV, 2 * begin - kV, 2 * end - 1 - kV);
    return every_second<T>(low, high, typename CountedLanes<kV>::type{});
  }
  const int64_t low = clamp(begin, 0, kV), high = clamp(end, low, kV);
  return load_strided(p, step, lanes_between(static_cast<int>(low), static_cast<int>(high)), Vec<T>{});
}

// Calls store_column(column of the phase, source column) for what lies outside the source and is not padded with zeros, which the vectors
// have left there.
template <class Store>
inline void stage_padding(const Axis& a, int64_t first, int64_t step, int64_t count, const Inside& cols, const Store& store_column) {
  if (a.padding_mode == PaddingMode::zeros) return;
  for (int64_t j = 0; j < count; ++j) {
    if (j >= cols.begin && j < cols.end) continue;
    const int64_t x = cnn_ext::source_position(a.padding_mode, first + j * step, a.source_size);
    if (x >= 0) store_column(j, x);
  }
}

// Which part of the source a block reads.
struct StageTask {
  int64_t n, channel, channels;
  int64_t rows;                  // grid rows
  int64_t first_row, first_col;  // source position of the window's corner; may be negative
};

// A source that lies in memory as it is read. (Others make their rows and pixels up: conv2d_direct_pooled.inl.)
template <class T>
struct TensorSource {
  static constexpr bool kMakesRows = false;  // else write_row() puts a whole one anywhere

  // Elements that row() needs to write to `line`.
  static int64_t line_elements(const Gather&) { return 0; }

  // Row y of a channel, from column 0 on; for sources whose rows are dense.
  const T* row(int64_t n, int64_t channel, int64_t y, T*) const { return data + n * strides.n + channel * strides.c + y * strides.h; }

  // Row y of the channels from `channel` on, pixel by pixel; for sources whose channels are dense.
  struct Pixels {
    Vec<T> at(int64_t x, int channels) const { return load_first(first + x * pixel, channels); }
    const T* first;
    int64_t pixel;
  };
  Pixels pixels(int64_t n, int64_t channel, int64_t y) const { return {data + n * strides.n + channel + y * strides.h, strides.w}; }

  // What a block reads of `images` images. Where channels are dense, all of them are fetched with the first: they share the lines.
  Ahead<T> ahead(const Gather& g, const StagedLayout& l, const StageTask& task, int64_t images) const {
    if (task.channels == 0 || g.taps() == 0) return {};
    const int64_t top = clamp(task.first_row, 0, g.h.source_size), left = clamp(task.first_col, 0, g.w.source_size);
    const int64_t rows = clamp(task.first_row + window_of(g.h, task.rows).span, top, g.h.source_size) - top;
    const int64_t cols = clamp(task.first_col + l.row_pitch, left, g.w.source_size) - left;
    const T* first = data + task.n * strides.n + task.channel * strides.c + top * strides.h + left * strides.w;
    if (strides.w == 1) {
      if (cols < strides.h) return {first, {images, strides.n}, {task.channels, strides.c}, {rows, strides.h}, cols};
      if (rows * cols < strides.c) return {first, {images, strides.n}, {task.channels, strides.c}, {1, 0}, rows * cols};
      return {first, {images, strides.n}, {1, 0}, {1, 0}, task.channels * strides.c};
    }
    const bool fits = images * rows * cols * strides.w * static_cast<int64_t>(sizeof(T)) <= kFetchedBytes;
    if (task.channel % g.channels != 0 || !fits) return {};
    return {first, {images, strides.n}, {rows, strides.h}, {1, 0}, cols * strides.w};
  }

  const T* data;
  Strides strides;
};

// Zeros to elements [begin, end), as whole vectors. (That they are zeros is hidden from the compiler, which would call memset for one.)
template <class T>
inline void write_zeros(T* p, int64_t begin, int64_t end) {
  Vec<T> zeros{};
  asm("" : "+" CNN_EXT_VECTOR_REGISTER(zeros));
  for (int64_t j = begin; j < end; j += kLanes<T>) store(p + j, zeros);
}

// The elements of kStep vectors in a row, dealt out: vector i gets every kStep-th one from i on.
template <class T>
inline void deal_out(Vec<T> (&v)[2]) {
  const Vec<T> even = even_lanes<T>(v[0], v[1]);
  v[1] = odd_lanes<T>(v[0], v[1]), v[0] = even;
}
template <class T>
inline void deal_out(Vec<T> (&v)[4]) {
  Vec<T> low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
  deal_out<T>(low), deal_out<T>(high);
  Vec<T> even[2] = {low[0], high[0]}, odd[2] = {low[1], high[1]};
  deal_out<T>(even), deal_out<T>(odd);
  v[0] = even[0], v[1] = odd[0], v[2] = even[1], v[3] = odd[1];
}

// `count` columns of each of kStep phases, side by side from dst on: row[first], row[first + 1], ... in turn, with zeros outside row[0,
// size).
template <int kStep, class T>
inline void stage_phases(const T* row, int64_t first, int64_t size, int64_t count, T* dst) {
  constexpr int kV = kLanes<T>;
  for (int64_t j = 0; j < count; j += kV) {
    const int64_t at = first + j * kStep;
    const int lanes = static_cast<int>(count - j < kV ? count - j : kV);
    Vec<T> v[kStep];
    if (at >= 0 && at + kStep * kV <= size) {
#pragma GCC unroll 4
      for (int i = 0; i < kStep; ++i) v[i] = load(row + at + i * kV);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < kStep; ++i) {
        const int64_t from = at + i * kV, low = clamp(-from, 0, kV), high = clamp(size - from, low, kV);
        v[i] = low < high ? load_between(row + from, static_cast<int>(low), static_cast<int>(high)) : Vec<T>{};
      }
    }
    deal_out<T>(v);
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) lanes == kV ? store(dst + i * count + j, v[i]) : store_first(dst + i * count + j, v[i], lanes);
  }
}

// Whether stage_phases() stages rows: it writes the zeros of the padding, and phases that nobody reads, too.
inline bool stages_phases(const Axis& a) {
  return (a.source_step == 2 || a.source_step == 4) && a.taps >= a.source_step && a.padding_mode == PaddingMode::zeros;
}

// Rows that are dense in memory: one channel after the other.
template <class T, class Source>
__attribute__((noinline)) void stage_planes(const Gather& g, const StagedLayout& l, const StageTask& task, const Source& source, T* line,
                                            T* staged) {
  const int64_t step = g.w.source_step;
  const int64_t rows = window_of(g.h, task.rows).span;
  for (int64_t r = 0; r < rows; ++r) {
    if (!is_read(g.h, task.rows, r)) continue;
    const int64_t y = cnn_ext::source_position(g.h.padding_mode, task.first_row + r, g.h.source_size);
    if (stages_phases(g.w)) {
      T* dst = staged + r * l.row_pitch;
      const int64_t size = y < 0 ? 0 : g.w.source_size;
      for (int64_t c = 0; c < task.channels; ++c, dst += l.channel_pitch) {
        const T* row = y < 0 ? nullptr : source.row(task.n, task.channel + c, y, line);
        step == 2 ? stage_phases<2>(row, task.first_col, size, l.cols, dst) : stage_phases<4>(row, task.first_col, size, l.cols, dst);
      }
      continue;
    }
    for (int64_t phase = 0; phase < step; ++phase) {
      if (step > 1 && !is_phase_read(g.w, phase)) continue;
      const int64_t first = task.first_col + phase;
      const Inside cols = y < 0 ? Inside{0, 0} : inside(first, step, l.cols, g.w.source_size);
      T* dst = staged + r * l.row_pitch + phase * l.cols;
      for (int64_t c = 0; c < task.channels; ++c, dst += l.channel_pitch) {
        if constexpr (Source::kMakesRows) {
          if (step == 1 && cols.end - cols.begin == g.w.source_size) {
            write_zeros(dst, 0, cols.begin);
            source.write_row(task.n, task.channel + c, y, dst + cols.begin);
            write_zeros(dst, cols.end, l.cols);
            continue;
          }
        }
        const T* row = cols.begin < cols.end ? source.row(task.n, task.channel + c, y, line) + first : nullptr;
        for (int64_t j = 0; j < l.cols; j += kLanes<T>) store(dst + j, row != nullptr ? load_strided(row, step, j, cols) : Vec<T>{});
        if (y < 0) continue;
        stage_padding(g.w, first, step, l.cols, cols,
                      [&](int64_t j, int64_t x) { dst[j] = source.row(task.n, task.channel + c, y, line)[x]; });
      }
    }
  }
}

// Writes `channels` of as many pixels as a vector has lanes, pixel(0), pixel(1), ..., as a vector for each channel.
template <class T, class Pixel>
inline __attribute__((always_inline)) void write_pixels(const Pixel& pixel, int channels, T* dst, int64_t channel_pitch) {
  constexpr int kV = kLanes<T>;
  const auto write = [&](auto& square) __attribute__((always_inline)) {
    transpose<T>(square);
    constexpr int kRows = sizeof(square) / sizeof(square[0]);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if (i < channels) store(dst + i * channel_pitch, square[i]);
    }
  };
  if (channels <= kV / 2) {  // two pixels share a vector
    Vec<T> halves[kV / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kV / 2; ++i) halves[i] = join_lower_halves<T>(pixel(i), pixel(i + kV / 2), typename CountedLanes<kV>::type{});
    write(halves);
  } else {
    Vec<T> square[kV];
#pragma GCC unroll 16
    for (int i = 0; i < kV; ++i) square[i] = pixel(i);
    write(square);
  }
}

// Columns [0, count) of a phase of 2 channels up to a piece of them: those of `cols` lie `distance` apart from pixel(0) on, and behind the
// first `followed` of them there are others, so that whole pieces can be read. The others are zeros.
template <class T>
inline void stage_few_channels(const T* pixel, int64_t distance, int64_t channels, int64_t count, const Inside& cols, int64_t followed,
                               T* dst, int64_t channel_pitch) {
  constexpr int kV = kLanes<T>, kPiece = kPieceLanes<T>;
  for (int64_t c = 0; c < channels; ++c) write_zeros(dst + c * channel_pitch, 0, cols.begin);
  int64_t j = cols.begin;
  for (; j + kV <= followed; j += kV) {
    const T* places[kV];
    Vec<T> v[kPiece];
#pragma GCC unroll 16
    for (int i = 0; i < kV; ++i) places[i] = pixel + (j + i) * distance;
#pragma GCC unroll 4
    for (int i = 0; i < kPiece; ++i) v[i] = load_pieces<T>(places + i, 0);
    transpose_pieces<T>(v);
#pragma GCC unroll 4
    for (int c = 0; c < kPiece; ++c) {
      if (c < channels) store(dst + c * channel_pitch + j, v[c]);
    }
  }
  for (; j < cols.end; ++j) {
    for (int64_t c = 0; c < channels; ++c) dst[c * channel_pitch + j] = pixel[j * distance + c];
  }
  for (int64_t c = 0; c < channels; ++c) write_zeros(dst + c * channel_pitch, cols.end, count);
}

// Channels innermost: squares of lanes x lanes are transposed on the way.
template <class T, class Source>
__attribute__((noinline)) void stage_channels_last(const Gather& g, const StagedLayout& l, const StageTask& task, const Source& source,
                                                   T* staged) {
  constexpr int kV = kLanes<T>;
  const int64_t step = g.w.source_step;
  const int64_t rows = window_of(g.h, task.rows).span;
  for (int64_t r = 0; r < rows; ++r) {
    if (!is_read(g.h, task.rows, r)) continue;
    const int64_t y = cnn_ext::source_position(g.h.padding_mode, task.first_row + r, g.h.source_size);
    for (int64_t phase = 0; phase < step; ++phase) {
      if (step > 1 && !is_phase_read(g.w, phase)) continue;
      const int64_t first = task.first_col + phase;
      const Inside cols = y < 0 ? Inside{0, 0} : inside(first, step, l.cols, g.w.source_size);
      T* dst = staged + r * l.row_pitch + phase * l.cols;
      for (int64_t c = 0; c < task.channels; c += kV) {
        const int lanes = static_cast<int>(clamp(task.channels - c, 0, kV));
        const auto pixels = source.pixels(task.n, task.channel + c, y);
        bool is_staged = false;
        if constexpr (!Source::kMakesRows) {
          if (task.channels > 1 && task.channels <= kPieceLanes<T>) {
            const int64_t followed = y < 0 ? 0 : inside(first, step, l.cols, g.w.source_size - 1).end;
            stage_few_channels(pixels.first + first * pixels.pixel, step * pixels.pixel, task.channels, l.cols, cols, followed, dst,
                               l.channel_pitch);
            is_staged = true;
          }
        }
        for (int64_t j = 0; j < l.cols && !is_staged; j += kV) {
          T* const place = dst + c * l.channel_pitch + j;
          if (lanes == kV && j >= cols.begin && j + kV <= cols.end) {
            write_pixels([&](int i) { return pixels.at(first + (j + i) * step, kV); }, kV, place, l.channel_pitch);
            continue;
          }
          const auto pixel = [&](int i) {
            const bool here = j + i >= cols.begin && j + i < cols.end;
            return here ? pixels.at(first + (j + i) * step, lanes) : Vec<T>{};
          };
          write_pixels(pixel, lanes, place, l.channel_pitch);
        }
        if (y < 0) continue;
        stage_padding(g.w, first, step, l.cols, cols, [&](int64_t j, int64_t x) {
          const Vec<T> pixel = pixels.at(x, lanes);
          for (int i = 0; i < lanes; ++i) dst[(c + i) * l.channel_pitch + j] = pixel[i];
        });
      }
    }
  }
}

template <class T, class Source>
inline void stage(const Gather& g, const StagedLayout& l, const StageTask& task, const Source& source, T* line, T* staged) {
  if (task.channels == 0 || g.taps() == 0) return;
  if (g.source.w == 1) {
    stage_planes(g, l, task, source, line, staged);
  } else {
    stage_channels_last(g, l, task, source, staged);
  }
}

}  // namespace
