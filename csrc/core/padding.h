// Where the padding of a convolution's input takes its values from. Included by files compiled for different instruction sets: everything
// has internal linkage.
#pragma once

#include "core/shapes.h"

namespace cnn_ext {

// The position of the input whose value stands at `position` of its axis, which may lie within the padding; -1: none, it counts for zero.
[[maybe_unused]] static inline int64_t source_position(PaddingMode mode, int64_t position, int64_t size) {
  if (position >= 0 && position < size) return position;
  int64_t source = -1;
  if (mode == PaddingMode::reflect) source = position < 0 ? -position : 2 * (size - 1) - position;
  if (mode == PaddingMode::replicate) source = position < 0 ? 0 : size - 1;
  if (mode == PaddingMode::circular) source = position < 0 ? position + size : position - size;
  return source < size ? source : -1;  // beyond the padding
}

}  // namespace cnn_ext
