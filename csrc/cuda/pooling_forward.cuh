// Pooling forward at memory bandwidth. A window is taken row by row, and each row's part is shared by the windows of a column that it
// belongs to: what is taken of a window depends on nothing but the window.
//
// Op offers
//   T, Part                                   the element type; what is known of a part of a window (below)
//   finish(g, first_h, first_w, step_w, parts)  when all taps of windows are taken, each step_w columns behind the last
//   write(index, parts, count, is_whole)      the results of `count` neighbouring outputs
// A Part offers
//   Part(value, tap), Part(tap)               of the tap `tap` alone; of none, where `tap` is the first one inside the input
//   take(value, tap), value, tap              another tap or part; what was taken
//   kRepeats, nothing()                       whether taking a tap again changes nothing; the value of a tap outside the input
#pragma once

#include "cuda/pooling.cuh"

namespace cnn_ext::cuda {

// The place in the window of its first tap inside the input, 0 if there is none.
__device__ inline int first_tap(const Range& rows, const Range& cols, int kernel_w) {
  return rows.begin < rows.end && cols.begin < cols.end ? rows.begin * kernel_w + cols.begin : 0;
}

// One row of taps of a window. Taps outside the input, of those that are counted while compiling, are read from its edge: where taking a
// tap again changes nothing they count as the tap there, or else as nothing.
struct RowOfTaps {
  int row;      // of the input: the offset of its first element
  int first_w;  // of tap 0
  Range cols;   // the taps inside the input
  int base;     // place in the window of tap 0
  bool exists;
};

// What is known of the row for kVector channels. kKernel 0: any width.
template <class Part, int kVector, int kKernel, class T>
__device__ void take_row(const T* input, const RowOfTaps& taps, int pitch, int in_w, Part (&parts)[kVector]) {
  if constexpr (kKernel != 0) {
    Vector<T, kVector> vectors[kKernel];
#pragma unroll
    for (int t = 0; t < kKernel; ++t) {
      vectors[t] = load_vector<kVector>(input + taps.row + clamp(taps.first_w + t, 0, in_w) * pitch);
    }
    const auto value = [&](int t, int i) {
      const bool counts = Part::kRepeats || (taps.exists && t >= taps.cols.begin && t < taps.cols.end);
      return counts ? widen(vectors[t].element[i]) : Accumulate<T>{0};
    };
    const auto place = [&](int t) { return taps.base + clamp(t, taps.cols.begin, taps.cols.end); };
#pragma unroll
    for (int i = 0; i < kVector; ++i) parts[i] = Part(value(0, i), place(0));
#pragma unroll
    for (int t = 1; t < kKernel; ++t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) parts[i].take(value(t, i), place(t));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) parts[i] = Part(taps.base + taps.cols.begin);
#pragma unroll 4
    for (int t = taps.cols.begin; t < taps.cols.end; ++t) {
      const Vector<T, kVector> vector = load_vector<kVector>(input + taps.row + (taps.first_w + t) * pitch);
#pragma unroll
      for (int i = 0; i < kVector; ++i) parts[i].take(widen(vector.element[i]), taps.base + t);
    }
  }
}

// A thread takes a window for kVector channels. kKernel: of a square window.
template <class Op, int kKernel, int kVector>
__global__ void __launch_bounds__(kBlockThreads)
    pool_chunks(Op op, Pool2dGeometry g, ThreadPlaces places, const typename Op::T* __restrict__ input) {
  using Part = typename Op::Part;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int first_h = place.row * g.stride_h - g.pad_top, first_w = place.column * g.stride_w - g.pad_left;
  const Range rows = taps_inside(first_h, 1, kKernel, g.in_h), cols = taps_inside(first_w, 1, kKernel, g.in_w);
  const int image = place.image * g.in_h * g.in_w * g.channels + place.vector * kVector;
  Part window[kVector];
#pragma unroll
  for (int r = 0; r < kKernel; ++r) {
    const int row = image + clamp(first_h + r, 0, g.in_h) * g.in_w * g.channels;
    const RowOfTaps taps{row, first_w, cols, clamp(r, rows.begin, rows.end) * kKernel, r >= rows.begin && r < rows.end};
    Part parts[kVector];
    take_row<Part, kVector, kKernel>(input, taps, g.channels, g.in_w, parts);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (r == 0) {
        window[i] = parts[i];
      } else {
        window[i].take(parts[i].value, parts[i].tap);
      }
    }
  }
  const bool is_empty = rows.begin >= rows.end || cols.begin >= cols.end;
