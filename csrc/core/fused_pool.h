// The pooling of a fused convolution, for what takes the two apart.
#pragma once

#include "core/shapes.h"

namespace cnn_ext {

// Of the convolution's output, and of its gradient.
[[maybe_unused]] static Pool2dShape pool_shape(const Conv2dReluPoolShape& s) {
  Pool2dShape pool{};
  pool.batch = s.conv.batch, pool.channels = s.conv.out_channels;
  pool.in_h = s.conv.out_h, pool.in_w = s.conv.out_w, pool.out_h = s.pooled_h, pool.out_w = s.pooled_w;
  pool.kernel_h = s.pool_h, pool.kernel_w = s.pool_w, pool.stride_h = s.pool_stride_h, pool.stride_w = s.pool_stride_w;
  pool.dilation_h = pool.dilation_w = 1;
  pool.dtype = s.conv.dtype, pool.layout = s.conv.layout;
  return pool;
}

[[maybe_unused]] static int64_t conv_elements(const Conv2dReluPoolShape& s) {
  return s.conv.batch * s.conv.out_channels * s.conv.out_h * s.conv.out_w;
}
[[maybe_unused]] static int64_t pooled_elements(const Conv2dReluPoolShape& s) {
  return s.conv.batch * s.conv.out_channels * s.pooled_h * s.pooled_w;
}

}  // namespace cnn_ext
