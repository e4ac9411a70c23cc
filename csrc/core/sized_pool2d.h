// Poolings without a window among their arguments: adaptive ones, whose windows follow from the sizes, and those that go by indices.
#pragma once

#include "core/shapes.h"

namespace cnn_ext {

enum class SizedPool2dOp : int32_t { adaptive_max, adaptive_avg, max_unpool };

// What each op computes; `large` is [N, C, in_h, in_w], `small` and `indices` are [N, C, out_h, out_w]:
//   adaptive_max  forward   small and indices from large: the maximum of each window and its place
//   adaptive_avg  forward   small from large: the mean of each window
//                 backward  large from small: each gradient shared out over its window
//   max_unpool    forward   large from small and indices: each value at its place, the last one where several meet, 0 elsewhere
//                 scatter   large from small and indices: the sum of the values at each place; adaptive max pooling's gradient
//                 gather    small from large and indices: the value at each place; the derivative of forward and of scatter
enum class SizedPool2dDirection : int32_t { forward, backward, scatter, gather };

// The window of small (oh, ow) covers the rows floor(oh * in_h / out_h) <= ih < ceil((oh + 1) * in_h / out_h); columns alike. An index is
// ih * in_w + iw.
struct SizedPool2dShape {
  int64_t batch, channels;
  int64_t in_h, in_w;
  int64_t out_h, out_w;
  DType dtype;
  Layout layout;  // of all tensors
};

// A direction reads one of `large` and `small` and writes the other one.
struct SizedPool2dBuffers {
  void* large;
  void* small;
  int64_t* indices;  // written by adaptive max pooling (null: not asked for), read by unpooling
};

}  // namespace cnn_ext