#pragma unroll
  for (int i = 0; i < kVector; ++i) window[i] = is_empty ? Part(0) : window[i];
  op.finish(g, first_h, first_w, 0, window);
  const int output = ((place.image * g.out_h + place.row) * g.out_w + place.column) * g.channels + place.vector * kVector;
  op.write(output, window, kVector, true);
}

// The same of any window for two channels, a row at a time: for more, few maps have enough threads.
template <class Op>
__global__ void __launch_bounds__(kBlockThreads, /*blocks=*/1)  // with more, the assembler spills a register
    pool_window_pairs(Op op, Pool2dGeometry g, ThreadPlaces places, const typename Op::T* __restrict__ input) {
  using Part = typename Op::Part;
  constexpr int kVector = 2;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int first_h = place.row * g.stride_h - g.pad_top, first_w = place.column * g.stride_w - g.pad_left;
  const Range rows = taps_inside(first_h, 1, g.kernel_h, g.in_h), cols = taps_inside(first_w, 1, g.kernel_w, g.in_w);
  const int image = place.image * g.in_h * g.in_w * g.channels + place.vector * kVector;
  Part window[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) window[i] = Part(first_tap(rows, cols, g.kernel_w));
  const int end = cols.begin < cols.end ? rows.end : 0;
#pragma unroll 1
  for (int r = rows.begin; r < end; ++r) {
    Part parts[kVector];
    take_row<Part, kVector, 0>(input, RowOfTaps{image + (first_h + r) * g.in_w * g.channels, first_w, cols, 0, true}, g.channels, g.in_w,
                               parts);
#pragma unroll
    for (int i = 0; i < kVector; ++i) window[i].take(parts[i].value, r * g.kernel_w + parts[i].tap);
  }
  op.finish(g, first_h, first_w, 0, window);
  const int output = ((place.image * g.out_h + place.row) * g.out_w + place.column) * g.channels + place.vector * kVector;
  op.write(output, window, kVector, true);
}

// A thread takes kStrip windows of a channel, one below the other. kKernel: of a square window; 0: any.
constexpr int kStrip = 4;

template <class Op, Layout kLayout, int kKernel>
__global__ void __launch_bounds__(kBlockThreads)
    pool_columns(Op op, Pool2dGeometry g, ThreadPlaces places, const typename Op::T* __restrict__ input) {
  using Part = typename Op::Part;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int kernel_h = kKernel != 0 ? kKernel : g.kernel_h, kernel_w = kKernel != 0 ? kKernel : g.kernel_w;
  const int pitch = kLayout == Layout::nchw ? 1 : g.channels;
  const int first_h = place.row * kStrip * g.stride_h - g.pad_top, first_w = place.column * g.stride_w - g.pad_left;
  const Range cols = taps_inside(first_w, 1, kernel_w, g.in_w);
  Part windows[kStrip][1];
#pragma unroll
  for (int j = 0; j < kStrip; ++j) {
    windows[j][0] = Part(first_tap(taps_inside(first_h + j * g.stride_h, 1, kernel_h, g.in_h), cols, kernel_w));
  }
  const int image = place.image * g.in_h * g.in_w * pitch + place.vector, rows = (kStrip - 1) * g.stride_h + kernel_h;
  const int end = cols.begin < cols.end ? smaller(rows, g.in_h - first_h) : 0;
  for (int x = larger(-first_h, 0); x < end; ++x) {
    Part parts[1];
    take_row<Part, 1, kKernel>(input, RowOfTaps{image + (first_h + x) * g.in_w * pitch, first_w, cols, 0, true}, pitch, g.in_w, parts);
#pragma unroll
    for (int j = 0; j < kStrip; ++j) {
      const int r = x - j * g.stride_h;
      if (r >= 0 && r < kernel_h) windows[j][0].take(parts[0].value, r * kernel_w + parts[0].tap);
    }
  }
#pragma unroll
  for (int j = 0; j < kStrip; ++j) {
    const int out_h = place.row * kStrip + j;
    if (out_h >= g.out_h) continue;
    op.finish(g, first_h + j * g.stride_h, first_w, 0, windows[j]);
    op.write(((place.image * g.out_h + out_h) * g.out_w + place.column) * pitch + place.vector, windows[j], 1, true);
  }
}

