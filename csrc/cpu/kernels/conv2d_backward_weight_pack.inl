// Copies of activations in the form that the tiles of backward_weight read: pixel after pixel, each with the channels of one block side by
// side. An NCHW tensor is transposed in registers on the way, a channels_last one is copied.
#pragma once

#include "core/padding.h"
#include "cpu/kernel.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/pieces.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// channels_last is read as one stream, which the processor's own prefetching follows to the end of a page only.
constexpr int64_t kPrefetchBytes = 4096;

// The channels of one pixel, of which there are `written` <= lanes; `left` elements of the run, this pixel's among them, are yet to be
// written. AVX2 stores parts of vectors in pieces: a whole one takes less time, and what is too much the pixels behind it overwrite.
template <class T>
inline void store_pixel(T* to, Vec<T> v, int written, int64_t left) {
  if constexpr (kVectorBytes == 32) {
    if (left >= kLanes<T>) return store(to, v);
  }
  store_first(to, v, written);
}

// `pixels` neighbours of at least 2 channels that fit into a piece, side by side. Each is stored as a whole piece, and the next one
// overwrites what that is too much.
template <class T>
inline void pack_few_planes(const T* source, int64_t plane, int channels, int64_t pixels, T* destination) {
  constexpr int lanes = kLanes<T>, piece = kPieceLanes<T>;
  int64_t first = 0;
  for (; first + lanes < pixels; first += lanes) {
    Vec<T> rows[piece];
#pragma GCC unroll 4
    for (int i = 0; i < piece; ++i) rows[i] = i < channels ? load(source + i * plane + first) : Vec<T>{};
    transpose_pieces<T>(rows);
    store_pieces_in_turn<T>(rows, destination + first * channels, channels);
  }
  for (; first < pixels; ++first) {
    for (int i = 0; i < channels; ++i) destination[first * channels + i] = source[i * plane + first];
  }
}

// The first `channels` <= lanes channels of `pixels` pixels of a row of planes, `pixel_step` apart, as pack_planes().
template <class T>
inline void pack_planes_apart(const T* source, int64_t plane, int64_t pixel_step, int channels, int64_t pixels, T* destination,
                              int64_t step, int written) {
  constexpr int lanes = kLanes<T>;
  const int64_t run = written == step ? pixels * step : 0;
  for (int64_t first = 0; first < pixels; first += lanes) {
    const int count = pixels - first < lanes ? static_cast<int>(pixels - first) : lanes;
    Vec<T> rows[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      rows[i] = i < channels ? load_apart(source + i * plane + first * pixel_step, pixel_step, count) : Vec<T>{};
    transpose<T>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i < count) store_pixel(destination + (first + i) * step, rows[i], written, run - (first + i) * step);
    }
  }
}

// The first `channels` <= lanes channels of `pixels` neighbours, from planes `plane` elements apart, to destination[pixel * step +
// channel]. Of each pixel `written` <= lanes elements are written, those above `channels` as zeros.
template <class T>
inline void pack_planes(const T* source, int64_t plane, int channels, int64_t pixels, T* destination, int64_t step, int written) {
  constexpr int lanes = kLanes<T>;
  if (step == 1) {
    for (int64_t i = 0; i < pixels; ++i) destination[i] = source[i];
    return;
  }
  if (written == channels && step == channels && channels <= kPieceLanes<T>)
    return pack_few_planes(source, plane, channels, pixels, destination);
  const int64_t run = written == step ? pixels * step : 0;
  for (int64_t first = 0; first < pixels; first += lanes) {
    const int count = pixels - first < lanes ? static_cast<int>(pixels - first) : lanes;
    Vec<T> rows[lanes];
    if (count == lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) rows[i] = i < channels ? load(source + i * plane + first) : Vec<T>{};
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) rows[i] = i < channels ? load_first(source + i * plane + first, count) : Vec<T>{};
    }
    transpose<T>(rows);
    T* to = destination + first * step;
    if (count == lanes && written == lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(to + i * step, rows[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i < count) store_pixel(to + i * step, rows[i], written, run - (first + i) * step);
      }
    }
  }
}

// The same from pixels that lie `pixel` elements apart with their channels side by side.
template <class T>
inline void pack_pixels(const T* source, int64_t pixel, int channels, int64_t pixels, T* destination, int64_t step, int written) {
  const int64_t ahead = (kPrefetchBytes / static_cast<int64_t>(sizeof(T)) / pixel + 1) * pixel;
  if (channels == kLanes<T>) {
    for (int64_t i = 0; i < pixels; ++i) {
      __builtin_prefetch(source + i * pixel + ahead);
      store(destination + i * step, load(source + i * pixel));
    }
  } else {
    const int64_t run = written == step ? pixels * step : 0;
    for (int64_t i = 0; i < pixels; ++i) {
      __builtin_prefetch(source + i * pixel + ahead);
      store_pixel(destination + i * step, load_first(source + i * pixel, channels), written, run - i * step);
    }
  }
}

