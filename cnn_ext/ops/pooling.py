"""The raw operators of max and average pooling, without autograd: checks, allocation in the layout of the call, kernel.

Max pooling keeps the place of each maximum as its offset within the unclipped window, r * kernel_w + s: one byte up to
256 taps.
"""

import functools

import torch

from cnn_ext import _native
from cnn_ext.ops import shapes
from cnn_ext.ops.library import register
from cnn_ext.ops.results import empty
from cnn_ext.ops.shapes import TensorSpec, spec

_WINDOW = "SymInt[2] kernel_size, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, bool ceil_mode"
_DIVISOR = "bool count_include_pad, int? divisor_override"


def _native_shape(input_size, output_size, window, dtype, memory_format, count_include_pad=True, divisor_override=None):
    """The kernels' description of a checked pooling. The stride of an axis with one output and the dilation of an axis
    with one tap say nothing."""
    kernel_size, stride, padding, dilation, _ = window
    return _native.Pool2dShape(
        batch=input_size[0],
        channels=input_size[1],
        in_h=input_size[2],
        in_w=input_size[3],
        out_h=output_size[2],
        out_w=output_size[3],
        kernel_h=kernel_size[0],
        kernel_w=kernel_size[1],
        stride_h=stride[0] if output_size[2] > 1 else 1,
        stride_w=stride[1] if output_size[3] > 1 else 1,
        pad_top=padding[0],
        pad_bottom=padding[1],
        pad_left=padding[2],
        pad_right=padding[3],
        dilation_h=dilation[0] if kernel_size[0] > 1 else 1,
        dilation_w=dilation[1] if kernel_size[1] > 1 else 1,
        divisor_override=divisor_override or 0,
        count_include_pad=int(count_include_pad),
        dtype=_native.DTYPES[dtype],
        layout=_native.Layout.nhwc if memory_format == torch.channels_last else _native.Layout.nchw,
    )


def _plan_forward(op: str, input: TensorSpec, window):
    output_size = shapes.pool2d_output_size(input.size, *window)
    shapes.check_served(op, input)
    shapes.check_fits("output", output_size, input.dtype.itemsize)
    return output_size, shapes.memory_format(input)


def _plan_backward(op: str, grad_output: TensorSpec, input_size, window):
    shapes.check_size("grad_output", grad_output.size, shapes.pool2d_output_size(input_size, *window))
    shapes.check_served(op, grad_output)
    return shapes.memory_format(grad_output)


def _no_offsets(like: torch.Tensor, kernel_size):
    return torch.empty(0, dtype=shapes.offsets_dtype(kernel_size), device=like.device)


# max pooling, forward: output and offsets [N, C, OH, OW] -------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def prepare_max_forward(input: TensorSpec, window):
    output_size, memory_format = _plan_forward("max_pool2d", input, window)
    return _native_shape(input.size, output_size, window, input.dtype, memory_format), output_size, memory_format


def _check_offset_range(kernel_size) -> None:
    if kernel_size[0] * kernel_size[1] > shapes.INT32_MAX:
        raise RuntimeError(f"kernel_size={list(kernel_size)} has more taps than an int32 offset can number")


def _max_forward(input, kernel_size, stride, padding, dilation, ceil_mode, with_offsets):
    window = kernel_size, stride, padding, dilation, ceil_mode
    shape, output_size, memory_format = prepare_max_forward(spec(input), window)
    output = empty(output_size, input, memory_format)
    offsets = None
    if with_offsets:
        _check_offset_range(kernel_size)
        offsets = empty(output_size, input, memory_format, shapes.offsets_dtype(kernel_size))
    if output.numel() != 0:
        _native.max_pool2d_forward(shape, input.contiguous(memory_format=memory_format), output, offsets)
    return output, _no_offsets(input, kernel_size) if offsets is None else offsets


def _max_forward_fake(input, kernel_size, stride, padding, dilation, ceil_mode, with_offsets):
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    output_size, memory_format = _plan_forward("max_pool2d", spec(input), window)
    output = empty(output_size, input, memory_format)
    if not with_offsets:
        return output, _no_offsets(input, kernel_size)
    return output, empty(output_size, input, memory_format, shapes.offsets_dtype(kernel_size))


# max pooling, backward: grad_input [N, C, H, W] ----------------------------------------------------------------------


def _check_offsets(offsets: TensorSpec, output_size, window, device) -> None:
    shapes.check_size("offsets", offsets.size, output_size)
    wanted = shapes.offsets_dtype(window[0])
    if offsets.dtype != wanted:
        raise RuntimeError(
            f"Expected offsets of dtype {wanted} for kernel_size={list(window[0])}, but got {offsets.dtype}"
        )
    shapes.check_device("offsets", offsets.device, device)


def _plan_max_backward(grad_output: TensorSpec, offsets: TensorSpec, input_size, window):
    _plan_backward("max_pool2d", grad_output, input_size, window)
    _check_offsets(offsets, grad_output.size, window, grad_output.device)
    return shapes.memory_format(grad_output, offsets)


@functools.lru_cache(maxsize=1024)
def prepare_max_backward(grad_output: TensorSpec, offsets: TensorSpec, input_size, window):
    memory_format = _plan_max_backward(grad_output, offsets, input_size, window)
    return _native_shape(input_size, grad_output.size, window, grad_output.dtype, memory_format), memory_format


