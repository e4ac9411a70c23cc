"""The raw operators of the convolution fused with its ReLU and max pooling, without autograd.

``pool`` is (pool_size, pool_stride); ((1, 1), (1, 1)) is the ReLU alone. What backward has to know of forward is one
tensor, the mask: with pooling the offsets (uint8, of the output's size; 255 where no gradient passes), without it the
output.
"""

import functools

import torch

from cnn_ext import _native
from cnn_ext.ops import shapes
from cnn_ext.ops.conv2d import GEOMETRY, POLICY, native_shape, weight_format_of
from cnn_ext.ops.library import register
from cnn_ext.ops.results import empty
from cnn_ext.ops.shapes import TensorSpec, spec

_POOL = "SymInt[2] pool_size, SymInt[2] pool_stride"
_RELU_ALONE = ((1, 1), (1, 1))


def _native_shape(conv, pool, output_size):
    (pool_h, pool_w), (pool_stride_h, pool_stride_w) = pool
    return _native.Conv2dReluPoolShape(
        conv=conv,
        pool_h=pool_h,
        pool_w=pool_w,
        pool_stride_h=pool_stride_h,
        pool_stride_w=pool_stride_w,
        pooled_h=output_size[2],
        pooled_w=output_size[3],
    )


def has_pooling(pool) -> bool:
    """Whether there is more than the ReLU."""
    return pool != _RELU_ALONE


