// What the sum of an average pooling's window is divided by.
#pragma once

#include "cuda/common.cuh"

namespace cnn_ext::cuda {

// Taps of one axis before the end of the input and its padding.
template <class Integer>
CNN_EXT_HOST_DEVICE Integer taps_before(Integer start, Integer dilation, Integer kernel, Integer end) {
  return start >= end ? 0 : smaller(kernel, ceil_div(end - start, dilation));
}

// torch's rule: an override, else the taps inside the input, else those inside the padded input (ceil_mode's overhang never counts). The
// sum of an empty window stays the zero that it is.
struct PoolDivisor {
  explicit PoolDivisor(const Pool2dShape& s) : override_(s.divisor_override), count_include_pad(s.count_include_pad != 0) {}

  template <class Integer>
  __device__ int64_t of(const Pool2dGeometryOf<Integer>& g, Integer first_h, Integer first_w, Integer dilation_h,
                        Integer dilation_w) const {
    const RangeOf<Integer> rows = taps_inside(first_h, dilation_h, g.kernel_h, g.in_h);
    const RangeOf<Integer> cols = taps_inside(first_w, dilation_w, g.kernel_w, g.in_w);
    const Integer inside = (rows.end - rows.begin) * (cols.end - cols.begin);
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
