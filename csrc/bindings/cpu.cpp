// cnn_ext._C: the shapes and the CPU kernels for Python. Tensors arrive as addresses: what may be passed was checked above, in cnn_ext/ops.
// The interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/api.h"
#include "cpu/isa.h"
#include "cpu/peak.h"

namespace py = pybind11;

namespace cnn_ext {

void bind_shapes(py::module_& m);

namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

void run(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, int threads) {
  const py::gil_scoped_release unlocked;
  cpu::run_conv2d(direction, shape, buffers, threads);
}

void run(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers, int threads) {
  const py::gil_scoped_release unlocked;
  cpu::run_conv2d_relu_pool(direction, shape, buffers, threads);
}

void run(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, int threads) {
  const py::gil_scoped_release unlocked;
  cpu::run_pool2d(op, direction, shape, buffers, threads);
}

void run(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, Address large, Address small, Address indices,
         int threads) {
  const SizedPool2dBuffers buffers{pointer(large), pointer(small), static_cast<int64_t*>(pointer(indices))};
  const py::gil_scoped_release unlocked;
  cpu::run_sized_pool2d(op, direction, shape, buffers, threads);
}

void conv2d_forward(const Conv2dShape& shape, Address input, Address weight, Address bias, Address output, int threads) {
  Conv2dBuffers b{};
  b.input = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias), b.output = pointer(output);
  run(Conv2dDirection::forward, shape, b, threads);
}

void conv2d_forward_packed(const Conv2dShape& shape, Address input, Address weight, Address bias, Address output, cpu::PackedWeight& packed,
                           int threads) {
  Conv2dBuffers b{};
  b.input = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias), b.output = pointer(output);
  const py::gil_scoped_release unlocked;
  cpu::run_conv2d(Conv2dDirection::forward, shape, b, packed, threads);
}

void conv2d_backward_input(const Conv2dShape& shape, Address grad_output, Address weight, Address grad_input, int threads) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.weight = pointer(weight), b.grad_input = pointer(grad_input);
  run(Conv2dDirection::backward_input, shape, b, threads);
}

// A transposed convolution: the gradient of a convolution's input, plus a bias. The shape is that of the convolution.
void conv_transpose2d_forward(const Conv2dShape& shape, Address input, Address weight, Address bias, Address output, int threads) {
  Conv2dBuffers b{};
  b.grad_output = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias), b.grad_input = pointer(output);
  run(Conv2dDirection::backward_input, shape, b, threads);
}

void conv2d_backward_weight(const Conv2dShape& shape, Address grad_output, Address input, Address grad_weight, int threads) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.input = pointer(input), b.grad_weight = pointer(grad_weight);
  run(Conv2dDirection::backward_weight, shape, b, threads);
}

void conv2d_backward_bias(const Conv2dShape& shape, Address grad_output, Address grad_bias, int threads) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.grad_bias = pointer(grad_bias);
  run(Conv2dDirection::backward_bias, shape, b, threads);
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
                                    Address offsets, int threads) {
  Conv2dReluPoolBuffers b{};
  b.input = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias);
  b.output = pointer(output), b.offsets = static_cast<uint8_t*>(pointer(offsets));
  run(Conv2dDirection::forward, shape, b, threads);
}

// Without offsets: what keeps a packed weight asks for no gradient.
void conv2d_relu_max_pool2d_forward_packed(const Conv2dReluPoolShape& shape, Address input, Address weight, Address bias, Address output,
                                           cpu::PackedWeight& packed, int threads) {
  Conv2dReluPoolBuffers b{};
  b.input = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias), b.output = pointer(output);
  const py::gil_scoped_release unlocked;
  cpu::run_conv2d_relu_pool(Conv2dDirection::forward, shape, b, packed, threads);
}

void conv2d_relu_max_pool2d_backward_input(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address weight,
                                           Address grad_input, int threads) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.weight = pointer(weight), b.grad_input = pointer(grad_input);
  run(Conv2dDirection::backward_input, shape, b, threads);
}

void conv2d_relu_max_pool2d_backward_weight(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address input,
                                            Address grad_weight, int threads) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.input = pointer(input), b.grad_weight = pointer(grad_weight);
  run(Conv2dDirection::backward_weight, shape, b, threads);
}

void conv2d_relu_max_pool2d_backward_bias(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address grad_bias,
                                          int threads) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.grad_bias = pointer(grad_bias);
  run(Conv2dDirection::backward_bias, shape, b, threads);
}

void max_pool2d_forward(const Pool2dShape& shape, Address input, Address output, Address offsets, int threads) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.output = pointer(output), b.offsets = pointer(offsets);
  run(Pool2dOp::max, Pool2dDirection::forward, shape, b, threads);
}

void max_pool2d_backward(const Pool2dShape& shape, Address grad_output, Address offsets, Address grad_input, int threads) {
  Pool2dBuffers b{};
  b.grad_output = pointer(grad_output), b.offsets = pointer(offsets), b.grad_input = pointer(grad_input);
  run(Pool2dOp::max, Pool2dDirection::backward, shape, b, threads);
}

