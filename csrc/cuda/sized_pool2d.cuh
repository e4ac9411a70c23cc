// What the kernels of core/sized_pool2d.h share: their geometry, and which windows meet which elements.
#pragma once

#include "core/sized_pool2d.h"
#include "cuda/common.cuh"
#include "cuda/limits.h"

namespace cnn_ext::cuda {

struct SizedPool2dGeometry {
  explicit SizedPool2dGeometry(const SizedPool2dShape& s)
      : layout(s.layout),
        channels(s.channels),
        in_h(s.in_h),
        in_w(s.in_w),
        out_h(s.out_h),
        out_w(s.out_w),
        large(strides_of(s.layout, s.channels, s.in_h, s.in_w)),
        small(strides_of(s.layout, s.channels, s.out_h, s.out_w)),
        planes(s.batch * s.channels),
        large_elements(planes * s.in_h * s.in_w),
        small_elements(planes * s.out_h * s.out_w) {}

  Layout layout;
  int64_t channels, in_h, in_w, out_h, out_w;
  Strides large, small;
  int64_t planes, large_elements, small_elements;
};

// The elements, of `others` along an axis, that one of `count` covers: the window of an output over the inputs, and as well the windows
// that cover an input over the outputs.
__device__ inline RangeOf<int64_t> covered(int64_t place, int64_t count, int64_t others) {
  const int64_t first = place * others;
  return {first / count, ceil_div<int64_t>(first + others, count)};
}

}  // namespace cnn_ext::cuda
