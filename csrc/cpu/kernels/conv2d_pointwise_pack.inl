// The copies that a 1x1 convolution makes: weights as [channel][outputs of a unit], a block's
// source in a narrow row pitch, and sums from [point][output] to planes.
#pragma once

#include "cpu/simd/lanes.h"
#include "cpu/simd/transpose.h"

namespace {

// `width` lanes for each of `channels` channels; those behind the first `outputs` are zero. Either the outputs are neighbours in the weight
// (backward_input) or the channels are (forward).
template <class T>
void pack_weights(const T* weight, int64_t output_step, int64_t channel_step, int64_t outputs, int64_t channels, T* packed, int64_t width) {
  constexpr int kV = kLanes<T>;
  for (int64_t lane = 0; lane < width; lane += kV) {
    const int lanes = static_cast<int>(width - lane < kV ? width - lane : kV);
    const int64_t left = outputs - lane;
    const int valid = static_cast<int>(left < 0 ? 0 : left < lanes ? left : lanes);
    const T* src = weight + lane * output_step;
    T* dst = packed + lane;
    if (output_step == 1) {
      for (int64_t c = 0; c < channels; ++c) store_first(dst + c * width, load_first(src + c * channel_step, valid), lanes);
      continue;
    }
    for (int64_t c = 0; c < channels; c += kV) {
      const int items = static_cast<int>(channels - c < kV ? channels - c : kV);
      Vec<T> square[kV];
#pragma GCC unroll 16
      for (int o = 0; o < kV; ++o) square[o] = o < valid ? load_first(src + o * output_step + c, items) : Vec<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) {
        if (i < items) store_first(dst + (c + i) * width, square[i], lanes);
      }
    }
  }
}

// `rows` rows of `length` elements, filled up with zeros to whole vectors.
template <class T>
void copy_rows(const T* src, int64_t src_pitch, int64_t rows, int64_t length, T* dst, int64_t dst_pitch) {
  constexpr int kV = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, src += src_pitch, dst += dst_pitch) {
    int64_t i = 0;
    for (; i + kV <= length; i += kV) store(dst + i, load(src + i));
    if (i < length) store(dst + i, load_first(src + i, static_cast<int>(length - i)));
  }
}

// `points` elements, `step` apart, of each of `channels` planes to [tile][channel][`tile_points`, in the last tile those that are left], in
// the order in which they lie. What the last vector of a row writes too much, the next channel overwrites; the last channel writes nothing
// too much.
template <class T>
void copy_panels(const T* src, int64_t step, int64_t src_channel, int64_t channels, int64_t points, int64_t tile_points, T* dst) {
  constexpr int kV = kLanes<T>;
  for (int64_t c = 0; c < channels; ++c, src += src_channel) {
    for (int64_t begin = 0, width; begin < points; begin += width) {
      width = points - begin < tile_points ? points - begin : tile_points;
      T* const row = dst + begin * channels + c * width;
      for (int64_t i = 0; i < width; i += kV) {
        const int count = static_cast<int>(width - i < kV ? width - i : kV);
        const Vec<T> v = step == 1 ? load_first(src + begin + i, count) : load_apart(src + (begin + i) * step, step, count);
        store_first(row + i, v, c + 1 < channels ? kV : count);
      }
    }
  }
}

// `points` elements of each of `channels` planes, at most a vector, `step` apart (kApart) or neighbours, to rows of `width` elements.
template <class T, bool kApart>
void copy_panel_rows(const T* src, int64_t step, int64_t src_channel, int64_t channels, int points, T* dst, int64_t width) {
  for (int64_t c = 0; c < channels; ++c, src += src_channel, dst += width) {
    const Vec<T> v = kApart ? load_apart(src, step, points) : load_first(src, points);
    if (c + 1 == channels) return store_first(dst, v, points);
    store(dst, v);
  }
}

// As copy_panels(), to the panels of even tiles, one after the other: the rows of a channel in all panels may lie so far apart that they
// compete for the same few places in the nearest cache.
template <class T, class Tile, bool kApart>
void copy_even_panels(const T* src, int64_t step, int64_t src_channel, int64_t channels, int64_t points, T* dst) {
  constexpr int64_t kV = kLanes<T>;
  for (int64_t begin = 0, width; begin < points; begin += width, dst += width * channels) {
    width = Tile::next_tile(points - begin);
    const T* panel = src + begin * step;
    if (width <= kV) {
      copy_panel_rows<T, kApart>(panel, step, src_channel, channels, static_cast<int>(width), dst, width);
    } else {
      // The second vector first: what it writes too much is the first one of the next channel.
      copy_panel_rows<T, kApart>(panel + kV * step, step, src_channel, channels, static_cast<int>(width - kV), dst + kV, width);
      copy_panel_rows<T, kApart>(panel, step, src_channel, channels, static_cast<int>(kV), dst, width);
    }
  }
}

