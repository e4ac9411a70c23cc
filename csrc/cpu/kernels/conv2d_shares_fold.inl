// Adds the shares that outputs have in the inputs of their windows: a band of input rows lies in scratch by phases of the stride, as
// [row][channel][phase of the column][column], in coordinates of the padded input. There a tap is a shift along a row, and the shares of a
// row of outputs are added up a vector at a time, those of all tap columns together.
#pragma once

#include "core/shapes.h"
#include "cpu/simd/vec.h"

namespace {

using cnn_ext::Conv2dShape;
using cnn_ext::Layout;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Span {
  int64_t begin, end;
};
using Band = Span;  // of input rows

struct Fold {
  explicit Fold(const Conv2dShape& shape) : s(shape) {
    while (period * s.dilation_w % s.stride_w != 0) ++period;
    const bool nchw = s.weight_layout == Layout::nchw;
    share_channel = nchw ? s.kernel_h * s.kernel_w : 1;
    share_row = nchw ? s.kernel_w : s.kernel_w * s.in_channels;
    share_column = nchw ? 1 : s.in_channels;
    const int64_t reached = s.out_w + (s.kernel_w - 1) * s.dilation_w / s.stride_w;
    columns = larger(reached, (s.in_w - 1 + s.pad_left) / s.stride_w + 1);
  }

  int64_t window_rows() const { return (s.kernel_h - 1) * s.dilation_h + 1; }

  // Of a channel of a row, a phase; in whole vectors.
  template <class T>
  int64_t phase_elements() const {
    return ceil_div(columns, kLanes<T>) * kLanes<T>;
  }
  template <class T>
  int64_t row_elements() const {
    return s.in_channels * s.stride_w * phase_elements<T>();
  }

  // The rows of outputs that have a share in a band.
  Span outputs_of(const Band& band) const {
    const int64_t begin = band.begin + s.pad_top - (window_rows() - 1), end = band.end - 1 + s.pad_top;
    return {begin <= 0 ? 0 : ceil_div(begin, s.stride_h), smaller(s.out_h, end / s.stride_h + 1)};
  }

  template <class T>
  void begin(const Band& band, const T* bias, T* sums) const {
    const int64_t channel_elements = s.stride_w * phase_elements<T>();
    for (int64_t y = band.begin; y < band.end; ++y) {
      for (int64_t c = 0; c < s.in_channels; ++c, sums += channel_elements) {
        const T first = bias != nullptr ? bias[c] : T(0);
        for (int64_t i = 0; i < channel_elements; ++i) sums[i] = first;
      }
    }
  }

  // The shares of output row y; those of a tap begin `pitch` after those of the one before.
  template <class T>
  void add(const Band& band, int64_t y, const T* shares, int64_t pitch, T* sums) const {
    for (int64_t r = 0; r < s.kernel_h; ++r) {
      const int64_t row = y * s.stride_h + r * s.dilation_h - s.pad_top;
      if (row < band.begin || row >= band.end) continue;
      for (int64_t c = 0; c < s.in_channels; ++c) {
        const T* taps = shares + (c * share_channel + r * share_row) * pitch;
        T* const channel = sums + ((row - band.begin) * s.in_channels + c) * s.stride_w * phase_elements<T>();
        for (int64_t phase = 0; phase < s.stride_w; ++phase) {
          add_phase(taps, share_column * pitch, phase, channel + phase * phase_elements<T>());
        }
      }
    }
  }

  // To the tensor of one image.
  template <class T>
  void write(const Band& band, const T* sums, T* image) const {
    const bool nchw = s.layout == Layout::nchw;
    const int64_t channel = nchw ? s.in_h * s.in_w : 1, column = nchw ? 1 : s.in_channels, row = s.in_w * column;
    for (int64_t y = band.begin; y < band.end; ++y) {
      for (int64_t c = 0; c < s.in_channels; ++c, sums += s.stride_w * phase_elements<T>()) {
        write_row(sums, image + y * row + c * channel, column);
      }
    }
  }

 private:
  // Those of the tap columns of one phase, `tap_step` apart from tap to tap.
  template <class T>
  void add_phase(const T* taps, int64_t tap_step, int64_t phase, T* sums) const {
    constexpr int kV = kLanes<T>;
    int64_t first = 0;
    while (first < s.kernel_w && first < period && first * s.dilation_w % s.stride_w != phase) ++first;
    const int64_t count = first < period ? ceil_div(s.kernel_w - first, period) : 0;                     // 0: no tap reaches the phase
    const int64_t least = first * s.dilation_w / s.stride_w, step = period * s.dilation_w / s.stride_w;  // shifts
    const int64_t most = least + (count - 1) * step, reached = s.out_w + most;
    const T* const first_tap = taps + first * tap_step;
    tap_step *= period;
    for (int64_t q = 0; q < reached && count > 0; q += kV) {
      Vec<T> sum = load(sums + q);
      int64_t x = q - least;
      const T* from = first_tap + x;
      if (q >= most && q + kV <= s.out_w + least) {
        for (int64_t i = 0; i < count; ++i, from += tap_step - step) sum += load(from);
      } else {
        for (int64_t i = 0; i < count; ++i, from += tap_step - step, x -= step) {
          sum += load_between(from, static_cast<int>(-x), static_cast<int>(s.out_w - x));
        }
      }
      store(sums + q, sum);
    }
  }

  template <class T>
  void write_row(const T* sums, T* row, int64_t column) const {
    constexpr int64_t kV = kLanes<T>;
    if (s.stride_w == 1 && column == 1) {
      for (int64_t x = 0; x < s.in_w; x += kV) {
        const int lanes = static_cast<int>(smaller(kV, s.in_w - x));
        store_first(row + x, load_first(sums + s.pad_left + x, lanes), lanes);
      }
      return;
    }
    for (int64_t phase = 0; phase < s.stride_w; ++phase) {
      const T* from = sums + phase * phase_elements<T>();
      int64_t q = ceil_div(larger(0, s.pad_left - phase), s.stride_w);
      T* to = row + (q * s.stride_w + phase - s.pad_left) * column;
      for (int64_t x = q * s.stride_w + phase - s.pad_left; x < s.in_w; x += s.stride_w, to += s.stride_w * column) *to = from[q++];
    }
  }

  Conv2dShape s;
  int64_t period = 1;                              // tap columns that meet one phase are this far apart
  int64_t share_channel, share_row, share_column;  // places of taps among the shares
  int64_t columns;
};

}  // namespace
