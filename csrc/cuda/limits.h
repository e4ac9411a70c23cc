// Which shapes the kernels' integers hold. One place for all rows' accepts().
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/shapes.h"

namespace cnn_ext::cuda {

inline bool all_below(int64_t limit, std::initializer_list<int64_t> values) {
  for (const int64_t value : values) {
    if (value >= limit) return false;
  }
  return true;
}

// The product of numbers that are not negative, or INT64_MAX where that is larger.
inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result)) return INT64_MAX;
  }
  return result;
}

// Whether a byte can name the taps of a window.
inline bool has_offset_taps(const Conv2dReluPoolShape& s) { return product({s.pool_h, s.pool_w}) <= kNoGradient; }

// Whether an output of the convolution belongs to one window of the pooling at most.
inline bool has_disjoint_windows(const Conv2dReluPoolShape& s) {
  return s.pool_stride_h >= s.pool_h && s.pool_stride_w >= s.pool_w && has_offset_taps(s);
}

// For the rows whose indices are int64_t: a tensor's bytes fit one (cnn_ext/ops/shapes.py).
template <class Shape>
bool has_any_extents(const Shape&) {
  return true;
}

// Half of int's range leaves room for the sums of coordinates.
constexpr int64_t kMaxExtent = int64_t{1} << 30;

// Every extent and every coordinate of the padded tensors fits an int.
inline bool has_int_extents(const Conv2dShape& s) {
  return all_below(kMaxExtent, {s.batch, s.in_channels, s.in_h, s.in_w, s.out_channels, s.out_h, s.out_w, s.kernel_h, s.kernel_w,
                                s.stride_h, s.stride_w, s.pad_top, s.pad_left, s.dilation_h, s.dilation_w}) &&
         all_below(kMaxExtent, {s.out_h * s.stride_h, s.out_w * s.stride_w, s.kernel_h * s.dilation_h, s.kernel_w * s.dilation_w});
}

inline bool has_int_extents(const Pool2dShape& s) {
  return all_below(kMaxExtent, {s.batch, s.channels, s.in_h, s.in_w, s.out_h, s.out_w, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w,
                                s.pad_top, s.pad_bottom, s.pad_left, s.pad_right, s.dilation_h, s.dilation_w}) &&
         all_below(kMaxExtent, {s.out_h * s.stride_h, s.out_w * s.stride_w, s.kernel_h * s.dilation_h, s.kernel_w * s.dilation_w,
                                s.kernel_h * s.kernel_w});
}

// The implicit GEMMs number pixels and taps with ints. With one or two rows (as in a depthwise convolution) nearly all of their tile would
// be empty: the direct kernels read less.
inline bool suits_implicit_gemm(const Conv2dShape& s, int64_t rows) {
  const int64_t group_in = s.in_channels / s.groups;
  return rows > 2 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.out_h, s.out_w}), product({s.batch, s.in_h + s.stride_h, s.in_w + s.stride_w}),
                                product({s.out_channels, group_in, s.kernel_h, s.kernel_w})});
}

// The types that tensor cores multiply.
inline bool has_mma_type(const Conv2dShape& s) {
  return s.dtype == DType::float16 || s.dtype == DType::bfloat16 || (s.dtype == DType::float32 && s.allow_tf32 != 0);
}

// The fused implicit GEMMs take strict float32 and float64, for which no fused row is on tensor cores, with half of a tile's rows or more:
// other rows of the convolution serve the rest, and the composed row makes use of them.
constexpr int64_t kLeastFusedRows = 16;

inline bool suits_fused_gemm(const Conv2dReluPoolShape& s, int64_t rows) {
  return !has_mma_type(s.conv) && rows >= kLeastFusedRows && suits_implicit_gemm(s.conv, rows) && has_disjoint_windows(s) &&
         all_below(kMaxExtent, {s.pool_stride_h, s.pool_stride_w});
}

// The rows on tensor cores (mma_gemm.cuh) pad channels to chunks of 16 bytes, and number pixels and taps with ints.
constexpr int64_t kMostPadding = 7;

inline bool fits_mma(const Conv2dShape& s) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  return suits_implicit_gemm(s, group_out) &&
         all_below(kMaxExtent, {product({s.out_channels, group_in + kMostPadding, s.kernel_h, s.kernel_w}),
                                product({group_out + kMostPadding, s.kernel_h, s.kernel_w})});
}

// The general ones take groups of at least 16 input channels. Few outputs leave most of a tile empty, which costs less than to do without
// tensor cores: not so in strict float32 and float64.
constexpr int64_t kLeastMmaChannels = 16;

inline bool suits_mma(const Conv2dShape& s) { return has_mma_type(s) && s.in_channels / s.groups >= kLeastMmaChannels && fits_mma(s); }

inline bool has_strict_channels(const Conv2dShape& s) {
  return s.in_channels / s.groups >= kLeastMmaChannels && s.out_channels / s.groups >= kLeastMmaChannels && fits_mma(s);
}
inline bool suits_split_mma(const Conv2dShape& s) { return s.dtype == DType::float32 && s.allow_tf32 == 0 && has_strict_channels(s); }
inline bool suits_double_mma(const Conv2dShape& s) { return s.dtype == DType::float64 && has_strict_channels(s); }

// Several groups of `least` to 16 channels on both sides: they are numbered together.
constexpr int64_t kMostGroupChannels = 16, kMostTileGroups = 4;

inline bool suits_groups_mma(const Conv2dShape& s, int64_t least) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  return s.groups > 1 && has_mma_type(s) && group_in >= least && group_out >= least && group_in <= kMostGroupChannels &&
         group_out <= kMostGroupChannels && fits_mma(s) &&
         all_below(kMaxExtent / kMostTileGroups,
                   {product({s.batch, s.out_h, s.out_w}), product({s.batch, s.in_h + s.stride_h, s.in_w + s.stride_w}),
                    product({group_in + kMostPadding, s.kernel_h, s.kernel_w})});
}

}  // namespace cnn_ext::cuda