def _max_backward(grad_output, offsets, input_size, kernel_size, stride, padding, dilation, ceil_mode):
    window = kernel_size, stride, padding, dilation, ceil_mode
    shape, memory_format = prepare_max_backward(spec(grad_output), spec(offsets), input_size, window)
    grad_input = empty(input_size, grad_output, memory_format)
    if grad_input.numel() != 0:
        grad_output = grad_output.contiguous(memory_format=memory_format)
        _native.max_pool2d_backward(shape, grad_output, offsets.contiguous(memory_format=memory_format), grad_input)
    return grad_input


def _max_backward_fake(grad_output, offsets, input_size, kernel_size, stride, padding, dilation, ceil_mode):
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    memory_format = _plan_max_backward(spec(grad_output), spec(offsets), input_size, window)
    return empty(input_size, grad_output, memory_format)


# max pooling, gather: output [N, C, OH, OW], the input at the offsets ------------------------------------------------


def _plan_max_gather(input: TensorSpec, offsets: TensorSpec, window):
    output_size, _ = _plan_forward("max_pool2d", input, window)
    _check_offsets(offsets, output_size, window, input.device)
    return output_size, shapes.memory_format(input, offsets)


@functools.lru_cache(maxsize=1024)
def prepare_max_gather(input: TensorSpec, offsets: TensorSpec, window):
    output_size, memory_format = _plan_max_gather(input, offsets, window)
    return _native_shape(input.size, output_size, window, input.dtype, memory_format), output_size, memory_format


def _max_gather(input, offsets, kernel_size, stride, padding, dilation, ceil_mode):
    window = kernel_size, stride, padding, dilation, ceil_mode
    shape, output_size, memory_format = prepare_max_gather(spec(input), spec(offsets), window)
    output = empty(output_size, input, memory_format)
    if output.numel() != 0:
        input = input.contiguous(memory_format=memory_format)
        _native.max_pool2d_gather(shape, input, offsets.contiguous(memory_format=memory_format), output)
    return output


def _max_gather_fake(input, offsets, kernel_size, stride, padding, dilation, ceil_mode):
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    output_size, memory_format = _plan_max_gather(spec(input), spec(offsets), window)
    return empty(output_size, input, memory_format)


# average pooling -----------------------------------------------------------------------------------------------------


def _check_divisor(divisor_override) -> None:
    if divisor_override == 0:
        raise RuntimeError("divisor must be not zero, but got divisor_override=0")


@functools.lru_cache(maxsize=1024)
def prepare_avg_forward(input: TensorSpec, window, count_include_pad, divisor_override):
    _check_divisor(divisor_override)
    output_size, memory_format = _plan_forward("avg_pool2d", input, window)
    shape = _native_shape(
        input.size, output_size, window, input.dtype, memory_format, count_include_pad, divisor_override
    )
    return shape, output_size, memory_format


def _avg_forward(input, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override):
    window = kernel_size, stride, padding, dilation, ceil_mode
    shape, output_size, memory_format = prepare_avg_forward(spec(input), window, count_include_pad, divisor_override)
    output = empty(output_size, input, memory_format)
    if output.numel() != 0:
        _native.avg_pool2d_forward(shape, input.contiguous(memory_format=memory_format), output)
    return output


def _avg_forward_fake(input, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override):
    _check_divisor(divisor_override)
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    output_size, memory_format = _plan_forward("avg_pool2d", spec(input), window)
    return empty(output_size, input, memory_format)


@functools.lru_cache(maxsize=1024)
def prepare_avg_backward(grad_output: TensorSpec, input_size, window, count_include_pad, divisor_override):
    _check_divisor(divisor_override)
    memory_format = _plan_backward("avg_pool2d", grad_output, input_size, window)
    shape = _native_shape(
        input_size, grad_output.size, window, grad_output.dtype, memory_format, count_include_pad, divisor_override
    )
    return shape, memory_format


def _avg_backward(
    grad_output, input_size, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override
):
    window = kernel_size, stride, padding, dilation, ceil_mode
    shape, memory_format = prepare_avg_backward(
        spec(grad_output), input_size, window, count_include_pad, divisor_override
    )
    grad_input = empty(input_size, grad_output, memory_format)
    if grad_input.numel() != 0:
        _native.avg_pool2d_backward(shape, grad_output.contiguous(memory_format=memory_format), grad_input)
    return grad_input


def _avg_backward_fake(
    grad_output, input_size, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override
):
    _check_divisor(divisor_override)
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    memory_format = _plan_backward("avg_pool2d", spec(grad_output), input_size, window)
    return empty(input_size, grad_output, memory_format)


max_pool2d_forward = register(
    f"max_pool2d_forward(Tensor input, {_WINDOW}, bool with_offsets) -> (Tensor output, Tensor offsets)",
    _max_forward,
    _max_forward_fake,
)
max_pool2d_backward = register(
    f"max_pool2d_backward(Tensor grad_output, Tensor offsets, SymInt[4] input_size, {_WINDOW}) -> Tensor",
    _max_backward,
    _max_backward_fake,
)
max_pool2d_gather = register(
    f"max_pool2d_gather(Tensor input, Tensor offsets, {_WINDOW}) -> Tensor", _max_gather, _max_gather_fake
)
avg_pool2d_forward = register(
    f"avg_pool2d_forward(Tensor input, {_WINDOW}, {_DIVISOR}) -> Tensor", _avg_forward, _avg_forward_fake
)
avg_pool2d_backward = register(
    f"avg_pool2d_backward(Tensor grad_output, SymInt[4] input_size, {_WINDOW}, {_DIVISOR}) -> Tensor",
    _avg_backward,
    _avg_backward_fake,
)
