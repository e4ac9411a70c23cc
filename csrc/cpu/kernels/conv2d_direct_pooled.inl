// The gradient of a convolution's output, made up row by row from that of relu (and max_pool2d) of it: what a fused backward pass reads
// instead of a tensor. See Conv2dReluPoolShape for what is kept of forward.
#pragma once

#include "core/shapes.h"
#include "cpu/kernels/conv2d_direct_stage.inl"
#include "cpu/simd/lanes.h"

namespace {

using cnn_ext::Conv2dReluPoolBuffers;
using cnn_ext::Conv2dReluPoolShape;

// Depthwise convolutions and narrow groups have rows of their own, so much faster that passing over a tensor once more is the smaller
// evil. The bound is the same for every instruction set: else rows for a lesser one would take what those for a better one leave.
constexpr int64_t kWideGroup = 16;  // input channels

inline bool has_wide_groups(const cnn_ext::Conv2dShape& s) { return s.groups == 1 || s.in_channels / s.groups >= kWideGroup; }

inline bool has_2x2_windows(const Conv2dReluPoolShape& s) {
  return s.pool_h == 2 && s.pool_w == 2 && s.pool_stride_h == 2 && s.pool_stride_w == 2;
}

// Dense rows (those of nchw, and of a single channel) under other windows would have to be made up element by element: the pooling's own
// backward is faster then.
inline bool can_make_up(const Conv2dReluPoolShape& s) {
  const bool has_dense_rows = s.conv.layout == cnn_ext::Layout::nchw || s.conv.out_channels == 1;
  return !has_pooling(s) || has_2x2_windows(s) || !has_dense_rows;
}

// Whether a direction has a fused row of direct arithmetic, in float32. One tap, too, has rows of its own that are so much faster.
template <cnn_ext::Conv2dDirection kDirection>
bool fuses_directly(const Conv2dReluPoolShape& s) {
  const cnn_ext::Conv2dShape& c = s.conv;
  const bool has_source = kDirection == cnn_ext::Conv2dDirection::forward || can_make_up(s);
  const bool has_taps = kDirection == cnn_ext::Conv2dDirection::backward_weight || c.kernel_h * c.kernel_w > 1;
  return c.dtype == cnn_ext::DType::float32 && has_taps && has_wide_groups(c) && has_source && s.pool_h * s.pool_w <= cnn_ext::kNoGradient;
}

inline Strides pooled_strides(const Conv2dReluPoolShape& s) {
  return dense_strides(s.conv.layout, s.conv.out_channels, s.pooled_h, s.pooled_w);
}

// Made up of the gradient of the pooled values and the offsets, or, without pooling, of the gradient and the values. Which of the two is
// asked for each row and pixel, not by the type: every loop that reads a gradient exists once.
template <class T>
struct FusedGradient {
  FusedGradient(const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& b)
      : s(shape),
        strides(pooled_strides(shape)),
        grad(static_cast<const T*>(b.grad_output)),
        output(static_cast<const T*>(b.output)),
        offsets(b.offsets) {}

  static constexpr bool kMakesRows = true;

  static int64_t line_elements(const Gather& g) { return g.w.source_size + kLanes<T>; }

  Ahead<T> ahead(const Gather&, const StagedLayout&, const StageTask&, int64_t) const { return {}; }

  const T* row(int64_t n, int64_t channel, int64_t y, T* line) const {
    write_row(n, channel, y, line);
    return line;
  }

  // Row y of a channel as whole vectors, in ascending order.
  __attribute__((noinline)) void write_row(int64_t n, int64_t channel, int64_t y, T* line) const {
    const int64_t image_and_channel = n * strides.n + channel * strides.c;
    if (has_pooling(s)) {
      write_pooled_row(image_and_channel, y, line);
    } else {
      write_rectified_row(image_and_channel + y * strides.h, line);
    }
  }