// In nchw: a thread takes the windows that begin in kInputs columns of a row, kPad columns earlier, and where they overlap those below
// them, too. One column before them or behind them may belong to them. They are read kUnit elements at a time, of which rows hold a whole
// number.
template <int kKernel, int kStride>
constexpr int kStripRows = kKernel > kStride ? 2 : 1;

template <class Op, int kKernel, int kStride, int kPad, int kInputs, int kUnit>
__global__ void __launch_bounds__(kBlockThreads)
    pool_row_strips(Op op, Pool2dGeometry g, ThreadPlaces places, bool is_whole, const typename Op::T* __restrict__ input) {
  using T = typename Op::T;
  using Part = typename Op::Part;
  constexpr int kOutputs = kInputs / kStride, kSpan = (kOutputs - 1) * kStride + kKernel, kRows = kStripRows<kKernel, kStride>;
  constexpr int kBehind = larger(kSpan - kInputs - kPad, 0);
  static_assert(kPad <= 1 && kBehind <= 1);
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int first_h = place.row * kRows * kStride - g.pad_top, first_w = place.column * kInputs - kPad;
  Part windows[kRows][kOutputs];
  int first_column[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const Range cols = taps_inside(first_w + o * kStride, 1, kKernel, g.in_w);
    first_column[o] = cols.begin;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      windows[j][o] = Part(first_tap(taps_inside(first_h + j * kStride, 1, kKernel, g.in_h), cols, kKernel));
    }
  }
#pragma unroll
  for (int x = 0; x < (kRows - 1) * kStride + kKernel; ++x) {
    const int h = first_h + x;
    const bool has_row = h >= 0 && h < g.in_h;
    const T* row = input + (place.image * g.in_h + clamp(h, 0, g.in_h)) * g.in_w + first_w;
    Accumulate<T> values[kPad + kInputs + kBehind];
    if constexpr (kPad != 0) values[0] = has_row && first_w >= 0 ? widen(row[0]) : Part::nothing();
#pragma unroll
    for (int i = kPad; i < kPad + kInputs; i += kUnit) {
      const bool exists = has_row && first_w + i < g.in_w;
      Vector<T, kUnit> unit = {};
      if (exists) unit = load_vector<kUnit>(row + i);
#pragma unroll
      for (int u = 0; u < kUnit; ++u) values[i + u] = exists ? widen(unit.element[u]) : Part::nothing();
    }
    if constexpr (kBehind != 0) {
      constexpr int kEnd = kPad + kInputs;
      values[kEnd] = has_row && first_w + kEnd < g.in_w ? widen(row[kEnd]) : Part::nothing();
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      Part part(values[o * kStride], first_column[o]);
#pragma unroll
      for (int t = 1; t < kKernel; ++t) part.take(values[o * kStride + t], t);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int r = x - j * kStride;
        if (r >= 0 && r < kKernel) windows[j][o].take(part.value, r * kKernel + part.tap);
      }
    }
  }
  const int out_w = place.column * kOutputs;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int out_h = place.row * kRows + j;
    if (out_h >= g.out_h) continue;
    op.finish(g, first_h + j * kStride, first_w, kStride, windows[j]);
    op.write((place.image * g.out_h + out_h) * g.out_w + out_w, windows[j], g.out_w - out_w, is_whole);
  }
}

