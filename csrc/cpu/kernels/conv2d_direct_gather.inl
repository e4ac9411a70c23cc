// One problem for both directions. A gather convolution adds up, for every point of a grid of destination positions, source positions times
// weights: nothing is scattered, so nobody writes where another one does.
//
//   forward          one problem: source = input, destination = output
//   backward_input   stride_h * stride_w problems, one for each phase (row mod stride_h, column mod stride_w) of grad_input: the taps that
//                    reach a phase are every stride-th one (fewer if the dilation shares a factor with the stride), and along them
//                    grad_output is read backwards. A phase that no tap reaches has none, and its sums are empty.
#pragma once

#include "core/padding.h"
#include "core/shapes.h"

namespace {

using cnn_ext::Conv2dDirection;
using cnn_ext::Conv2dShape;
using cnn_ext::Layout;
using cnn_ext::PaddingMode;

// One axis. Grid point i is the destination position dest_first + i * dest_step and reads, for every tap t, the source position
// source_first + i * source_step + t * tap_step, times kernel position kernel_first + t * kernel_step.
struct Axis {
  int64_t count;  // grid points
  int64_t dest_first, dest_step;
  int64_t source_size, source_first, source_step;
  int64_t taps, tap_step;
  int64_t kernel_first, kernel_step;
  PaddingMode padding_mode;  // what is read at positions outside the source
  // Source positions staged beyond those that the taps read, where several problems share them.
  int64_t staged_before, staged_behind;
  bool is_shared;  // whether several problems read what is staged: each of them at positions of its own

  int64_t reach() const { return taps == 0 ? 0 : (taps - 1) * (tap_step < 0 ? -tap_step : tap_step); }  // of the taps
  int64_t lowest() const { return source_first - (tap_step < 0 ? reach() : 0); }  // source position that grid point 0 reads
};

// What may not be cut apart along an axis: `count` pieces in a row are count * step + extra grid points. A piece is a grid point, or, where
// the sums are pooled at once, what one pooled point sees.
struct Pieces {
  int64_t count, step, extra;
  int64_t points(int64_t pieces) const { return pieces * step + extra; }
};

// Element strides of a 4-D tensor.
struct Strides {
  int64_t n, c, h, w;
};

struct Gather {
  int64_t batch, groups;
  int64_t channels, outputs;  // of one group: those that are summed over, those that are computed
  Axis h, w;
  Pieces rows, cols;  // of h and w
  Strides source, dest;
  int64_t weight_group, weight_output, weight_channel, weight_h, weight_w;  // element strides of the weight