// `count` neighbours.
template <class T>
inline void pack_neighbours(const T* source, int64_t count, T* destination) {
  constexpr int lanes = kLanes<T>;
  constexpr int64_t ahead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    __builtin_prefetch(source + i + ahead);
    store(destination + i, load(source + i));
  }
  if (i < count) store_first(destination + i, load_first(source + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

// Channels [channel, channel + channels) of a run of pixels, `pixel_step` apart, of one image of `planes` channels of `plane` pixels, the
// first at `pixel`. With kZeroFill the last vector of each pixel is filled up with zeros, else nothing is written past the last channel.
template <bool kZeroFill, class T>
inline void pack_run(Layout layout, const T* image, int64_t planes, int64_t plane, int64_t channel, int64_t channels, int64_t pixel,
                     int64_t pixels, T* destination, int64_t step, int64_t pixel_step = 1) {
  if (layout == Layout::nhwc && channels == planes && channels == step && pixel_step == 1)
    return pack_neighbours(image + pixel * planes, pixels * planes, destination);
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    const int count = channels - c < kLanes<T> ? static_cast<int>(channels - c) : kLanes<T>;
    const int written = kZeroFill ? kLanes<T> : count;
    if (layout == Layout::nchw && pixel_step > 1) {
      pack_planes_apart(image + (channel + c) * plane + pixel, plane, pixel_step, count, pixels, destination + c, step, written);
    } else if (layout == Layout::nchw) {
      pack_planes(image + (channel + c) * plane + pixel, plane, count, pixels, destination + c, step, written);
    } else {
      pack_pixels(image + pixel * planes + channel + c, pixel_step * planes, count, pixels, destination + c, step, written);
    }
  }
}

template <class T>
inline void fill_zeros(T* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = T{0};
}

// `rows` rows from `row` on and `columns` columns from `column` on of a plane, also outside it; with steps from one to the next only
// inside.
struct Window {
  int64_t row, rows, column, columns;
  int64_t row_step = 1, column_step = 1;
};

// Columns [begin, end) of a window's row that lie outside the image: what the padding mode puts there.
template <class T>
inline void pack_padding(const Conv2dShape& s, const T* image, int64_t channel, int64_t channels, int64_t row, int64_t first_column,
                         int64_t begin, int64_t end, T* destination) {
  if (s.padding_mode == PaddingMode::zeros) return fill_zeros(destination + begin * channels, (end - begin) * channels);
  for (int64_t j = begin; j < end; ++j) {
    const int64_t column = source_position(s.padding_mode, first_column + j, s.in_w);
    T* to = destination + j * channels;
    if (column < 0) {
      fill_zeros(to, channels);
    } else {
      pack_run<false>(s.layout, image, s.in_channels, s.in_h * s.in_w, channel, channels, row * s.in_w + column, 1, to, channels);
    }
  }
}

// One image's window of channels [channel, channel + channels), padding outside the image, to destination[row][column][channel].
template <class T>
inline void pack_window(const Conv2dShape& s, const T* image, int64_t channel, int64_t channels, const Window& window, T* destination) {
  const int64_t plane = s.in_h * s.in_w, row_elements = window.columns * channels;
  if (window.row_step > 1 || window.column_step > 1) {
    for (int64_t i = 0; i < window.rows; ++i) {
      pack_run<false>(s.layout, image, s.in_channels, plane, channel, channels, (window.row + i * window.row_step) * s.in_w + window.column,
                      window.columns, destination + i * row_elements, channels, window.column_step);
    }
    return;
  }
  const bool rows_inside = window.row >= 0 && window.row + window.rows <= s.in_h;
  if (rows_inside && window.column == 0 && window.columns == s.in_w) {  // one run
    pack_run<false>(s.layout, image, s.in_channels, plane, channel, channels, window.row * s.in_w, window.rows * s.in_w, destination,
                    channels);
    return;
  }
  const int64_t left = window.column < 0 ? -window.column : 0;
  const int64_t end = window.column + window.columns < s.in_w ? window.columns : s.in_w - window.column;
  for (int64_t i = 0; i < window.rows; ++i) {
    T* to = destination + i * row_elements;
    const int64_t row = source_position(s.padding_mode, window.row + i, s.in_h);
    if (row < 0) {
      fill_zeros(to, row_elements);
      continue;
    }
    if (end <= left) {
      pack_padding(s, image, channel, channels, row, window.column, 0, window.columns, to);
      continue;
    }
    pack_padding(s, image, channel, channels, row, window.column, 0, left, to);
    pack_run<false>(s.layout, image, s.in_channels, plane, channel, channels, row * s.in_w + window.column + left, end - left,
                    to + left * channels, channels);
    pack_padding(s, image, channel, channels, row, window.column, end, window.columns, to);
  }
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
