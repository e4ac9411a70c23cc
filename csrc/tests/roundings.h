// How many roundings a term of a sum meets on its way: what a tolerance follows (tests/support/tolerances.py). 0: the result is exact.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "core/shapes.h"
#include "core/sized_pool2d.h"

namespace cnn_ext::tests {

inline int64_t roundings(Conv2dDirection direction, const Conv2dShape& s) {
  switch (direction) {
    case Conv2dDirection::forward:
      return s.in_channels / s.groups * s.kernel_h * s.kernel_w + 1;
    case Conv2dDirection::backward_input:
      return s.out_channels / s.groups * s.kernel_h * s.kernel_w;
    default:
      return s.batch * s.out_h * s.out_w;
  }
}

// Windows that may name the same element, at most.
inline int64_t overlap(int64_t window_h, int64_t stride_h, int64_t window_w, int64_t stride_w) {
  return ((window_h + stride_h - 1) / stride_h) * ((window_w + stride_w - 1) / stride_w);
}

// backward may first add up the gradients of the windows that named an element.
inline int64_t roundings(Conv2dDirection direction, const Conv2dReluPoolShape& s) {
  const int64_t sums = roundings(direction, s.conv);
  if (direction == Conv2dDirection::forward) return sums;
  return sums + overlap(s.pool_h, s.pool_stride_h, s.pool_w, s.pool_stride_w) - 1;
}

inline int64_t roundings(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& s) {
  if (op == Pool2dOp::avg) return s.kernel_h * s.kernel_w + 1;
  if (direction != Pool2dDirection::backward) return 0;
  return overlap(s.kernel_h, s.stride_h, s.kernel_w, s.stride_w) - 1;
}

// A maximum and what is moved are exact; a mean adds up a window, the others at most all of the outputs.
inline int64_t roundings(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& s) {
  if (op == SizedPool2dOp::adaptive_max || direction == SizedPool2dDirection::gather) return 0;
  if (op == SizedPool2dOp::max_unpool) return direction == SizedPool2dDirection::scatter ? s.out_h * s.out_w - 1 : 0;
  const int64_t taps_h = s.in_h / s.out_h + 2, taps_w = s.in_w / s.out_w + 2, covers_h = s.out_h / s.in_h + 2,
                covers_w = s.out_w / s.in_w + 2;
  return 1 + (direction == SizedPool2dDirection::forward ? taps_h * taps_w : covers_h * covers_w);
}

// The distance of a half to the next one: results are rounded to halves in the end. Nothing for the other types, whose roundings are
// counted.
template <class T>
double last_place(double) {
  return 0;
}

template <>
inline double last_place<Float16>(double value) {
  return std::ldexp(1.0, std::max(std::ilogb(value), -14) - 10);
}

template <>
inline double last_place<BFloat16>(double value) {
  return std::ldexp(1.0, std::max(std::ilogb(value), -126) - 7);
}

}  // namespace cnn_ext::tests