  int64_t taps() const { return h.taps * w.taps; }
  int64_t terms() const { return channels * taps(); }  // of one sum
  bool is_empty() const { return batch * groups * outputs * h.count * w.count == 0; }
};

inline Strides dense_strides(Layout layout, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::nchw ? Strides{c * h * w, h * w, w, 1} : Strides{c * h * w, 1, w * c, c};
}

struct TapRange {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// The taps with which any of `count` grid points from `first` on reads inside the source; the others read padding alone.
inline TapRange taps_inside(const Axis& a, int64_t first, int64_t count) {
  if (a.padding_mode != PaddingMode::zeros) return {0, a.taps};
  const int64_t lowest = a.source_first + first * a.source_step, highest = lowest + (count - 1) * a.source_step;
  TapRange range{0, a.taps};
  const auto is_outside = [&](int64_t t) { return highest + t * a.tap_step < 0 || lowest + t * a.tap_step >= a.source_size; };
  while (range.begin < range.end && is_outside(range.begin)) ++range.begin;
  while (range.begin < range.end && is_outside(range.end - 1)) --range.end;
  return range;
}

// Whether a tap column may lie in the padding for a whole tile: it does so for the first or the last few grid points of a row.
inline bool leaves_out_columns(const Gather& g) {
  constexpr int64_t kFew = 8;
  const int64_t few = g.w.count < kFew ? g.w.count : kFew;
  return taps_inside(g.w, 0, few).count() < g.w.taps || taps_inside(g.w, g.w.count - few, few).count() < g.w.taps;
}

// The steps of a block of the reduction: how many it is from a tap row, a tap column, a channel to the next. Tap rows are outermost, so
// that grid rows at the edge leave out those that lie in the padding altogether. Neighbouring columns are neighbouring steps, for they
// share lines of the source, except where tiles at the edge leave out columns, too: there channels are innermost.
struct StepOrder {
  int64_t row, col, channel;
};

inline StepOrder step_order(const Gather& g, int64_t channels) {
  return leaves_out_columns(g) ? StepOrder{channels * g.w.taps, channels, 1} : StepOrder{channels * g.w.taps, 1, g.w.taps};
}

inline Axis forward_axis(int64_t in_size, int64_t out_size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return {out_size, 0, 1, in_size, -pad, stride, kernel, dilation, 0, 1, PaddingMode::zeros, 0, 0, false};
}

// Input position i is reached from output position o by kernel position r if o * stride = i + pad - r * dilation.
inline Axis backward_axis(int64_t in_size, int64_t out_size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t phase) {
  int64_t period = 1;  // kernel positions that reach one phase are this far apart
  while (period * dilation % stride != 0) ++period;
  int64_t first = 0;
  while (first < period && (phase + pad - first * dilation) % stride != 0) ++first;
  const bool reached = first < period && first < kernel;
  Axis axis{};
  axis.count = phase < in_size ? (in_size - phase + stride - 1) / stride : 0;
  axis.dest_first = phase, axis.dest_step = stride;
  axis.source_size = out_size, axis.source_first = (phase + pad - first * dilation) / stride, axis.source_step = 1;
  axis.taps = reached ? (kernel - 1 - first) / period + 1 : 0, axis.tap_step = -(period * dilation / stride);
  axis.kernel_first = first, axis.kernel_step = period;
  return axis;
}

inline void cut_anywhere(Gather& g) {
  g.rows = {g.h.count, 1, 0};
  g.cols = {g.w.count, 1, 0};
}

// A convolution of 1 x 1 that reads every position once: the plane may as well be one long row.
inline bool is_pointwise(const Axis& a) {
  return a.taps == 1 && a.count == a.source_size && a.source_first == 0 && a.source_step == 1 && a.dest_step == 1;
}

inline void flatten_if_pointwise(Gather& g) {
  if (!is_pointwise(g.h) || !is_pointwise(g.w)) return;
  const int64_t size = g.h.count * g.w.count;
  g.w.count = g.w.source_size = size;
  g.h.count = g.h.source_size = 1;
  cut_anywhere(g);
}

inline int64_t gather_count(Conv2dDirection direction, const Conv2dShape& s) {
  return direction == Conv2dDirection::forward ? 1 : s.stride_h * s.stride_w;
}

// Problem `index` of gather_count() problems, which together write every element of the destination once; its rows are the tensors' rows.
inline Gather make_gather_of_rows(Conv2dDirection direction, const Conv2dShape& s, int64_t index) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  const Strides in = dense_strides(s.layout, s.in_channels, s.in_h, s.in_w);
  const Strides out = dense_strides(s.layout, s.out_channels, s.out_h, s.out_w);
  const Strides weight = dense_strides(s.weight_layout, group_in, s.kernel_h, s.kernel_w);
  Gather g{};
  g.batch = s.batch, g.groups = s.groups;
  g.weight_group = group_out * weight.n, g.weight_h = weight.h, g.weight_w = weight.w;
  if (direction == Conv2dDirection::forward) {
    g.channels = group_in, g.outputs = group_out, g.source = in, g.dest = out;
    g.weight_output = weight.n, g.weight_channel = weight.c;
    g.h = forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h);
    g.w = forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w);
    g.h.padding_mode = g.w.padding_mode = s.padding_mode;
  } else {
    g.channels = group_out, g.outputs = group_in, g.source = out, g.dest = in;
    g.weight_output = weight.c, g.weight_channel = weight.n;
    g.h = backward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h, index / s.stride_w);
    g.w = backward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w, index % s.stride_w);
  }
  cut_anywhere(g);
  return g;
}

inline Gather make_gather(Conv2dDirection direction, const Conv2dShape& s, int64_t index) {
  Gather g = make_gather_of_rows(direction, s, index);
  flatten_if_pointwise(g);
  return g;
}

// Gather convolutions that are run together, because they read the same source: the phases of a backward_input, or a single one.
constexpr int kMaxParts = 16;
struct Bundle {
  Gather parts[kMaxParts];
  int count;
  Gather cover;  // what is staged for all of them: the part with the most taps, on the largest grid
};

// Gives an axis of all parts the same window of staged positions.
inline void share_window(Bundle& bundle, Axis Gather::* axis) {
  int64_t lowest = INT64_MAX, highest = INT64_MIN;
  for (int i = 0; i < bundle.count; ++i) {
    const Axis& a = bundle.parts[i].*axis;
    if (a.taps == 0) continue;
    lowest = a.lowest() < lowest ? a.lowest() : lowest;
    highest = a.lowest() + a.reach() > highest ? a.lowest() + a.reach() : highest;
  }
  if (lowest > highest) return;  // nothing is read
  for (int i = 0; i < bundle.count; ++i) {
    Axis& a = bundle.parts[i].*axis;
    a.is_shared = true;
    if (a.taps == 0) a.source_first = lowest;
    a.staged_before = a.lowest() - lowest;
    a.staged_behind = highest - (a.lowest() + a.reach());
  }
}

// Makes the cover of a bundle that has its parts.
inline void cover_parts(Bundle& bundle) {
  if (bundle.count > 1) share_window(bundle, &Gather::h), share_window(bundle, &Gather::w);
  bundle.cover = bundle.parts[0];
  for (int i = 1; i < bundle.count; ++i) {
    if (bundle.parts[i].taps() > bundle.cover.taps()) bundle.cover = bundle.parts[i];
  }
  if (bundle.count == 1) return;
  bundle.cover.h.count = bundle.parts[0].h.count, bundle.cover.w.count = bundle.parts[0].w.count;
  cut_anywhere(bundle.cover);
}

}  // namespace