// `points` points of a plane from `first` on, of rows of `row_points` elements that lie `step` apart, side by side. Vectors are stored
// whole, in ascending order: what they write too much is overwritten by the next row.
template <class T>
void copy_without_gaps(const T* plane, int64_t src_row, int64_t step, int64_t row_points, int64_t first, int64_t points, T* dst) {
  constexpr int64_t kV = kLanes<T>;
  plane += first / row_points * src_row;
  for (int64_t done = 0, x = first % row_points; done < points; x = 0, plane += src_row) {
    const int64_t end = done + (row_points - x < points - done ? row_points - x : points - done);
    const T* src = plane + x * step;
    for (; done + kV <= end; done += kV, src += kV * step) store(dst + done, load_apart(src, step, static_cast<int>(kV)));
    if (done == end) continue;
    const int count = static_cast<int>(end - done);
    store_first(dst + done, load_apart(src, step, count), points - done < kV ? count : static_cast<int>(kV));
    done = end;
  }
}

// Up to kV outputs of sums[point][pitch of outputs], from `first` on, in lanes: body(output, first point, points, vector of them).
template <class T, class Body>
inline __attribute__((always_inline)) void for_each_transposed(const T* sums, int64_t pitch, int64_t points, int outputs,
                                                               const Body& body) {
  constexpr int kV = kLanes<T>;
  for (int64_t i = 0; i < points; i += kV) {
    const int items = static_cast<int>(points - i < kV ? points - i : kV);
    Vec<T> square[kV];
#pragma GCC unroll 16
    for (int j = 0; j < kV; ++j) square[j] = j < items ? load(sums + (i + j) * pitch) : Vec<T>{};
    transpose<T>(square);
#pragma GCC unroll 16
    for (int j = 0; j < kV; ++j) {
      if (j < outputs) body(j, i, items, square[j]);
    }
  }
}

// sums[point][pitch of outputs] to dst[output * channel_step + point].
template <class T>
void write_planes(const T* sums, int64_t pitch, int64_t points, int64_t outputs, T* dst, int64_t channel_step) {
  constexpr int kV = kLanes<T>;
  for (int64_t k = 0; k < outputs; k += kV) {
    T* const first = dst + k * channel_step;
    for_each_transposed<T>(sums + k, pitch, points, static_cast<int>(outputs - k < kV ? outputs - k : kV),
                           [&](int j, int64_t i, int items, Vec<T> v) { store_first(first + j * channel_step + i, v, items); });
  }
}

// sums[point][pitch of outputs] to rows[output][row_pitch], for up to kV outputs.
template <class T>
void transpose_sums(const T* sums, int64_t pitch, int64_t points, int outputs, T* rows, int64_t row_pitch) {
  for_each_transposed<T>(sums, pitch, points, outputs, [&](int j, int64_t i, int, Vec<T> v) { store(rows + j * row_pitch + i, v); });
}

// `points` elements to places `step` apart, of `count` elements, the others of which become zeros. `ahead` elements further will be written
// next.
template <class T>
void write_spread(const T* src, int64_t points, int64_t step, T* dst, int64_t count, int64_t ahead) {
  constexpr int kV = kLanes<T>;
  const auto put = [&](int64_t at, Vec<T> v) {
    __builtin_prefetch(dst + at + ahead, 1, 2);

    if (at < count) store_first(dst + at, v, static_cast<int>(count - at < kV ? count - at : kV));
  };
  int64_t at = 0;
  for (int64_t i = 0; i < points && step <= 2; i += kV) {
    const Vec<T> v = load_first(src + i, static_cast<int>(points - i < kV ? points - i : kV));
    put(at, step == 1 ? v : interleave_lower<T>(v, Vec<T>{}));
    at += kV;
    if (step == 1) continue;
    put(at, interleave_upper<T>(v, Vec<T>{}));
    at += kV;
  }
  for (; at < count; at += kV) put(at, Vec<T>{});
  for (int64_t i = 0; i < points && step > 2; ++i) dst[i * step] = src[i];
}

}  // namespace
