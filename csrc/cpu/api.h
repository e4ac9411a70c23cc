// What the bindings and the test program see of the CPU kernels.
#pragma once

#include <string>
#include <vector>

#include "core/shapes.h"
#include "core/sized_pool2d.h"
#include "cpu/kernel.h"
#include "cpu/packed_weight.h"

namespace cnn_ext::cpu {

// Runs the first row of the table that this machine supports and that accepts the shape (or the forced row), on up to `threads` threads.
// Throws std::invalid_argument where a forced row refuses the shape or no row accepts it.
void run_conv2d(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, int threads);
// The same with the weight as it is kept packed, packed for this call where it is not kept yet in the form that the call needs. A row that
// packs no weight, and a weight that is not finite, keep nothing.
void run_conv2d(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, PackedWeight& weight, int threads);
void run_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers,
                          PackedWeight& weight, int threads);
// The same by the table alone, for rows that are made of other ones.
void run_conv2d_unforced(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, int threads);
void run_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers, int threads);
void run_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, int threads);
// Throws std::runtime_error where an index that it reads is none of the plane.
void run_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, const SizedPool2dBuffers& buffers,
                      int threads);

// What such a call would do.
struct Choice {
  std::string kernel;
  Isa isa;
  int threads;
  Plan plan;
};
Choice choose_conv2d(Conv2dDirection direction, const Conv2dShape& shape, int threads);
Choice choose_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, int threads);
Choice choose_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, int threads);
Choice choose_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, int threads);

// The table, in order of preference.
struct KernelRow {
  std::string name;
  std::string op;         // conv2d, conv2d_relu_max_pool2d, max_pool2d, avg_pool2d, ...
  std::string direction;  // forward, backward_input, ...
  Isa isa;
  bool supported;  // by this machine, and allowed by CNN_EXT_ISA
};
std::vector<KernelRow> kernel_rows();

// While a row is forced, calls of its op and direction use it alone. Process-wide. Returns the name of the row that was forced there before
// ("" for none); an empty name with the slot's old row restores. Throws std::invalid_argument for a name that is no row or not supported.
std::string force_kernel(const std::string& name);
void restore_forced_kernel(const std::string& name, const std::string& previous);

}  // namespace cnn_ext::cpu
