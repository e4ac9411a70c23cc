// What the fast pooling kernels share. They see a tensor as [images][height][width][channels]: nhwc as it is; in nchw each plane is an
// image of one channel. Dilation is 1, and element offsets fit an int.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/thread_places.h"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {

inline int64_t pool_images(const Pool2dShape& s) { return s.layout == Layout::nchw ? s.batch * s.channels : s.batch; }
inline int64_t pool_channels(const Pool2dShape& s) { return s.layout == Layout::nchw ? 1 : s.channels; }

inline bool suits_pool_strips(const Pool2dShape& s) {
  return s.dilation_h == 1 && s.dilation_w == 1 && has_int_extents(s) &&
         all_below(kMaxExtent,
                   {product({s.batch, s.channels, s.in_h + s.stride_h, s.in_w}), product({s.batch, s.channels, s.out_h, s.out_w})});
}

// With a thread for each result; fewer where a thread computes several.
inline Plan plan_pool_outputs(const Pool2dShape& s) { return {1, 1, ceil_div<int64_t>(Pool2dGeometry(s).out_elements, kBlockThreads), 0}; }
inline Plan plan_pool_inputs(const Pool2dShape& s) { return {1, 1, ceil_div<int64_t>(Pool2dGeometry(s).in_elements, kBlockThreads), 0}; }

inline bool has_square_windows(const Pool2dShape& s, int kernel) { return s.kernel_h == kernel && s.kernel_w == kernel; }
inline bool has_windows(const Pool2dShape& s, int kernel, int stride, int pad_left) {
  return has_square_windows(s, kernel) && s.stride_h == stride && s.stride_w == stride && s.pad_left == pad_left;
}

}  // namespace cnn_ext::cuda
