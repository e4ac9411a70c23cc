// The index arithmetic of the CUDA kernels, in plain functions that the host compiler takes as well.
// Integer is what extents and coordinates are counted with: int where all of them fit (accepts() sees to it), or else int64_t, whose
// divisions take a GPU several times as long. Element offsets are int64_t.
#pragma once

#include <cstdint>

#include "core/shapes.h"

#ifdef __CUDACC__
#define CNN_EXT_HOST_DEVICE __host__ __device__
#else
#define CNN_EXT_HOST_DEVICE
#endif

namespace cnn_ext::cuda {

// For a >= 0 and b > 0.
template <class Integer>
CNN_EXT_HOST_DEVICE constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

template <class Integer>
CNN_EXT_HOST_DEVICE constexpr Integer smaller(Integer a, Integer b) {
  return a < b ? a : b;
}
template <class Integer>
CNN_EXT_HOST_DEVICE constexpr Integer larger(Integer a, Integer b) {
  return a > b ? a : b;
}

// Element strides of a dense 4-D tensor [N, C, H, W].
struct Strides {
  int64_t n, c, h, w;
};

CNN_EXT_HOST_DEVICE inline Strides strides_of(Layout layout, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::nchw ? Strides{c * h * w, h * w, w, 1} : Strides{c * h * w, 1, w * c, c};
}

// One element of a 4-D tensor.
template <class Integer>
struct ElementOf {
  Integer n, c, h, w;
};
using Element = ElementOf<int>;

// The element at an offset of a dense tensor, by divisions of type Divided.
template <class Integer, class Divided>
CNN_EXT_HOST_DEVICE ElementOf<Integer> divided_element(Layout layout, Divided index, Divided c, Divided h, Divided w) {
  const auto element = [](Divided n, Divided channel, Divided row, Divided column) {
    return ElementOf<Integer>{static_cast<Integer>(n), static_cast<Integer>(channel), static_cast<Integer>(row),
                              static_cast<Integer>(column)};
  };
  if (layout == Layout::nchw) {
    const Divided row = index / w, plane = row / h;
    return element(plane / c, plane % c, row % h, index % w);
  }
  const Divided pixel = index / c, row = pixel / w;
  return element(row / h, index % c, row % h, pixel % w);
}

// 32-bit divisions where they suffice: they are several times cheaper on a GPU. A larger divisor than the index is as good as any such.
template <class Integer>
CNN_EXT_HOST_DEVICE ElementOf<Integer> element_at(Layout layout, int64_t index, Integer c, Integer h, Integer w) {
  if (index <= INT32_MAX) {
    const auto divisor = [](Integer n) { return static_cast<uint32_t>(smaller<int64_t>(n, int64_t{INT32_MAX} + 1)); };
    return divided_element<Integer, uint32_t>(layout, static_cast<uint32_t>(index), divisor(c), divisor(h), divisor(w));
  }
  return divided_element<Integer, int64_t>(layout, index, c, h, w);
}

// The shapes with the strides of their tensors: what a kernel gets.
template <class Integer>
struct Conv2dGeometryOf {
  explicit Conv2dGeometryOf(const Conv2dShape& s)
      : layout(s.layout),
        groups(static_cast<Integer>(s.groups)),
        group_in(static_cast<Integer>(s.in_channels / s.groups)),
        group_out(static_cast<Integer>(s.out_channels / s.groups)),
        batch(static_cast<Integer>(s.batch)),
        in_h(static_cast<Integer>(s.in_h)),
        in_w(static_cast<Integer>(s.in_w)),
        out_h(static_cast<Integer>(s.out_h)),
        out_w(static_cast<Integer>(s.out_w)),
        kernel_h(static_cast<Integer>(s.kernel_h)),
        kernel_w(static_cast<Integer>(s.kernel_w)),
        stride_h(static_cast<Integer>(s.stride_h)),
        stride_w(static_cast<Integer>(s.stride_w)),
        pad_top(static_cast<Integer>(s.pad_top)),
        pad_left(static_cast<Integer>(s.pad_left)),
        dilation_h(static_cast<Integer>(s.dilation_h)),
        dilation_w(static_cast<Integer>(s.dilation_w)),
        in(strides_of(s.layout, s.in_channels, s.in_h, s.in_w)),
        out(strides_of(s.layout, s.out_channels, s.out_h, s.out_w)),
        filter(strides_of(s.weight_layout, group_in, s.kernel_h, s.kernel_w)) {}

  Layout layout;
  Integer groups, group_in, group_out;  // channels of one group
  Integer batch, in_h, in_w, out_h, out_w, kernel_h, kernel_w;
  Integer stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  Strides in, out, filter;
};
using Conv2dGeometry = Conv2dGeometryOf<int>;

template <class Integer>
struct Pool2dGeometryOf {
  explicit Pool2dGeometryOf(const Pool2dShape& s)
      : layout(s.layout),
        channels(static_cast<Integer>(s.channels)),
        in_h(static_cast<Integer>(s.in_h)),
        in_w(static_cast<Integer>(s.in_w)),
        out_h(static_cast<Integer>(s.out_h)),
        out_w(static_cast<Integer>(s.out_w)),
        kernel_h(static_cast<Integer>(s.kernel_h)),
        kernel_w(static_cast<Integer>(s.kernel_w)),
        stride_h(static_cast<Integer>(s.stride_h)),
        stride_w(static_cast<Integer>(s.stride_w)),
        pad_top(static_cast<Integer>(s.pad_top)),
        pad_bottom(static_cast<Integer>(s.pad_bottom)),
        pad_left(static_cast<Integer>(s.pad_left)),
        pad_right(static_cast<Integer>(s.pad_right)),
        dilation_h(static_cast<Integer>(s.dilation_h)),
        dilation_w(static_cast<Integer>(s.dilation_w)),
        in(strides_of(s.layout, s.channels, s.in_h, s.in_w)),
        out(strides_of(s.layout, s.channels, s.out_h, s.out_w)),
        in_elements(s.batch * s.channels * s.in_h * s.in_w),
        out_elements(s.batch * s.channels * s.out_h * s.out_w) {}

