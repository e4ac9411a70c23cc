// cnn_ext._cuda: the CUDA kernels for Python, with the functions of _C's CPU kernels and a queue in the place of the threads. Addresses are
// those of tensors on the queue's device. The interpreter lock is released while kernels are queued. The shapes' types are _C's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <tuple>

#include "cuda/api.h"
#include "cuda/archs.h"
#include "cuda/check.h"

namespace py = pybind11;

namespace cnn_ext {
namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// Where kernels are queued, as Python hands it over: (device, stream).
using Queue = std::tuple<int, Address>;

// While it lives, the queue's device is the current one and the interpreter lock is released.
class Queueing {
 public:
  explicit Queueing(const Queue& queue) : stream(reinterpret_cast<cudaStream_t>(std::get<1>(queue))) {
    const int device = std::get<0>(queue);
    // Without a device this fails: the kernel's call, which fails as well, has the better message.
    if (cudaGetDevice(&previous_) != cudaSuccess || previous_ == device) return;
    CUDA_CHECK(cudaSetDevice(device));
    moved_ = true;
  }
  ~Queueing() {
    if (moved_) cudaSetDevice(previous_);
  }
  Queueing(const Queueing&) = delete;
  Queueing& operator=(const Queueing&) = delete;

  const cudaStream_t stream;

 private:
  const py::gil_scoped_release unlocked_;
  int previous_ = 0;
  bool moved_ = false;
};

// Memory from a Python function of a number of bytes, which returns a tensor. It is kept until this is destroyed, which needs the
// interpreter lock: before a Queueing.
class Workspace {
 public:
  explicit Workspace(const py::function& allocate) : allocate_(allocate) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* operator()(size_t bytes) {
    const py::gil_scoped_acquire locked;
    memory_ = allocate_(bytes);
    return pointer(memory_.attr("data_ptr")().cast<Address>());
  }

 private:
  const py::function& allocate_;
  py::object memory_;
};

// What the convolutions' functions take behind their tensors.
struct Call {
  const Queue& queue;
  bool allow_tf32;
  const py::function& allocate;
};

void run(Conv2dDirection direction, Conv2dShape shape, const Conv2dBuffers& buffers, const Call& call) {
  shape.allow_tf32 = call.allow_tf32;
  Workspace workspace(call.allocate);
  const Queueing queueing(call.queue);
  cuda::run_conv2d(direction, shape, buffers, std::ref(workspace), queueing.stream);
}

void run(Conv2dDirection direction, Conv2dReluPoolShape shape, const Conv2dReluPoolBuffers& buffers, const Call& call) {
  shape.conv.allow_tf32 = call.allow_tf32;
  Workspace workspace(call.allocate);
  const Queueing queueing(call.queue);
  cuda::run_conv2d_relu_pool(direction, shape, buffers, std::ref(workspace), queueing.stream);
}

void run(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, const Queue& queue) {
  const Queueing queueing(queue);
  cuda::run_pool2d(op, direction, shape, buffers, queueing.stream);
}

void run(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, Address large, Address small, Address indices,
         const Queue& queue) {
  const SizedPool2dBuffers buffers{pointer(large), pointer(small), static_cast<int64_t*>(pointer(indices))};
  const Queueing queueing(queue);
  cuda::run_sized_pool2d(op, direction, shape, buffers, queueing.stream);
}

void conv2d_forward(const Conv2dShape& shape, Address input, Address weight, Address bias, Address output, const Queue& queue,
                    bool allow_tf32, const py::function& allocate) {
  Conv2dBuffers b{};
  b.input = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias), b.output = pointer(output);
  run(Conv2dDirection::forward, shape, b, {queue, allow_tf32, allocate});
}

void conv2d_backward_input(const Conv2dShape& shape, Address grad_output, Address weight, Address grad_input, const Queue& queue,
                           bool allow_tf32, const py::function& allocate) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.weight = pointer(weight), b.grad_input = pointer(grad_input);
  run(Conv2dDirection::backward_input, shape, b, {queue, allow_tf32, allocate});
}

void conv_transpose2d_forward(const Conv2dShape& shape, Address input, Address weight, Address bias, Address output, const Queue& queue,
                              bool allow_tf32, const py::function& allocate) {
  Conv2dBuffers b{};
  b.grad_output = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias), b.grad_input = pointer(output);
  run(Conv2dDirection::backward_input, shape, b, {queue, allow_tf32, allocate});
}

void conv2d_backward_weight(const Conv2dShape& shape, Address grad_output, Address input, Address grad_weight, const Queue& queue,
                            bool allow_tf32, const py::function& allocate) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.input = pointer(input), b.grad_weight = pointer(grad_weight);
  run(Conv2dDirection::backward_weight, shape, b, {queue, allow_tf32, allocate});
}

