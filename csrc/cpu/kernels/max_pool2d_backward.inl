// What the rows of max pooling's backward share: how a plane is gathered, by whose steps they are chosen.
#pragma once

#include "cpu/kernels/pool2d.inl"

namespace {

// A count known to the compiler. (std::integral_constant's members would be functions that instruction sets share.)
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

inline int64_t taps_of(const Pool2dShape& s) { return s.kernel_h * s.kernel_w; }

// Whether a plane can be gathered as one row: a tap that leaves a row of the input meets another one, but is no window's maximum.
inline bool joins_rows(const Pool2dShape& s) {
  constexpr int64_t kMostElements = 1024;
  const bool moves_by_one = s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
  const bool keeps_size = s.in_h == s.out_h && s.in_w == s.out_w && s.pad_top < s.kernel_h && s.pad_left < s.kernel_w;
  return s.layout == Layout::nchw && moves_by_one && keeps_size && s.in_h * s.in_w <= kMostElements;
}

// Whether there is a gather by pairs of rows and columns (max_pool2d_backward_pairs.inl), and whether a shape takes it.
constexpr bool kHasPairs = kVectorBytes < 64;
inline bool gathers_pairs(const Pool2dShape& s) {
  const bool is_3x3 = s.kernel_h == 3 && s.kernel_w == 3 && s.dilation_h == 1 && s.dilation_w == 1;
  return s.layout == Layout::nchw && is_3x3 && s.stride_h == 2 && s.stride_w == 2 && s.pad_top <= 1 && s.pad_left <= 1;
}

// Whether there is a row that adds gradients in grad_input itself (max_pool2d_backward_in_place.cpp), and whether it can: every window has
// a tap inside the input, which its offset names.
constexpr bool kHasInPlace = kVectorBytes == 32;
inline bool meets_input(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return dilation == 1 && pad < kernel && (out - 1) * stride - pad < in;
}
inline bool every_window_meets_input(const Pool2dShape& s) {
  return meets_input(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h) &&
         meets_input(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w);
}

// Vectors of outputs in a plane.
inline int64_t output_vectors_of(const Pool2dShape& s, int64_t lanes) {
  return joins_rows(s) ? ceil_div(s.out_h * s.out_w, lanes) : s.out_h * ceil_div(s.out_w, lanes);
}

// A vector of a row of `size` columns, as far as it lies inside.
template <class T>
inline void store_columns(T* row, int64_t column, Vec<T> v, int64_t size) {
  if (column + kLanes<T> <= size) return store_in_stream(row + column, v);
  if (column < size) store_lanes(row + column, v, first_lanes<T>(size - column));
}

}  // namespace
