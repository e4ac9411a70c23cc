"""The raw operators of adaptive pooling and of unpooling, without autograd: checks, allocation, kernel.

``output_size`` is (height, width) of the result. Indices are int64, h * W + w within a plane of the larger tensor. One
that lies outside is an error on the CPU; on a GPU, where to find it would wait for the device, it is ignored.
"""

import functools

import torch

from cnn_ext import _native
from cnn_ext.ops import shapes
from cnn_ext.ops.library import register
from cnn_ext.ops.results import empty
from cnn_ext.ops.shapes import TensorSpec, spec
from cnn_ext.ops.sized_shapes import check_adaptive_pool2d, check_unpool2d


def _native_shape(large_size, small_size, dtype, memory_format):
    return _native.SizedPool2dShape(
        batch=large_size[0],
        channels=large_size[1],
        in_h=large_size[2],
        in_w=large_size[3],
        out_h=small_size[2],
        out_w=small_size[3],
        dtype=_native.DTYPES[dtype],
        layout=_native.Layout.nhwc if memory_format == torch.channels_last else _native.Layout.nchw,
    )


_prepare = functools.lru_cache(maxsize=1024)(_native_shape)


# adaptive pooling ----------------------------------------------------------------------------------------------------


def _plan_forward(op: str, input: TensorSpec, output_size):
    check_adaptive_pool2d(op, input.size, output_size)
    shapes.check_served(op, input)
    size = (*input.size[:2], *output_size)
    shapes.check_fits("output", size, input.dtype.itemsize)
    return size, shapes.memory_format(input)


def _empty_indices(size, like: torch.Tensor, memory_format, with_indices: bool) -> torch.Tensor:
    if not with_indices:
        return torch.empty(0, dtype=torch.int64, device=like.device)
    return empty(size, like, memory_format, torch.int64)


def _max_forward(input, output_size, with_indices):
    size, memory_format = _plan_forward("adaptive_max_pool2d", spec(input), output_size)
    output = empty(size, input, memory_format)
    indices = _empty_indices(size, input, memory_format, with_indices)
    if output.numel() != 0:
        shape = _prepare(input.shape, size, input.dtype, memory_format)
        input = input.contiguous(memory_format=memory_format)
        _native.adaptive_max_pool2d_forward(shape, input, output, indices if with_indices else None)
    return output, indices


def _max_forward_fake(input, output_size, with_indices):
    size, memory_format = _plan_forward("adaptive_max_pool2d", spec(input), output_size)
    return empty(size, input, memory_format), _empty_indices(size, input, memory_format, with_indices)


def _avg_forward(input, output_size):
    size, memory_format = _plan_forward("adaptive_avg_pool2d", spec(input), output_size)
    output = empty(size, input, memory_format)
    if output.numel() != 0:
        shape = _prepare(input.shape, size, input.dtype, memory_format)
        _native.adaptive_avg_pool2d_forward(shape, input.contiguous(memory_format=memory_format), output)
    return output


def _avg_forward_fake(input, output_size):
    size, memory_format = _plan_forward("adaptive_avg_pool2d", spec(input), output_size)
    return empty(size, input, memory_format)


def _plan_avg_backward(grad_output: TensorSpec, input_size):
    shapes.check_size("grad_output", grad_output.size[:2], input_size[:2])
    check_adaptive_pool2d("adaptive_avg_pool2d", input_size, grad_output.size[2:])
    shapes.check_served("adaptive_avg_pool2d", grad_output)
    return shapes.memory_format(grad_output)


def _avg_backward(grad_output, input_size):
    memory_format = _plan_avg_backward(spec(grad_output), input_size)
    grad_input = empty(input_size, grad_output, memory_format)
    if grad_output.numel() == 0:
        return grad_input.zero_()
    shape = _prepare(input_size, grad_output.shape, grad_output.dtype, memory_format)
    _native.adaptive_avg_pool2d_backward(shape, grad_output.contiguous(memory_format=memory_format), grad_input)
    return grad_input


def _avg_backward_fake(grad_output, input_size):
    return empty(input_size, grad_output, _plan_avg_backward(spec(grad_output), input_size))


# unpooling: values to and from the places that indices name ----------------------------------------------------------


def _plan_unpool(input: TensorSpec, indices: TensorSpec, output_size):
    check_unpool2d(input, indices)
    shapes.check_served("max_unpool2d", input)
    size = (*input.size[:2], *output_size)
    shapes.check_fits("output", size, input.dtype.itemsize)
    return size, shapes.memory_format(input)


def _unpool(kernel, input, indices, output_size):
    size, memory_format = _plan_unpool(spec(input), spec(indices), output_size)
    output = empty(size, input, memory_format)
    if input.numel() == 0 or output.numel() == 0:
        return output.zero_()
    shape = _prepare(size, input.shape, input.dtype, memory_format)
    input = input.contiguous(memory_format=memory_format)
    kernel(shape, input, indices.contiguous(memory_format=memory_format), output)
    return output


def _unpool_forward(input, indices, output_size):
    return _unpool(_native.max_unpool2d_forward, input, indices, output_size)


def _unpool_scatter(input, indices, output_size):
    return _unpool(_native.max_unpool2d_scatter, input, indices, output_size)


def _unpool_fake(input, indices, output_size):
    size, memory_format = _plan_unpool(spec(input), spec(indices), output_size)
    return empty(size, input, memory_format)


def _plan_gather(input: TensorSpec, indices: TensorSpec):
    check_unpool2d(TensorSpec((*input.size[:2], *indices.size[2:]), *input[1:]), indices)
    shapes.check_served("max_unpool2d", input)
    return shapes.memory_format(input)


def _gather(input, indices):
    memory_format = _plan_gather(spec(input), spec(indices))
    output = empty(indices.shape, input, memory_format)
    if output.numel() != 0:
        shape = _prepare(input.shape, indices.shape, input.dtype, memory_format)
        input = input.contiguous(memory_format=memory_format)
        _native.max_unpool2d_gather(shape, input, indices.contiguous(memory_format=memory_format), output)
    return output


def _gather_fake(input, indices):
    return empty(indices.shape, input, _plan_gather(spec(input), spec(indices)))


adaptive_max_pool2d_forward = register(
    "adaptive_max_pool2d_forward(Tensor input, SymInt[2] output_size, bool with_indices) -> "
    "(Tensor output, Tensor indices)",
    _max_forward,
    _max_forward_fake,
)
adaptive_avg_pool2d_forward = register(
    "adaptive_avg_pool2d_forward(Tensor input, SymInt[2] output_size) -> Tensor", _avg_forward, _avg_forward_fake
)
adaptive_avg_pool2d_backward = register(
    "adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[4] input_size) -> Tensor",
    _avg_backward,
    _avg_backward_fake,
)
max_unpool2d_forward = register(
    "max_unpool2d_forward(Tensor input, Tensor indices, SymInt[2] output_size) -> Tensor",
    _unpool_forward,
    _unpool_fake,
)
max_unpool2d_scatter = register(
    "max_unpool2d_scatter(Tensor input, Tensor indices, SymInt[2] output_size) -> Tensor",
    _unpool_scatter,
    _unpool_fake,
)
max_unpool2d_gather = register("max_unpool2d_gather(Tensor input, Tensor indices) -> Tensor", _gather, _gather_fake)