void conv2d_backward_bias(const Conv2dShape& shape, Address grad_output, Address grad_bias, const Queue& queue, bool allow_tf32,
                          const py::function& allocate) {
  Conv2dBuffers b{};
  b.grad_output = pointer(grad_output), b.grad_bias = pointer(grad_bias);
  run(Conv2dDirection::backward_bias, shape, b, {queue, allow_tf32, allocate});
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
                                    Address offsets, const Queue& queue, bool allow_tf32, const py::function& allocate) {
  Conv2dReluPoolBuffers b{};
  b.input = pointer(input), b.weight = pointer(weight), b.bias = pointer(bias);
  b.output = pointer(output), b.offsets = static_cast<uint8_t*>(pointer(offsets));
  run(Conv2dDirection::forward, shape, b, {queue, allow_tf32, allocate});
}

void conv2d_relu_max_pool2d_backward_input(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address weight,
                                           Address grad_input, const Queue& queue, bool allow_tf32, const py::function& allocate) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.weight = pointer(weight), b.grad_input = pointer(grad_input);
  run(Conv2dDirection::backward_input, shape, b, {queue, allow_tf32, allocate});
}

void conv2d_relu_max_pool2d_backward_weight(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address input,
                                            Address grad_weight, const Queue& queue, bool allow_tf32, const py::function& allocate) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.input = pointer(input), b.grad_weight = pointer(grad_weight);
  run(Conv2dDirection::backward_weight, shape, b, {queue, allow_tf32, allocate});
}

void conv2d_relu_max_pool2d_backward_bias(const Conv2dReluPoolShape& shape, Address grad_output, Address mask, Address grad_bias,
                                          const Queue& queue, bool allow_tf32, const py::function& allocate) {
  Conv2dReluPoolBuffers b = backward_buffers(shape, grad_output, mask);
  b.grad_bias = pointer(grad_bias);
  run(Conv2dDirection::backward_bias, shape, b, {queue, allow_tf32, allocate});
}

void max_pool2d_forward(const Pool2dShape& shape, Address input, Address output, Address offsets, const Queue& queue) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.output = pointer(output), b.offsets = pointer(offsets);
  run(Pool2dOp::max, Pool2dDirection::forward, shape, b, queue);
}

void max_pool2d_backward(const Pool2dShape& shape, Address grad_output, Address offsets, Address grad_input, const Queue& queue) {
  Pool2dBuffers b{};
  b.grad_output = pointer(grad_output), b.offsets = pointer(offsets), b.grad_input = pointer(grad_input);
  run(Pool2dOp::max, Pool2dDirection::backward, shape, b, queue);
}

void max_pool2d_gather(const Pool2dShape& shape, Address input, Address offsets, Address output, const Queue& queue) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.offsets = pointer(offsets), b.output = pointer(output);
  run(Pool2dOp::max, Pool2dDirection::gather, shape, b, queue);
}

void avg_pool2d_forward(const Pool2dShape& shape, Address input, Address output, const Queue& queue) {
  Pool2dBuffers b{};
  b.input = pointer(input), b.output = pointer(output);
  run(Pool2dOp::avg, Pool2dDirection::forward, shape, b, queue);
}

void avg_pool2d_backward(const Pool2dShape& shape, Address grad_output, Address grad_input, const Queue& queue) {
  Pool2dBuffers b{};
  b.grad_output = pointer(grad_output), b.grad_input = pointer(grad_input);
  run(Pool2dOp::avg, Pool2dDirection::backward, shape, b, queue);
}

void adaptive_max_pool2d_forward(const SizedPool2dShape& shape, Address input, Address output, Address indices, const Queue& queue) {
  run(SizedPool2dOp::adaptive_max, SizedPool2dDirection::forward, shape, input, output, indices, queue);
}

void adaptive_avg_pool2d_forward(const SizedPool2dShape& shape, Address input, Address output, const Queue& queue) {
  run(SizedPool2dOp::adaptive_avg, SizedPool2dDirection::forward, shape, input, output, 0, queue);
}

void adaptive_avg_pool2d_backward(const SizedPool2dShape& shape, Address grad_output, Address grad_input, const Queue& queue) {
  run(SizedPool2dOp::adaptive_avg, SizedPool2dDirection::backward, shape, grad_input, grad_output, 0, queue);
}

void max_unpool2d_forward(const SizedPool2dShape& shape, Address input, Address indices, Address output, const Queue& queue) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::forward, shape, output, input, indices, queue);
}

void max_unpool2d_scatter(const SizedPool2dShape& shape, Address input, Address indices, Address output, const Queue& queue) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::scatter, shape, output, input, indices, queue);
}

void max_unpool2d_gather(const SizedPool2dShape& shape, Address input, Address indices, Address output, const Queue& queue) {
  run(SizedPool2dOp::max_unpool, SizedPool2dDirection::gather, shape, input, output, indices, queue);
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
