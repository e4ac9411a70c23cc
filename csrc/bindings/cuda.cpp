// cnn_ext._cuda: the CUDA kernels for Python, with the functions of _C's CPU kernels and a stream in the place of the threads. Addresses
// are those of tensors on the current device. The interpreter lock is released while kernels are queued. The shapes' types are _C's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/api.h"
#include "cuda/archs.h"

namespace py = pybind11;

namespace cnn_ext {
namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

void run(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, Address workspace, Address stream) {
  const py::gil_scoped_release unlocked;
  cuda::run_conv2d(direction, shape, buffers, pointer(workspace), reinterpret_cast<cudaStream_t>(stream));
}

void run(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers, Address workspace,
         Address stream) {
  const py::gil_scoped_release unlocked;
  cuda::run_conv2d_relu_pool(direction, shape, buffers, pointer(workspace), reinterpret_cast<cudaStream_t>(stream));
}

void run(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, Address stream) {
  const py::gil_scoped_release unlocked;
  cuda::run_pool2d(op, direction, shape, buffers, reinterpret_cast<cudaStream_t>(stream));
}

void run(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, Address large, Address small, Address indices,
         Address stream) {
  const SizedPool2dBuffers buffers{pointer(large), pointer(small), static_cast<int64_t*>(pointer(indices))};
  const py::gil_scoped_release unlocked;
  cuda::run_sized_pool2d(op, direction, shape, buffers, reinterpret_cast<cudaStream_t>(stream));
}

void conv2d_forward(const Conv2dShape& shape, Address input, Address weight, Address bias, Address output, Address workspace,
                    Address stream) {
  Conv2dBuffers b{};
  b.input = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias), b.output = pointer(output);
  run(Conv2dDirection::forward, shape, b, workspace, stream);
}

void conv2d_backward_input(const Conv2dShape& shape, Address grad_output, Address weight, Address grad_input, Address workspace,
                           Address stream) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.weight = pointer(weight), b.grad_input = pointer(grad_input);
  run(Conv2dDirection::backward_input, shape, b, workspace, stream);
}

void conv_transpose2d_forward(const Conv2dShape& shape, Address input, Address weight, Address bias, Address output, Address workspace,
                              Address stream) {
  Conv2dBuffers b{};
  b.grad_output = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias), b.grad_input = pointer(output);
  run(Conv2dDirection::backward_input, shape, b, workspace, stream);
}

void conv2d_backward_weight(const Conv2dShape& shape, Address grad_output, Address input, Address grad_weight, Address workspace,
                            Address stream) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.input = pointer(input), b.grad_weight = pointer(grad_weight);
  run(Conv2dDirection::backward_weight, shape, b, workspace, stream);
}

void conv2d_backward_bias(const Conv2dShape& shape, Address grad_output, Address grad_bias, Address workspace, Address stream) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.grad_bias = pointer(grad_bias);
  run(Conv2dDirection::backward_bias, shape, b, workspace, stream);
}

// The buffers of a backward direction; `mask`: the offsets or, without pooling, the output.
Conv2dReluPoolBuffers backward_buffers(const Conv2dReluPoolShape& shape, Address grad_output, Address mask) {
  Conv2dReluPoolBuffers b{};
  b.grad_output = pointer(grad_output);
  if (has_pooling(shape)) {
    b.offsets = static_cast<uint8_t*>(pointer(mask));
  } else {
    b.output = pointer(mask);
  }
  return b;
}

void conv2d_relu_max_pool2d_forward(const Conv2dReluPoolShape& shape, Address input, Address weight, Address bias, Address output,
                                    Address offsets, Address workspace, Address stream) {
  Conv2dReluPoolBuffers b{};
  b.input = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias);
  b.output = pointer(output), b.offsets = static_cast<uint8_t*>(pointer(offsets));
  run(Conv2dDirection::forward, shape, b, workspace, stream);
}

void conv2d_relu_max_pool2d_backward_input(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address weight,
                                           Address grad_input, Address workspace, Address stream) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.weight = pointer(weight), b.grad_input = pointer(grad_input);
  run(Conv2dDirection::backward_input, shape, b, workspace, stream);
}

void conv2d_relu_max_pool2d_backward_weight(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address input,
                                            Address grad_weight, Address workspace, Address stream) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.input = pointer(input), b.grad_weight = pointer(grad_weight);
  run(Conv2dDirection::backward_weight, shape, b, workspace, stream);
}

void conv2d_relu_max_pool2d_backward_bias(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address grad_bias,
                                          Address workspace, Address stream) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.grad_bias = pointer(grad_bias);
  run(Conv2dDirection::backward_bias, shape, b, workspace, stream);
}

void max_pool2d_forward(const Pool2dShape& shape, Address input, Address output, Address offsets, Address stream) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.output = pointer(output), b.offsets = pointer(offsets);
  run(Pool2dOp::max, Pool2dDirection::forward, shape, b, stream);
}

void max_pool2d_backward(const Pool2dShape& shape, Address grad_output, Address offsets, Address grad_input, Address stream) {
  Pool2dBuffers b{};
  b.grad_output = pointer(grad_output), b.offsets = pointer(offsets), b.grad_input = pointer(grad_input);
  run(Pool2dOp::max, Pool2dDirection::backward, shape, b, stream);
}

void max_pool2d_gather(const Pool2dShape& shape, Address input, Address offsets, Address output, Address stream) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.offsets = pointer(offsets), b.output = pointer(output);
  run(Pool2dOp::max, Pool2dDirection::gather, shape, b, stream);
}

void avg_pool2d_forward(const Pool2dShape& shape, Address input, Address output, Address stream) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.output = pointer(output);
  run(Pool2dOp::avg, Pool2dDirection::forward, shape, b, stream);
}