  Layout layout;
  Integer channels, in_h, in_w, out_h, out_w, kernel_h, kernel_w;
  Integer stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w;
  Strides in, out;
  int64_t in_elements, out_elements;
};
using Pool2dGeometry = Pool2dGeometryOf<int>;

// Division of 0 <= n < 2^31 by a fixed divisor: one high multiplication, one addition, one shift (Granlund and Montgomery's method).
class FastDivisor {
 public:
  CNN_EXT_HOST_DEVICE FastDivisor() : FastDivisor(1) {}
  CNN_EXT_HOST_DEVICE explicit FastDivisor(int divisor) : divisor_(divisor > 0 ? static_cast<uint32_t>(divisor) : 1) {
    while ((uint64_t{1} << shift_) < divisor_) ++shift_;
    magic_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor_) << 32) / divisor_ + 1);
  }
  CNN_EXT_HOST_DEVICE int quotient(int n) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic_) >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift_);
  }
  CNN_EXT_HOST_DEVICE int divisor() const { return static_cast<int>(divisor_); }

 private:
  uint32_t divisor_;
  uint32_t magic_ = 0;
  uint32_t shift_ = 0;
};

// index = (outer * height + h) * width + w: pixels of a batch of images, or taps of a row of filters.
template <class Integer>
struct PlaneIndexOf {
  Integer outer, h, w;
};
using PlaneIndex = PlaneIndexOf<int>;

class PlaneDecoder {
 public:
  CNN_EXT_HOST_DEVICE PlaneDecoder(int height = 1, int width = 1) : plane_(height * width), width_(width) {}
  CNN_EXT_HOST_DEVICE PlaneIndex at(int index) const {
    const int outer = plane_.quotient(index), rest = index - outer * plane_.divisor(), h = width_.quotient(rest);
    return {outer, h, rest - h * width_.divisor()};
  }

 private:
  FastDivisor plane_, width_;
};

// The terms of one output of a convolution, numbered as the weights lie in memory: (channel, r, s) in nchw, (r, s, channel) in nhwc, so
// that neighbouring threads read neighbouring addresses.
struct Tap {
  int channel, r, s;
};

template <Layout kLayout>
class TapDecoder {
 public:
  CNN_EXT_HOST_DEVICE TapDecoder(int channels, int kernel_h, int kernel_w)
      : inner_(kLayout == Layout::nchw ? kernel_h * kernel_w : channels), width_(kernel_w) {}
  CNN_EXT_HOST_DEVICE Tap at(int index) const {
    const int outer = inner_.quotient(index), inner = index - outer * inner_.divisor();
    const int tap = kLayout == Layout::nchw ? inner : outer;
    const int r = width_.quotient(tap);
    return {kLayout == Layout::nchw ? outer : inner, r, tap - r * width_.divisor()};
  }

 private:
  FastDivisor inner_, width_;
};

// A half-open range of taps or of windows along one axis.
template <class Integer>
struct RangeOf {
  Integer begin, end;
};
using Range = RangeOf<int>;

// The taps r of a window whose positions start + r * dilation lie in [0, size).
template <class Integer>
CNN_EXT_HOST_DEVICE RangeOf<Integer> taps_inside(Integer start, Integer dilation, Integer kernel, Integer size) {
  const Integer begin = start >= 0 ? 0 : (-start - 1) / dilation + 1;
  const Integer end = start >= size ? 0 : smaller(kernel, (size - start - 1) / dilation + 1);
  return {begin, larger(begin, end)};
}

// The windows o whose span covers an input position, given as position + padding before. With dilation only those hold it as a tap for
// which (position - o * stride) is a multiple of the dilation.
template <class Integer>
CNN_EXT_HOST_DEVICE RangeOf<Integer> windows_over(Integer position, Integer stride, Integer dilation, Integer kernel, Integer windows) {
  const Integer first = position - (kernel - 1) * dilation;
  const Integer begin = first <= 0 ? 0 : (first - 1) / stride + 1;
  return {begin, larger(begin, smaller(windows, position / stride + 1))};
}

// Input positions i of one axis fall into `stride` phases, (i + pad) mod stride. Within a phase the taps that reach an output form a
// progression, and backward_input is a convolution of stride 1: the i-th position of the phase takes its j-th tap from output
// origin + i - j * step.
struct Phase {
  int first_position;  // of the input; the next ones follow at distance `stride`
  int first_tap, tap_step, taps;
  int origin, step;
};

CNN_EXT_HOST_DEVICE inline int greatest_common_divisor(int a, int b) {
  while (b != 0) {
    const int rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

CNN_EXT_HOST_DEVICE inline Phase phase_of(int phase, int stride, int pad, int dilation, int kernel) {
  const int common = greatest_common_divisor(stride, dilation);
  const int before = pad % stride;
  Phase p{};
  p.first_position = phase >= before ? phase - before : phase - before + stride;
  p.tap_step = stride / common;
  p.step = dilation / common;
  while (p.first_tap < kernel && p.first_tap * dilation % stride != phase) ++p.first_tap;
  p.taps = ceil_div(kernel - p.first_tap, p.tap_step);
  p.origin = (p.first_position + pad - p.first_tap * dilation) / stride;
  return p;
}

}  // namespace cnn_ext::cuda
