// The copies that a 1x1 convolution makes: weights as [channel][outputs of a unit], a block's
// source in a narrow row pitch, and sums from [point][output] to planes.
#pragma once

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

// `points` neighbouring elements of each of `channels` planes to [tile][channel][`tile_points`, in the last tile those that are left], in
// the order in which they lie. What the last vector of a row writes too much, the next channel overwrites; the last channel writes nothing
// too much.
template <class T>
void copy_panels(const T* src, int64_t src_channel, int64_t channels, int64_t points, int64_t tile_points, T* dst) {
  constexpr int kV = kLanes<T>;
  for (int64_t c = 0; c < channels; ++c, src += src_channel) {
    for (int64_t begin = 0, width; begin < points; begin += width) {
      width = points - begin < tile_points ? points - begin : tile_points;
      T* const row = dst + begin * channels + c * width;
      for (int64_t i = 0; i < width; i += kV) {
        const int count = static_cast<int>(width - i < kV ? width - i : kV);
        store_first(row + i, load_first(src + begin + i, count), c + 1 < channels ? kV : count);
      }
    }
  }
}

// sums[point][pitch of outputs] to dst[output * channel_step + point * point_step].
template <class T>
void write_planes(const T* sums, int64_t pitch, int64_t points, int64_t outputs, T* dst, int64_t point_step, int64_t channel_step) {
  constexpr int kV = kLanes<T>;
  for (int64_t k = 0; k < outputs; k += kV) {
    const int channels = static_cast<int>(outputs - k < kV ? outputs - k : kV);
    for (int64_t i = 0; i < points; i += kV) {
      const int items = static_cast<int>(points - i < kV ? points - i : kV);
      Vec<T> square[kV];
#pragma GCC unroll 16
      for (int j = 0; j < kV; ++j) square[j] = j < items ? load(sums + (i + j) * pitch + k) : Vec<T>{};
      transpose<T>(square);
      T* place = dst + k * channel_step + i * point_step;
#pragma GCC unroll 16
      for (int j = 0; j < kV; ++j) {
        if (j >= channels) continue;
        if (point_step == 1) {
          store_first(place + j * channel_step, square[j], items);
        } else {
          for (int l = 0; l < items; ++l) place[j * channel_step + l * point_step] = square[j][l];
        }
      }
    }
  }
}

}  // namespace