void avg_pool2d_backward(const Pool2dShape& shape, Address grad_output, Address grad_input, Address stream) {
  Pool2dBuffers b{};
  b.grad_output = pointer(grad_output), b.grad_input = pointer(grad_input);
  run(Pool2dOp::avg, Pool2dDirection::backward, shape, b, stream);
}

void adaptive_max_pool2d_forward(const SizedPool2dShape& shape, Address input, Address output, Address indices, Address stream) {
  run(SizedPool2dOp::adaptive_max, SizedPool2dDirection::forward, shape, input, output, indices, stream);
}

void adaptive_avg_pool2d_forward(const SizedPool2dShape& shape, Address input, Address output, Address stream) {
  run(SizedPool2dOp::adaptive_avg, SizedPool2dDirection::forward, shape, input, output, 0, stream);
}

void adaptive_avg_pool2d_backward(const SizedPool2dShape& shape, Address grad_output, Address grad_input, Address stream) {
  run(SizedPool2dOp::adaptive_avg, SizedPool2dDirection::backward, shape, grad_input, grad_output, 0, stream);
}

void max_unpool2d_forward(const SizedPool2dShape& shape, Address input, Address indices, Address output, Address stream) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::forward, shape, output, input, indices, stream);
}

void max_unpool2d_scatter(const SizedPool2dShape& shape, Address input, Address indices, Address output, Address stream) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::scatter, shape, output, input, indices, stream);
}

void max_unpool2d_gather(const SizedPool2dShape& shape, Address input, Address indices, Address output, Address stream) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::gather, shape, input, output, indices, stream);
}

py::dict to_dict(const cuda::Choice& choice) {
  py::dict d;
  d["kernel"] = choice.kernel;
  d["isa"] = choice.arch;
  d["threads"] = cuda::kBlockThreads;
  d["tile_channels"] = choice.plan.tile_channels;
  d["tile_pixels"] = choice.plan.tile_pixels;
  d["tasks"] = choice.plan.blocks;
  d["workspace_bytes"] = choice.plan.workspace_bytes;
  return d;
}

py::list kernels() {
  py::list rows;
  for (const cuda::KernelRow& row : cuda::kernel_rows()) {
    py::dict d;
    d["name"] = row.name;
    d["op"] = row.op;
    d["direction"] = row.direction;
    d["isa"] = row.arch;
    d["supported"] = row.supported;
    d["proven"] = row.proven;
    d["admitted"] = row.admitted;
    rows.append(d);
  }
  return rows;
}

void describe(py::module_& m) {
  m.attr("source_hash") = CNN_EXT_SOURCE_HASH;
  m.attr("toolkit") = CNN_EXT_CUDA_TOOLKIT;
  m.attr("archs") = cuda::built_archs();
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  py::module_::import("cnn_ext._C");
  describe(m);
  m.def("conv2d_forward", &conv2d_forward);
  m.def("conv2d_backward_input", &conv2d_backward_input);
  m.def("conv_transpose2d_forward", &conv_transpose2d_forward);
  m.def("conv2d_backward_weight", &conv2d_backward_weight);
  m.def("conv2d_backward_bias", &conv2d_backward_bias);
  m.def("conv2d_workspace_bytes", &cuda::conv2d_workspace_bytes);
  m.def("conv2d_relu_max_pool2d_forward", &conv2d_relu_max_pool2d_forward);
  m.def("conv2d_relu_max_pool2d_backward_input", &conv2d_relu_max_pool2d_backward_input);
  m.def("conv2d_relu_max_pool2d_backward_weight", &conv2d_relu_max_pool2d_backward_weight);
  m.def("conv2d_relu_max_pool2d_backward_bias", &conv2d_relu_max_pool2d_backward_bias);
  m.def("conv2d_relu_pool_workspace_bytes", &cuda::conv2d_relu_pool_workspace_bytes);
  m.def("max_pool2d_forward", &max_pool2d_forward);
  m.def("max_pool2d_backward", &max_pool2d_backward);
  m.def("max_pool2d_gather", &max_pool2d_gather);
  m.def("avg_pool2d_forward", &avg_pool2d_forward);
  m.def("avg_pool2d_backward", &avg_pool2d_backward);
  m.def("adaptive_max_pool2d_forward", &adaptive_max_pool2d_forward);
  m.def("adaptive_avg_pool2d_forward", &adaptive_avg_pool2d_forward);
  m.def("adaptive_avg_pool2d_backward", &adaptive_avg_pool2d_backward);
  m.def("max_unpool2d_forward", &max_unpool2d_forward);
  m.def("max_unpool2d_scatter", &max_unpool2d_scatter);
  m.def("max_unpool2d_gather", &max_unpool2d_gather);
  // The number of CPU threads, which _C's functions take, plays no part here.
  m.def("choose_conv2d",
        [](Conv2dDirection direction, const Conv2dShape& shape, int) { return to_dict(cuda::choose_conv2d(direction, shape)); });
  m.def("choose_conv2d_relu_pool", [](Conv2dDirection direction, const Conv2dReluPoolShape& shape, int) {
    return to_dict(cuda::choose_conv2d_relu_pool(direction, shape));
  });
  m.def("choose_pool2d", [](Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, int) {
    return to_dict(cuda::choose_pool2d(op, direction, shape));
  });
  m.def("choose_sized_pool2d", [](SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, int) {
    return to_dict(cuda::choose_sized_pool2d(op, direction, shape));
  });
  m.def("kernels", &kernels);
  m.def("force_kernel", &cuda::force_kernel);
  m.def("restore_forced_kernel", &cuda::restore_forced_kernel);
  m.def("require_arch", &cuda::require_arch);
}

}  // namespace cnn_ext
