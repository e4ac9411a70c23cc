// The divisors of average pooling, as a product of one number per output row and one per output column.
#pragma once

#include "cpu/kernels/pool2d.inl"

namespace {

// One axis's factor of the divisor of output `out`: the taps inside the input, or with count_include_pad those inside the padded input
// (what hangs over because of ceil_mode never counts). An override stands in place of both factors. Empty windows have a sum of 0 and get a
// harmless 1.
inline int64_t axis_divisor(const Pool2dShape& s, int64_t start, int64_t kernel, int64_t dilation, int64_t in, int64_t pad_after,
                            int64_t divisor_override) {
  const Taps inside = taps_inside(start, kernel, dilation, in);
  if (inside.empty()) return 1;
  if (divisor_override != 0) return divisor_override;
  return s.count_include_pad != 0 ? smaller(kernel, ceil_div(in + pad_after - start, dilation)) : inside.last - inside.first;
}

inline int64_t row_divisor(const Pool2dShape& s, int64_t oh) {
  const int64_t one = s.divisor_override != 0 ? 1 : 0;
  return axis_divisor(s, oh * s.stride_h - s.pad_top, s.kernel_h, s.dilation_h, s.in_h, s.pad_bottom, one);
}

inline int64_t column_divisor(const Pool2dShape& s, int64_t ow) {
  return axis_divisor(s, ow * s.stride_w - s.pad_left, s.kernel_w, s.dilation_w, s.in_w, s.pad_right, s.divisor_override);
}

// Whether there is one window, which covers the whole plane (nchw).
inline bool is_global(const Pool2dShape& s) {
  const bool is_one = s.out_h == 1 && s.out_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
  return s.layout == Layout::nchw && is_one && s.kernel_h - s.pad_top >= s.in_h && s.kernel_w - s.pad_left >= s.in_w;
}

// The divisor of that window.
template <class T>
T global_divisor(const Pool2dShape& s) {
  return static_cast<T>(row_divisor(s, 0)) * static_cast<T>(column_divisor(s, 0));
}

// One per output column, `copies` times each, and ones up to whole vectors.
template <class T>
T* carve_column_divisors(const Pool2dShape& s, int64_t copies, Carver& carver) {
  return carver.take<T>(s.out_w * copies + kLanes<T>);
}

template <class T>
void fill_column_divisors(const Pool2dShape& s, int64_t copies, T* divisors) {
  const T* last = divisors + s.out_w * copies + kLanes<T>;
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    const T divisor = static_cast<T>(column_divisor(s, ow));
    for (int64_t i = 0; i < copies; ++i) *divisors++ = divisor;
  }
  while (divisors < last) *divisors++ = T{1};
}

}  // namespace
