// What the kernels of core/sized_pool2d.h share: their geometry, and which windows meet which elements.
#pragma once

#include "core/sized_pool2d.h"
#include "cuda/common.cuh"
#include "cuda/limits.h"

namespace cnn_ext::cuda {

struct SizedPool2dGeometry {
  explicit SizedPool2dGeometry(const SizedPool2dShape& s)
      : layout(s.layout),
        channels(static_cast<int>(s.channels)),
        in_h(static_cast<int>(s.in_h)),
        in_w(static_cast<int>(s.in_w)),
        out_h(static_cast<int>(s.out_h)),
        out_w(static_cast<int>(s.out_w)),
        large(strides_of(s.layout, s.channels, s.in_h, s.in_w)),
        small(strides_of(s.layout, s.channels, s.out_h, s.out_w)),
        planes(s.batch * s.channels),
        large_elements(planes * s.in_h * s.in_w),
        small_elements(planes * s.out_h * s.out_w) {}

  Layout layout;
  int channels, in_h, in_w, out_h, out_w;
  Strides large, small;
  int64_t planes, large_elements, small_elements;
};

// The elements, of `others` along an axis, that one of `count` covers: the window of an output over the inputs, and as well the windows
// that cover an input over the outputs.
__device__ inline Range covered(int place, int count, int others) {
  const int64_t first = static_cast<int64_t>(place) * others;
  return {static_cast<int>(first / count), static_cast<int>(ceil_div<int64_t>(first + others, count))};
}

inline bool has_int_extents(const SizedPool2dShape& s) {
  return all_below(kMaxExtent, {product({s.batch, s.channels}), product({s.in_h, s.in_w}), product({s.out_h, s.out_w})});
}

}  // namespace cnn_ext::cuda