void max_pool2d_gather(const Pool2dShape& shape, Address input, Address offsets, Address output, int threads) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.offsets = pointer(offsets), b.output = pointer(output);
  run(Pool2dOp::max, Pool2dDirection::gather, shape, b, threads);
}

void avg_pool2d_forward(const Pool2dShape& shape, Address input, Address output, int threads) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.output = pointer(output);
  run(Pool2dOp::avg, Pool2dDirection::forward, shape, b, threads);
}

void avg_pool2d_backward(const Pool2dShape& shape, Address grad_output, Address grad_input, int threads) {
  Pool2dBuffers b{};
  b.grad_output = pointer(grad_output), b.grad_input = pointer(grad_input);
  run(Pool2dOp::avg, Pool2dDirection::backward, shape, b, threads);
}

void adaptive_max_pool2d_forward(const SizedPool2dShape& shape, Address input, Address output, Address indices, int threads) {
  run(SizedPool2dOp::adaptive_max, SizedPool2dDirection::forward, shape, input, output, indices, threads);
}

void adaptive_avg_pool2d_forward(const SizedPool2dShape& shape, Address input, Address output, int threads) {
  run(SizedPool2dOp::adaptive_avg, SizedPool2dDirection::forward, shape, input, output, 0, threads);
}

void adaptive_avg_pool2d_backward(const SizedPool2dShape& shape, Address grad_output, Address grad_input, int threads) {
  run(SizedPool2dOp::adaptive_avg, SizedPool2dDirection::backward, shape, grad_input, grad_output, 0, threads);
}

void max_unpool2d_forward(const SizedPool2dShape& shape, Address input, Address indices, Address output, int threads) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::forward, shape, output, input, indices, threads);
}

void max_unpool2d_scatter(const SizedPool2dShape& shape, Address input, Address indices, Address output, int threads) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::scatter, shape, output, input, indices, threads);
}

void max_unpool2d_gather(const SizedPool2dShape& shape, Address input, Address indices, Address output, int threads) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::gather, shape, input, output, indices, threads);
}

py::dict to_dict(const cpu::Choice& choice) {
  py::dict d;
  d["kernel"] = choice.kernel;
  d["isa"] = cpu::isa_name(choice.isa);
  d["threads"] = choice.threads;
  d["tile_channels"] = choice.plan.tile_channels;
  d["tile_pixels"] = choice.plan.tile_pixels;
  d["tasks"] = choice.plan.tasks;
  d["workspace_bytes"] = choice.plan.workspace_bytes;
  return d;
}

py::list kernels() {
  py::list rows;
  for (const cpu::KernelRow& row : cpu::kernel_rows()) {
    py::dict d;
    d["name"] = row.name;
    d["op"] = row.op;
    d["direction"] = row.direction;
    d["isa"] = cpu::isa_name(row.isa);
    d["supported"] = row.supported;
    rows.append(d);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("source_hash") = CNN_EXT_SOURCE_HASH;
  m.attr("compiler") = CNN_EXT_COMPILER;
  bind_shapes(m);
  m.def("conv2d_forward", &conv2d_forward);
  py::class_<cpu::PackedWeight>(m, "PackedWeight").def(py::init<>()).def_property_readonly("bytes", &cpu::PackedWeight::bytes);
  m.def("conv2d_forward_packed", &conv2d_forward_packed);
  m.def("conv2d_relu_max_pool2d_forward_packed", &conv2d_relu_max_pool2d_forward_packed);
  m.def("conv2d_backward_input", &conv2d_backward_input);
  m.def("conv_transpose2d_forward", &conv_transpose2d_forward);
  m.def("conv2d_backward_weight", &conv2d_backward_weight);
  m.def("conv2d_backward_bias", &conv2d_backward_bias);
  m.def("conv2d_relu_max_pool2d_forward", &conv2d_relu_max_pool2d_forward);
  m.def("conv2d_relu_max_pool2d_backward_input", &conv2d_relu_max_pool2d_backward_input);
  m.def("conv2d_relu_max_pool2d_backward_weight", &conv2d_relu_max_pool2d_backward_weight);
  m.def("conv2d_relu_max_pool2d_backward_bias", &conv2d_relu_max_pool2d_backward_bias);
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
  m.def("choose_conv2d", [](Conv2dDirection direction, const Conv2dShape& shape, int threads) {
    return to_dict(cpu::choose_conv2d(direction, shape, threads));
  });
  m.def("choose_conv2d_relu_pool", [](Conv2dDirection direction, const Conv2dReluPoolShape& shape, int threads) {
    return to_dict(cpu::choose_conv2d_relu_pool(direction, shape, threads));
  });
  m.def("choose_pool2d", [](Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, int threads) {
    return to_dict(cpu::choose_pool2d(op, direction, shape, threads));
  });
  m.def("choose_sized_pool2d", [](SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, int threads) {
    return to_dict(cpu::choose_sized_pool2d(op, direction, shape, threads));
  });
  m.def("kernels", &kernels);
  m.def("force_kernel", &cpu::force_kernel);
  m.def("restore_forced_kernel", &cpu::restore_forced_kernel);
  m.def("best_isa", [] { return cpu::isa_name(cpu::best_isa()); });
  m.def("fma_gflops", &cpu::fma_gflops, py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnn_ext
