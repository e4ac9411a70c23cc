// What rows of the half types call: the row that serves the same problem in float32. Included by files compiled for different instruction
// sets: declarations only.
#pragma once

#include "cpu/kernel.h"

namespace cnn_ext::cpu {

// Memory that a caller has for the row to run, aligned to 64 bytes; a row that wants more allocates it.
struct RowScratch {
  void* data;
  size_t bytes;
};

// Runs the first row of the table, of the instruction set `most` or of a lesser one, that accepts the shape, on up to `threads` threads: a
// float32 shape, or, for a row that leaves some to others, one of its own with a lesser instruction set. No forced row counts: the caller
// may be one.
void run_float_row(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, Isa most, int threads,
                   RowScratch scratch = {});
void run_float_row(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers, Isa most, int threads,
                   RowScratch scratch = {});
void run_float_row(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, Isa most, int threads);

// The scratch that this row takes.
size_t float_row_bytes(Conv2dDirection direction, const Conv2dShape& shape, Isa most, int threads);
size_t float_row_bytes(Conv2dDirection direction, const Conv2dReluPoolShape& shape, Isa most, int threads);

}  // namespace cnn_ext::cpu
