// Rows whose packed weight may be kept from call to call, by callers whose weight stays the same. Included by files compiled for different
// instruction sets: declarations and plain data only.
#pragma once

#include "cpu/kernel.h"

namespace cnn_ext::cpu {

// How a row packs the weight of a shape: a function of the shape alone. One weight packed by one row in one form is the same bytes.
struct PackedForm {
  size_t bytes;
  int32_t variant;  // in the row's own numbers
};

// Where a weight is packed, or lies packed already: PackedForm::bytes bytes, aligned to 64; null: in the workspace, for this call alone.
struct Packed {
  void* data;
  bool is_ready;
};

// What a row needs beyond itself for that. Sums over a packed weight that was kept have the same bits.
template <class Kernel, class Shape, class Buffers>
struct PackingRow {
  const Kernel* row;
  PackedForm (*form)(const Shape&);
  // As the row's run; packs the weight unless packed.is_ready.
  Outcome (*run)(const Shape&, const Buffers&, Packed packed, void* workspace, int threads);
};

using PackingConv2d = PackingRow<Conv2dKernel, Conv2dShape, Conv2dBuffers>;
using PackingConv2dReluPool = PackingRow<Conv2dReluPoolKernel, Conv2dReluPoolShape, Conv2dReluPoolBuffers>;

}  // namespace cnn_ext::cpu
