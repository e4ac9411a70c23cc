"""The raw operators of the convolution: forward and the three gradients, without autograd.

Each checks its arguments, allocates its result in the layout of the call (channels_last as soon as one of its tensors
is) and runs a kernel. What follows from sizes, strides and arguments alone is computed once and kept in bounded caches,
for the call has to be cheap.
"""

import functools

import torch

from cnn_ext import _native
from cnn_ext.ops import shapes
from cnn_ext.ops.library import register
from cnn_ext.ops.padding import NO_PADDING, fold, pad, padded_size, pads_a_copy
from cnn_ext.ops.results import empty
from cnn_ext.ops.shapes import TensorSpec, spec
from cnn_ext.ops.taps import nearest_taps

GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups"
POLICY = "bool allow_winograd=False"
_PADDING_MODE = 'str padding_mode="zeros"'


def _layout(memory_format: torch.memory_format):
    return _native.Layout.nhwc if memory_format == torch.channels_last else _native.Layout.nchw


def native_shape(
    input_size,
    weight_size,
    output_size,
    geometry,
    dtype,
    memory_format,
    weight_format,
    allow_winograd=False,
    padding_mode="zeros",
):
    """The kernels' description of a checked convolution.

    The stride of an axis with one output and the dilation of an axis with one tap say nothing; as 1 they cannot
    overflow either.
    """
    stride, padding, dilation, groups = geometry
    stride = [step if outputs > 1 else 1 for step, outputs in zip(stride, output_size[2:], strict=True)]
    dilation = [step if taps > 1 else 1 for step, taps in zip(dilation, weight_size[2:], strict=True)]
    before = padding[::2]
    if padding_mode == "zeros":
        axes = zip(input_size[2:], output_size[2:], weight_size[2:], stride, before, dilation, strict=True)
        before, dilation = zip(*(nearest_taps(*axis) for axis in axes), strict=True)
    return _native.Conv2dShape(
        batch=input_size[0],
        in_channels=input_size[1],
        in_h=input_size[2],
        in_w=input_size[3],
        out_channels=output_size[1],
        out_h=output_size[2],
        out_w=output_size[3],
        kernel_h=weight_size[2],
        kernel_w=weight_size[3],
        stride_h=stride[0],
        stride_w=stride[1],
        pad_top=before[0],
        pad_left=before[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        groups=groups,
        dtype=_native.DTYPES[dtype],
        layout=_layout(memory_format),
        weight_layout=_layout(weight_format),
        allow_winograd=allow_winograd,
        padding_mode=_native.PADDING_MODES[padding_mode],
        allow_tf32=False,  # the switch is read when a CUDA kernel is called
    )


def _check_padding_mode(mode: str, input_size, padding) -> None:
    """Refuses a padding that the mode cannot fill from an input of this size."""
    if mode == "zeros":
        return
    for axis, size in enumerate(input_size[2:]):
        most = max(padding[2 * axis : 2 * axis + 2])
        if mode == "reflect" and most >= size:
            raise RuntimeError(
                "Padding size should be less than the corresponding input dimension, but got: padding "
                f"{list(padding)} at dimension {axis + 2} of input {list(input_size)}"
            )
        if mode == "circular" and most > size:
            raise RuntimeError(
                f"Padding value causes wrapping around more than once: got padding {list(padding)} for input "
                f"{list(input_size)}"
            )


# forward: output [N, K, OH, OW] --------------------------------------------------------------------------------------


def _plan_forward(input: TensorSpec, weight: TensorSpec, bias: TensorSpec | None, geometry):
    output_size = shapes.conv2d_output_size(input.size, weight.size, *geometry)
    shapes.check_conv_tensors(input, weight, bias)
    shapes.check_fits("output", output_size, input.dtype.itemsize)
    return output_size, shapes.memory_format(input, weight)


@functools.lru_cache(maxsize=1024)
def prepare_forward(
    input: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None,
    geometry,
    allow_winograd: bool = False,
    padding_mode: str = "zeros",
):
    """The checked call: kernel shape, output size, layouts, whether there is anything to compute, and whether all
    tensors lie as the kernel reads them."""
    output_size, memory_format = _plan_forward(input, weight, bias, geometry)
    _check_padding_mode(padding_mode, input.size, geometry[1])
    has_terms = 0 not in (*output_size, input.size[1])
    weight_format = shapes.memory_format(weight)
    shape = native_shape(
        input.size,
        weight.size,
        output_size,
        geometry,
        input.dtype,
        memory_format,
        weight_format,
        allow_winograd,
        padding_mode,
    )
    is_dense = shapes.is_dense(input, memory_format) and shapes.is_dense(weight, weight_format)
    is_dense = is_dense and (bias is None or bias.stride[0] == 1)
    return shape, output_size, memory_format, weight_format, has_terms, is_dense


def _forward(
    input, weight, bias, stride, padding, dilation, groups, allow_winograd=False, padding_mode="zeros", packing=None
):
    packed = None if packing is None else packing.packed_weight(weight)
    geometry, bias_spec = (stride, padding, dilation, groups), None if bias is None else spec(bias)
    shape, output_size, memory_format, weight_format, has_terms, is_dense = prepare_forward(
        spec(input), spec(weight), bias_spec, geometry, allow_winograd, padding_mode
    )
    if padding_mode != "zeros" and pads_a_copy(padding_mode, input):
        input = pad(input, padding, padding_mode, memory_format)
        return _forward(input, weight, bias, stride, NO_PADDING, dilation, groups)
    output = empty(output_size, input, memory_format)
    if not has_terms:  # the bias is all there is
        return output.zero_() if bias is None else output.copy_(bias.view(1, -1, 1, 1))
    if not is_dense:
        input = input.contiguous(memory_format=memory_format)
        weight = weight.contiguous(memory_format=weight_format)
        bias = None if bias is None else bias.contiguous()
    if packed is None:
        _native.conv2d_forward(shape, input, weight, bias, output)
    else:
        _native.conv2d_forward_packed(shape, input, weight, bias, output, packed)
    return output


def _forward_fake(input, weight, bias, stride, padding, dilation, groups, allow_winograd=False, padding_mode="zeros"):
    _check_padding_mode(padding_mode, input.shape, padding)
    output_size, memory_format = _plan_forward(
        spec(input), spec(weight), None if bias is None else spec(bias), (stride, padding, dilation, groups)
    )
    return empty(output_size, input, memory_format)


# backward_input: grad_input [N, C, H, W] -----------------------------------------------------------------------------


def plan_backward_input(grad_output: TensorSpec, weight: TensorSpec, input_size, geometry):
    shapes.check_size("grad_output", grad_output.size, shapes.conv2d_output_size(input_size, weight.size, *geometry))
    shapes.check_same_type(grad_output, weight, ("grad_output", "weight"))
    shapes.check_served("conv2d", grad_output)
    return shapes.memory_format(grad_output, weight)


@functools.lru_cache(maxsize=1024)
def prepare_backward_input(
    grad_output: TensorSpec,
    weight: TensorSpec,
    input_size,
    geometry,
    allow_winograd: bool = False,
    padding_mode: str = "zeros",
):
    memory_format = plan_backward_input(grad_output, weight, input_size, geometry)
    _check_padding_mode(padding_mode, input_size, geometry[1])
    weight_format = shapes.memory_format(weight)
    shape = native_shape(
        input_size,
        weight.size,
        grad_output.size,
        geometry,
        weight.dtype,
        memory_format,
        weight_format,
        allow_winograd,
        padding_mode,
    )
    return shape, memory_format, weight_format


def _backward_input(
    grad_output, weight, input_size, stride, padding, dilation, groups, allow_winograd=False, padding_mode="zeros"
):
    geometry = (stride, padding, dilation, groups)
    shape, memory_format, weight_format = prepare_backward_input(
        spec(grad_output), spec(weight), input_size, geometry, allow_winograd, padding_mode
    )
    if pads_a_copy(padding_mode, grad_output):
        size = padded_size(input_size, padding)
        grad_padded = _backward_input(grad_output, weight, size, stride, NO_PADDING, dilation, groups)
        return fold(grad_padded, padding, padding_mode, memory_format)
    grad_input = empty(input_size, grad_output, memory_format)
    if grad_input.numel() == 0:
        return grad_input
    grad_output = grad_output.contiguous(memory_format=memory_format)
    weight = weight.contiguous(memory_format=weight_format)
    _native.conv2d_backward_input(shape, grad_output, weight, grad_input)
    return grad_input


def _backward_input_fake(
    grad_output, weight, input_size, stride, padding, dilation, groups, allow_winograd=False, padding_mode="zeros"
):
    _check_padding_mode(padding_mode, input_size, padding)
    geometry = (stride, padding, dilation, groups)
    memory_format = plan_backward_input(spec(grad_output), spec(weight), input_size, geometry)
    return empty(input_size, grad_output, memory_format)


# backward_weight: grad_weight [K, C / groups, R, S] ------------------------------------------------------------------


def _plan_backward_weight(grad_output: TensorSpec, input: TensorSpec, weight_size, geometry):
    shapes.check_size("grad_output", grad_output.size, shapes.conv2d_output_size(input.size, weight_size, *geometry))
    shapes.check_same_type(grad_output, input, ("grad_output", "input"))
    shapes.check_served("conv2d", grad_output)
    return shapes.memory_format(grad_output, input)


def weight_format_of(channels_last_weight: bool) -> torch.memory_format:
    return torch.channels_last if channels_last_weight else torch.contiguous_format


@functools.lru_cache(maxsize=1024)
def prepare_backward_weight(
    grad_output: TensorSpec,
    input: TensorSpec,
    weight_size,
    geometry,
    channels_last_weight,
    allow_winograd=False,
    padding_mode="zeros",
):
    memory_format = _plan_backward_weight(grad_output, input, weight_size, geometry)
    _check_padding_mode(padding_mode, input.size, geometry[1])
    weight_format = weight_format_of(channels_last_weight)
    shape = native_shape(
        input.size,
        weight_size,
        grad_output.size,
        geometry,
        input.dtype,
        memory_format,
        weight_format,
        allow_winograd,
        padding_mode,
    )
    return shape, memory_format, weight_format


def _backward_weight(
    grad_output,
    input,
    weight_size,
    stride,
    padding,
    dilation,
    groups,
    channels_last_weight,
    allow_winograd=False,
    padding_mode="zeros",
):
    geometry = (stride, padding, dilation, groups)
    shape, memory_format, weight_format = prepare_backward_weight(
        spec(grad_output), spec(input), weight_size, geometry, channels_last_weight, allow_winograd, padding_mode
    )
    if pads_a_copy(padding_mode, input):
        input = pad(input, padding, padding_mode, memory_format)
        return _backward_weight(
            grad_output, input, weight_size, stride, NO_PADDING, dilation, groups, channels_last_weight
        )
    grad_weight = empty(weight_size, input, weight_format)
    if grad_weight.numel() == 0:
        return grad_weight
    if grad_output.numel() == 0:  # an empty batch adds up nothing
        return grad_weight.zero_()
    grad_output = grad_output.contiguous(memory_format=memory_format)
    _native.conv2d_backward_weight(shape, grad_output, input.contiguous(memory_format=memory_format), grad_weight)
    return grad_weight


def _backward_weight_fake(
    grad_output,
    input,
    weight_size,
    stride,
    padding,
    dilation,
    groups,
    channels_last_weight,
    allow_winograd=False,
    padding_mode="zeros",
):
    _check_padding_mode(padding_mode, input.shape, padding)
    _plan_backward_weight(spec(grad_output), spec(input), weight_size, (stride, padding, dilation, groups))
    weight_format = weight_format_of(channels_last_weight)
    return empty(weight_size, input, weight_format)


# backward_bias: grad_bias [K] ----------------------------------------------------------------------------------------


def _plan_backward_bias(grad_output: TensorSpec):
    if len(grad_output.size) != 4:
        raise RuntimeError(f"Expected 4D grad_output, but got grad_output of size: {list(grad_output.size)}")
    shapes.check_served("conv2d", grad_output)
    return shapes.memory_format(grad_output)


@functools.lru_cache(maxsize=1024)
def prepare_backward_bias(grad_output: TensorSpec):
    """The bias gradient sees the output alone: a 1x1 convolution of one channel has it."""
    memory_format = _plan_backward_bias(grad_output)
    batch, out_channels, out_h, out_w = grad_output.size
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    return memory_format, native_shape(
        (batch, 1, out_h, out_w),
        (out_channels, 1, 1, 1),
        grad_output.size,
        geometry,
        grad_output.dtype,
        memory_format,
        torch.contiguous_format,
    )


def _backward_bias(grad_output):
    memory_format, shape = prepare_backward_bias(spec(grad_output))
    grad_bias = torch.empty(grad_output.shape[1], dtype=grad_output.dtype, device=grad_output.device)
    if grad_output.numel() == 0:
        return grad_bias.zero_()
    _native.conv2d_backward_bias(shape, grad_output.contiguous(memory_format=memory_format), grad_bias)
    return grad_bias


def _backward_bias_fake(grad_output):
    _plan_backward_bias(spec(grad_output))
    return torch.empty(grad_output.shape[1], dtype=grad_output.dtype, device=grad_output.device)


conv2d_forward = register(
    f"conv2d_forward(Tensor input, Tensor weight, Tensor? bias, {GEOMETRY}, {POLICY}, {_PADDING_MODE}) -> Tensor",
    _forward,
    _forward_fake,
)
conv2d_backward_input = register(
    f"conv2d_backward_input(Tensor grad_output, Tensor weight, SymInt[4] input_size, {GEOMETRY}, {POLICY}, "
    f"{_PADDING_MODE}) -> Tensor",
    _backward_input,
    _backward_input_fake,
)
conv2d_backward_weight = register(
    f"conv2d_backward_weight(Tensor grad_output, Tensor input, SymInt[4] weight_size, {GEOMETRY}, "
    f"bool channels_last_weight, {POLICY}, {_PADDING_MODE}) -> Tensor",
    _backward_weight,
    _backward_weight_fake,
)
conv2d_backward_bias = register(
    "conv2d_backward_bias(Tensor grad_output) -> Tensor", _backward_bias, _backward_bias_fake
)