template <class Op, int kVector>
void launch_pool_chunks(const Op& op, const Pool2dShape& s, const typename Op::T* input, cudaStream_t stream) {
  const ThreadPlaces places(s.batch, s.out_h, s.out_w, s.channels / kVector);
  launch_elementwise(has_square_windows(s, 2) ? pool_chunks<Op, 2, kVector> : pool_chunks<Op, 3, kVector>, places.count(), stream, op,
                     Pool2dGeometry(s), places, input);
}

template <class Op>
void launch_pool_window_pairs(const Op& op, const Pool2dShape& s, const typename Op::T* input, cudaStream_t stream) {
  const ThreadPlaces places(s.batch, s.out_h, s.out_w, s.channels / 2);
  launch_elementwise(pool_window_pairs<Op>, places.count(), stream, op, Pool2dGeometry(s), places, input);
}

template <class Op, Layout kLayout, int kKernel>
void launch_pool_columns(const Op& op, const Pool2dShape& s, const typename Op::T* input, cudaStream_t stream) {
  const ThreadPlaces places(pool_images(s), ceil_div<int64_t>(s.out_h, kStrip), s.out_w, pool_channels(s));
  launch_elementwise(pool_columns<Op, kLayout, kKernel>, places.count(), stream, op, Pool2dGeometry(s), places, input);
}

// Where rows hold no whole number of chunks a thread takes fewer columns, so that those of neighbours lie in the same sectors.
template <class Op, int kKernel, int kStride, int kPad, int kInputs = kChunk<typename Op::T>>
void launch_pool_row_strips(const Op& op, const Pool2dShape& s, const typename Op::T* input, cudaStream_t stream) {
  const bool are_inputs_whole = has_whole_vectors<kInputs>(input, s.in_w);
  if constexpr (kInputs > 2) {
    if (!are_inputs_whole) return launch_pool_row_strips<Op, kKernel, kStride, kPad, kInputs / 2>(op, s, input, stream);
  }
  constexpr int kOutputs = kInputs / kStride;
  const ThreadPlaces places(pool_images(s), ceil_div<int64_t>(s.out_h, kStripRows<kKernel, kStride>), ceil_div<int64_t>(s.out_w, kOutputs),
                            1);
  const auto kernel = are_inputs_whole ? pool_row_strips<Op, kKernel, kStride, kPad, kInputs, kInputs>
                                       : pool_row_strips<Op, kKernel, kStride, kPad, kInputs, 1>;
  launch_elementwise(kernel, places.count(), stream, op, Pool2dGeometry(s), places, op.template is_whole<kOutputs>(s.out_w), input);
}

template <class Op>
void run_pool_forward(const Op& op, const Pool2dShape& s, const typename Op::T* input, cudaStream_t stream) {
  using T = typename Op::T;
  if (s.layout == Layout::nhwc) {
    const bool has_chunks = has_whole_vectors<kChunk<T>>(input, s.channels) && op.template is_whole<kChunk<T>>(s.channels);
    const bool has_pairs = has_whole_vectors<2>(input, s.channels) && op.template is_whole<2>(s.channels);
    if (has_square_windows(s, 2) || has_square_windows(s, 3)) {
      return (has_chunks ? launch_pool_chunks<Op, kChunk<T>> : launch_pool_chunks<Op, 1>)(op, s, input, stream);
    }
    if (has_pairs) return launch_pool_window_pairs<Op>(op, s, input, stream);
    return launch_pool_columns<Op, Layout::nhwc, 0>(op, s, input, stream);
  }
  if (has_windows(s, 2, 2, 0)) return launch_pool_row_strips<Op, 2, 2, 0>(op, s, input, stream);
  if (has_windows(s, 3, 2, 0)) return launch_pool_row_strips<Op, 3, 2, 0>(op, s, input, stream);
  if (has_windows(s, 3, 2, 1)) return launch_pool_row_strips<Op, 3, 2, 1>(op, s, input, stream);
  if (has_square_windows(s, 3)) return launch_pool_columns<Op, Layout::nchw, 3>(op, s, input, stream);
  launch_pool_columns<Op, Layout::nchw, 0>(op, s, input, stream);
}

}  // namespace cnn_ext::cuda