def _mask_dtype(pool, dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if has_pooling(pool) else dtype


def _check_backward(grad_output: TensorSpec, mask: TensorSpec, output_size, pool) -> None:
    """What the three gradients check alike."""
    shapes.check_served("conv2d_relu_max_pool2d", grad_output)
    shapes.check_size("grad_output", grad_output.size, output_size)
    shapes.check_size("mask", mask.size, output_size)
    wanted = _mask_dtype(pool, grad_output.dtype)
    if mask.dtype != wanted:
        raise RuntimeError(f"Expected mask of dtype {wanted} for pool={pool}, but got {mask.dtype}")
    shapes.check_device("mask", mask.device, grad_output.device)


def _no_offsets(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=like.device)


# forward: output [N, K, PH, PW], offsets of the same size if asked for ------------------------------------------------


def _plan_forward(input: TensorSpec, weight: TensorSpec, bias: TensorSpec | None, geometry, pool):
    output_size = shapes.conv2d_relu_max_pool2d_output_size(input.size, weight.size, geometry, pool)
    shapes.check_conv_tensors(input, weight, bias)
    shapes.check_fits("output", output_size, input.dtype.itemsize)
    return output_size, shapes.memory_format(input, weight)


@functools.lru_cache(maxsize=1024)
def prepare_forward(
    input: TensorSpec, weight: TensorSpec, bias: TensorSpec | None, geometry, pool, allow_winograd: bool = False
):
    output_size, memory_format = _plan_forward(input, weight, bias, geometry, pool)
    weight_format = shapes.memory_format(weight)
    conv_size = shapes.conv2d_output_size(input.size, weight.size, *geometry)
    conv = native_shape(
        input.size, weight.size, conv_size, geometry, input.dtype, memory_format, weight_format, allow_winograd
    )
    return _native_shape(conv, pool, output_size), output_size, memory_format, weight_format


def _forward(
    input,
    weight,
    bias,
    stride,
    padding,
    dilation,
    groups,
    pool_size,
    pool_stride,
    with_offsets,
    allow_winograd=False,
    packing=None,
):
    packed = None if packing is None or with_offsets else packing.packed_weight(weight)
    pool = (pool_size, pool_stride)
    shape, output_size, memory_format, weight_format = prepare_forward(
        spec(input),
        spec(weight),
        None if bias is None else spec(bias),
        (stride, padding, dilation, groups),
        pool,
        allow_winograd,
    )
    output = empty(output_size, input, memory_format)
    offsets = None
    if with_offsets and has_pooling(pool):
        offsets = empty(output_size, input, memory_format, torch.uint8)
    if output.numel() != 0:
        input = input.contiguous(memory_format=memory_format)
        weight = weight.contiguous(memory_format=weight_format)
        bias = None if bias is None else bias.contiguous()
        if packed is None:
            _native.conv2d_relu_max_pool2d_forward(shape, input, weight, bias, output, offsets)
        else:
            _native.conv2d_relu_max_pool2d_forward_packed(shape, input, weight, bias, output, packed)
    return output, _no_offsets(input) if offsets is None else offsets


def _forward_fake(
    input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, with_offsets, allow_winograd=False
):
    pool = (pool_size, pool_stride)
    output_size, memory_format = _plan_forward(
        spec(input), spec(weight), None if bias is None else spec(bias), (stride, padding, dilation, groups), pool
    )
    output = empty(output_size, input, memory_format)
    if with_offsets and has_pooling(pool):
        return output, torch.empty_like(output, dtype=torch.uint8)
    return output, _no_offsets(input)


# backward_input: grad_input [N, C, H, W] -----------------------------------------------------------------------------


def _plan_backward_input(grad_output: TensorSpec, mask: TensorSpec, weight: TensorSpec, input_size, geometry, pool):
    output_size = shapes.conv2d_relu_max_pool2d_output_size(input_size, weight.size, geometry, pool)
    _check_backward(grad_output, mask, output_size, pool)
    shapes.check_same_type(grad_output, weight, ("grad_output", "weight"))
    return shapes.memory_format(grad_output, weight)


@functools.lru_cache(maxsize=1024)
def prepare_backward_input(
    grad_output: TensorSpec,
    mask: TensorSpec,
    weight: TensorSpec,
    input_size,
    geometry,
    pool,
    allow_winograd: bool = False,
):
    memory_format = _plan_backward_input(grad_output, mask, weight, input_size, geometry, pool)
    weight_format = shapes.memory_format(weight)
    conv_size = shapes.conv2d_output_size(input_size, weight.size, *geometry)
    conv = native_shape(
        input_size, weight.size, conv_size, geometry, weight.dtype, memory_format, weight_format, allow_winograd
    )
    return _native_shape(conv, pool, grad_output.size), memory_format, weight_format


def _backward_input(
    grad_output,
    mask,
    weight,
    input_size,
    stride,
    padding,
    dilation,
    groups,
    pool_size,
    pool_stride,
    allow_winograd=False,
):
    shape, memory_format, weight_format = prepare_backward_input(
        spec(grad_output),
        spec(mask),
        spec(weight),
        input_size,
        (stride, padding, dilation, groups),
        (pool_size, pool_stride),
        allow_winograd,
    )
    grad_input = empty(input_size, grad_output, memory_format)
    if grad_input.numel() != 0:
        grad_output = grad_output.contiguous(memory_format=memory_format)
        mask = mask.contiguous(memory_format=memory_format)
        weight = weight.contiguous(memory_format=weight_format)
        _native.conv2d_relu_max_pool2d_backward_input(shape, grad_output, mask, weight, grad_input)
    return grad_input


def _backward_input_fake(
    grad_output,
    mask,
    weight,
    input_size,
    stride,
    padding,
    dilation,
    groups,
    pool_size,
    pool_stride,
    allow_winograd=False,
):
    geometry, pool = (stride, padding, dilation, groups), (pool_size, pool_stride)
    memory_format = _plan_backward_input(spec(grad_output), spec(mask), spec(weight), input_size, geometry, pool)
    return empty(input_size, grad_output, memory_format)


# backward_weight: grad_weight [K, C / groups, R, S] ------------------------------------------------------------------


def _plan_backward_weight(grad_output: TensorSpec, mask: TensorSpec, input: TensorSpec, weight_size, geometry, pool):
    output_size = shapes.conv2d_relu_max_pool2d_output_size(input.size, weight_size, geometry, pool)
    _check_backward(grad_output, mask, output_size, pool)
    shapes.check_same_type(grad_output, input, ("grad_output", "input"))
    return shapes.memory_format(grad_output, input)


@functools.lru_cache(maxsize=1024)
def prepare_backward_weight(
    grad_output: TensorSpec,
    mask: TensorSpec,
    input: TensorSpec,
    weight_size,
    geometry,
    pool,
    channels_last_weight,
    allow_winograd: bool = False,
):
    memory_format = _plan_backward_weight(grad_output, mask, input, weight_size, geometry, pool)
    weight_format = weight_format_of(channels_last_weight)
    conv_size = shapes.conv2d_output_size(input.size, weight_size, *geometry)
    conv = native_shape(
        input.size, weight_size, conv_size, geometry, input.dtype, memory_format, weight_format, allow_winograd
    )
    return _native_shape(conv, pool, grad_output.size), memory_format, weight_format


def _backward_weight(
    grad_output,
    mask,
    input,
    weight_size,
    stride,
    padding,
    dilation,
    groups,
    pool_size,
    pool_stride,
    channels_last_weight,
    allow_winograd=False,
):
    shape, memory_format, weight_format = prepare_backward_weight(
        spec(grad_output),
        spec(mask),
        spec(input),
        weight_size,
        (stride, padding, dilation, groups),
        (pool_size, pool_stride),
        channels_last_weight,
        allow_winograd,
    )
    grad_weight = empty(weight_size, input, weight_format)
    if grad_weight.numel() == 0:
        return grad_weight
    if grad_output.numel() == 0:  # an empty batch adds up nothing
        return grad_weight.zero_()
    grad_output = grad_output.contiguous(memory_format=memory_format)
    mask = mask.contiguous(memory_format=memory_format)
    input = input.contiguous(memory_format=memory_format)
    _native.conv2d_relu_max_pool2d_backward_weight(shape, grad_output, mask, input, grad_weight)
    return grad_weight


def _backward_weight_fake(
    grad_output,
    mask,
    input,
    weight_size,
    stride,
    padding,
    dilation,
    groups,
    pool_size,
    pool_stride,
    channels_last_weight,
    allow_winograd=False,
):
    geometry, pool = (stride, padding, dilation, groups), (pool_size, pool_stride)
    _plan_backward_weight(spec(grad_output), spec(mask), spec(input), weight_size, geometry, pool)
    return empty(weight_size, input, weight_format_of(channels_last_weight))


# backward_bias: grad_bias [K] ----------------------------------------------------------------------------------------


def _plan_backward_bias(grad_output: TensorSpec, mask: TensorSpec, pool):
    if len(grad_output.size) != 4:
        raise RuntimeError(f"Expected 4D grad_output, but got grad_output of size: {list(grad_output.size)}")
    _check_backward(grad_output, mask, grad_output.size, pool)
    return shapes.memory_format(grad_output)


@functools.lru_cache(maxsize=1024)
def prepare_backward_bias(grad_output: TensorSpec, mask: TensorSpec, pool):
    """The bias gradient sees the pooled output alone: a 1x1 convolution of one channel, as large as the windows reach,
    has it."""
    memory_format = _plan_backward_bias(grad_output, mask, pool)
    batch, out_channels, *pooled = grad_output.size
    size, stride = pool
    out_h, out_w = ((pooled[axis] - 1) * stride[axis] + size[axis] for axis in (0, 1))
    conv = native_shape(
        (batch, 1, out_h, out_w),
        (out_channels, 1, 1, 1),
        (batch, out_channels, out_h, out_w),
        ((1, 1), (0, 0, 0, 0), (1, 1), 1),
        grad_output.dtype,
        memory_format,
        torch.contiguous_format,
    )
    return _native_shape(conv, pool, grad_output.size), memory_format


def _backward_bias(grad_output, mask, pool_size, pool_stride):
    shape, memory_format = prepare_backward_bias(spec(grad_output), spec(mask), (pool_size, pool_stride))
    grad_bias = torch.empty(grad_output.shape[1], dtype=grad_output.dtype, device=grad_output.device)
    if grad_output.numel() == 0:
        return grad_bias.zero_()
    grad_output = grad_output.contiguous(memory_format=memory_format)
    mask = mask.contiguous(memory_format=memory_format)
    _native.conv2d_relu_max_pool2d_backward_bias(shape, grad_output, mask, grad_bias)
    return grad_bias


def _backward_bias_fake(grad_output, mask, pool_size, pool_stride):
    _plan_backward_bias(spec(grad_output), spec(mask), (pool_size, pool_stride))
    return torch.empty(grad_output.shape[1], dtype=grad_output.dtype, device=grad_output.device)


conv2d_relu_max_pool2d_forward = register(
    f"conv2d_relu_max_pool2d_forward(Tensor input, Tensor weight, Tensor? bias, {GEOMETRY}, {_POOL}, "
    f"bool with_offsets, {POLICY}) -> (Tensor output, Tensor offsets)",
    _forward,
    _forward_fake,
)
conv2d_relu_max_pool2d_backward_input = register(
    "conv2d_relu_max_pool2d_backward_input(Tensor grad_output, Tensor mask, Tensor weight, SymInt[4] input_size, "
    f"{GEOMETRY}, {_POOL}, {POLICY}) -> Tensor",
    _backward_input,
    _backward_input_fake,
)
conv2d_relu_max_pool2d_backward_weight = register(
    "conv2d_relu_max_pool2d_backward_weight(Tensor grad_output, Tensor mask, Tensor input, SymInt[4] weight_size, "
    f"{GEOMETRY}, {_POOL}, bool channels_last_weight, {POLICY}) -> Tensor",
    _backward_weight,
    _backward_weight_fake,
)
conv2d_relu_max_pool2d_backward_bias = register(
    f"conv2d_relu_max_pool2d_backward_bias(Tensor grad_output, Tensor mask, {_POOL}) -> Tensor",
    _backward_bias,
    _backward_bias_fake,
)
