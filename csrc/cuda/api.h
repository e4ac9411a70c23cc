// What the bindings see of the CUDA kernels. All act on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "core/shapes.h"
#include "cuda/kernel.h"

namespace cnn_ext::cuda {

// Queues the first row of the table that the device supports, that is admitted and that accepts the shape (or the forced row) on the
// stream. workspace: conv2d_workspace_bytes() or conv2d_relu_pool_workspace_bytes() bytes on the device, aligned to 256, that stay
// allocated until the stream has passed. Throws std::invalid_argument where a forced row refuses the shape or no row accepts it,
// std::runtime_error where CUDA fails, there is no device, or the kernels were not built for it.
void run_conv2d(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, void* workspace, cudaStream_t stream);
void run_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers,
                          void* workspace, cudaStream_t stream);
void run_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, cudaStream_t stream);
// Indices that it reads and that lie outside the plane are ignored.
void run_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, const SizedPool2dBuffers& buffers,
                      cudaStream_t stream);
size_t conv2d_workspace_bytes(Conv2dDirection direction, const Conv2dShape& shape, bool with_bias);
size_t conv2d_relu_pool_workspace_bytes(Conv2dDirection direction, const Conv2dReluPoolShape& shape);

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
