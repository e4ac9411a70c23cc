// What the bindings see of the CUDA kernels. All act on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "core/shapes.h"
#include "cuda/kernel.h"

namespace cnn_ext::cuda {

// Gives the row that was chosen as many bytes on the device as its plan wants, aligned to 256, that stay allocated until the stream has
// passed. It is called at most once, and not for nothing.
using Allocate = std::function<void*(size_t bytes)>;

// Queues the first row of the table that the device supports, that is admitted and that accepts the shape (or the forced row) on the
// stream. Throws std::invalid_argument where a forced row refuses the shape or no row accepts it, std::runtime_error where CUDA fails,
// there is no device, or the kernels were not built for it.
void run_conv2d(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, const Allocate& allocate,
                cudaStream_t stream);
void run_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers,
                          const Allocate& allocate, cudaStream_t stream);
void run_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, cudaStream_t stream);
// Indices that it reads and that lie outside the plane are ignored.
void run_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, const SizedPool2dBuffers& buffers,
                      cudaStream_t stream);

// What such a call would do.
struct Choice {
  std::string kernel;
  std::string arch;
  Plan plan;
};
Choice choose_conv2d(Conv2dDirection direction, const Conv2dShape& shape);
Choice choose_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape);
Choice choose_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape);
Choice choose_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape);

// The table, in order of preference. Works without a device: then no row is supported.
struct KernelRow {
  std::string name;
  std::string op;         // conv2d, conv2d_relu_max_pool2d, max_pool2d, avg_pool2d, adaptive_max_pool2d, ...
  std::string direction;  // forward, backward_input, ...
  std::string arch;
  bool supported;  // by the current device
  bool proven;     // has run on a GPU and was right
  bool admitted;   // to calls that do not force it (proof.h)
};
std::vector<KernelRow> kernel_rows();

// As on the CPU: while a row is forced, calls of its op and direction use it alone. Returns the name of the row that was forced before ("":
// none). Throws std::invalid_argument for a name that is no row or not supported.
std::string force_kernel(const std::string& name);
void restore_forced_kernel(const std::string& name, const std::string& previous);

}  // namespace cnn_ext::cuda
