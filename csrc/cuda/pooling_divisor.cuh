// What the sum of an average pooling's window is divided by.
#pragma once

#include "cuda/common.cuh"

namespace cnn_ext::cuda {

// Taps of one axis before the end of the input and its padding.
CNN_EXT_HOST_DEVICE inline int taps_before(int start, int dilation, int kernel, int end) {
  return start >= end ? 0 : smaller(kernel, ceil_div(end - start, dilation));
}

// torch's rule: an override, else the taps inside the input, else those inside the padded input (ceil_mode's overhang never counts). The
// sum of an empty window stays the zero that it is.
struct PoolDivisor {
  explicit PoolDivisor(const Pool2dShape& s) : override_(s.divisor_override), count_include_pad(s.count_include_pad != 0) {}

  __device__ int64_t of(const Pool2dGeometry& g, int first_h, int first_w, int dilation_h, int dilation_w) const {
    const Range rows = taps_inside(first_h, dilation_h, g.kernel_h, g.in_h), cols = taps_inside(first_w, dilation_w, g.kernel_w, g.in_w);
    const int inside = (rows.end - rows.begin) * (cols.end - cols.begin);
    if (inside == 0) return 1;
    if (override_ != 0) return override_;
    if (!count_include_pad) return inside;
    return taps_before(first_h, dilation_h, g.kernel_h, g.in_h + g.pad_bottom) *
           taps_before(first_w, dilation_w, g.kernel_w, g.in_w + g.pad_right);
  }

  int64_t override_;  // 0: none
  bool count_include_pad;
};

}  // namespace cnn_ext::cuda