  class Pixels {
   public:
    Pixels(const FusedGradient& gradient, int64_t first, int64_t y) : g_(gradient), first_(first), y_(y) {
      windows_of(y, g_.s.pool_h, g_.s.pool_stride_h, g_.s.pooled_h, begin_, end_);
    }
    Vec<T> at(int64_t x, int channels) const {
      if (has_pooling(g_.s)) return pooled(x, channels);
      const int64_t place = first_ + y_ * g_.strides.h + x * g_.strides.w;
      return passed(load_first(g_.grad + place, channels), load_first(g_.output + place, channels));
    }

   private:
    // Position (y, x) gets the gradients of the windows whose maximum it was.
    __attribute__((noinline)) Vec<T> pooled(int64_t x, int channels) const {
      const Conv2dReluPoolShape& s = g_.s;
      Vec<T> sum{};
      int64_t begin, end;
      windows_of(x, s.pool_w, s.pool_stride_w, s.pooled_w, begin, end);
      for (int64_t py = begin_; py < end_; ++py) {
        for (int64_t px = begin; px < end; ++px) {
          const auto tap = static_cast<Int<T>>((y_ - py * s.pool_stride_h) * s.pool_w + x - px * s.pool_stride_w);
          const int64_t place = first_ + py * g_.strides.h + px * g_.strides.w;
          const auto chosen = equal(load_offsets<T>(g_.offsets + place, first_lanes<T>(channels)), IntVec<T>{} + tap);
          sum += select(chosen, load_first(g_.grad + place, channels), Vec<T>{});
        }
      }
      return sum;
    }

    const FusedGradient& g_;
    const int64_t first_, y_;
    int64_t begin_, end_;  // the rows of windows that hold row y
  };
  Pixels pixels(int64_t n, int64_t channel, int64_t y) const { return {*this, n * strides.n + channel, y}; }

  const Conv2dReluPoolShape s;
  const Strides strides;  // of the pooled tensors
  const T* const grad;
  const T* const output;
  const uint8_t* const offsets;

 private:
  // The gradient passes where the output is positive or NaN.
  static Vec<T> passed(Vec<T> grad, Vec<T> output) { return output <= Vec<T>{} ? Vec<T>{} : grad; }

  // The pooled rows (columns) [begin, end) whose windows hold row (column) `at`.
  static void windows_of(int64_t at, int64_t size, int64_t stride, int64_t pooled, int64_t& begin, int64_t& end) {
    begin = at < size ? 0 : (at - size) / stride + 1;
    end = at / stride + 1 < pooled ? at / stride + 1 : pooled;
  }

  void write_rectified_row(int64_t first, T* line) const {
    for (int64_t x = 0; x < s.conv.out_w; x += kLanes<T>) {
      const int count = static_cast<int>(s.conv.out_w - x < kLanes<T> ? s.conv.out_w - x : kLanes<T>);
      store(line + x, passed(load_first(grad + first + x, count), load_first(output + first + x, count)));
    }
  }

  // Of 2x2 windows: a pooled vector becomes two, of which each pair of lanes holds its gradient at most once.
  void write_pooled_row(int64_t first, int64_t y, T* line) const {
    const Int<T> left = static_cast<Int<T>>(y % 2 * 2);
    const int64_t at = first + y / 2 * strides.h, pooled = y / 2 < s.pooled_h ? s.pooled_w : 0;
    for (int64_t px = 0; px < pooled; px += kLanes<T>) {
      const LaneSet lanes = first_lanes<T>(pooled - px);
      const IntVec<T> offset = load_offsets<T>(offsets + at + px, lanes);
      const Vec<T> g = load_lanes(grad + at + px, lanes, Vec<T>{});
      const Vec<T> even = select(equal(offset, IntVec<T>{} + left), g, Vec<T>{});
      const Vec<T> odd = select(equal(offset, IntVec<T>{} + (left + 1)), g, Vec<T>{});
      store(line + 2 * px, interleave_lower<T>(even, odd));
      if (2 * (pooled - px) > kLanes<T>) store(line + 2 * px + kLanes<T>, interleave_upper<T>(even, odd));
    }
    write_zeros(line, 2 * pooled, s.conv.out_w);
  }
};

}  // namespace
