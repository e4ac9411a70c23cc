"""Convolutions over one axis and two, and the convolution fused with its ReLU and max pooling."""

import torch

from cnn_ext import autograd, policy
from cnn_ext._arguments import check_padding_mode, conv_geometry, fused_pool
from cnn_ext.functional.autocast import cast_for_autocast, is_autocast_on
from cnn_ext.functional.overridable import overridable
from cnn_ext.ops.shapes import MOST_FUSED_TAPS, check_conv_tensors, conv_output_size, spec


@overridable
def conv2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation=None,
    padding_mode="zeros",
    packing=None,
):
    """Cross-correlates ``input`` with ``weight`` and adds ``bias``, as :func:`torch.nn.functional.conv2d`.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, float16 or bfloat16 (halves are summed in
            float32 and rounded once).
        weight: [K, C / groups, R, S], of the same dtype and device.
        bias: [K] or None.
        stride, dilation: an int or a pair (height, width), at least 1.
        padding: zeros around the input, which never multiply: an int, a pair, ((top, bottom), (left, right)),
            'valid', 'same', 'same_lower' or 'full'.
        groups: into how many independent convolutions the channels are divided.
        activation: None or 'relu', which is then computed with the convolution: its input is never written, and
            backward reads the output instead.
        padding_mode: what the padding holds: 'zeros', or values of the input: 'reflect', 'replicate' or 'circular', as
            torch.nn.Conv2d has them. On the CPU the input is read through its padding, never copied into a padded one.
        packing: where a layer keeps its packed weight (see :func:`cnn_ext.pack`); it changes no result.

    Returns:
        [N, K, OH, OW] (or without N) with OH = floor((H + top + bottom - dilation * (R - 1) - 1) / stride) + 1;
        channels_last where input or weight is. Without input channels (C = 0) the bias is all there is.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together, with torch's message.
        TypeError, ValueError: an argument of the wrong type; an integer beyond int64.
        NotImplementedError: a dtype or device that no kernel serves.
    """
    given = weight
    if is_autocast_on():
        input, weight, bias = cast_for_autocast(input, weight, bias)
    geometry = conv_geometry("conv2d", input, weight, bias, stride, padding, dilation, groups, axes=2)
    hints = {} if packing is None else _hints(packing, given, weight)
    if activation is None and padding_mode == "zeros" and input.dim() == 4:  # the usual case, sooner
        return autograd.conv2d(input, weight, bias, (*geometry, policy.allowed.winograd), **hints)
    return _conv2d("conv2d", input, weight, bias, geometry, activation, padding_mode, hints)


@overridable
def conv1d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation=None,
    padding_mode="zeros",
    packing=None,
):
    """Cross-correlates ``input`` with ``weight`` and adds ``bias``, as :func:`torch.nn.functional.conv1d`.

    It is the convolution over two axes with height 1; the tensors are looked at so, not copied.

    Args:
        input: [N, C, L] or [C, L]; float32, float64, float16 or bfloat16.
        weight: [K, C / groups, R], of the same dtype and device.
        bias: [K] or None.
        stride, dilation: an int or a list of one, at least 1.
        padding: zeros around the input, which never multiply: an int, a list of one, ((left, right),), 'valid',
            'same', 'same_lower' or 'full'.
        groups, activation, padding_mode, packing: as for :func:`conv2d`.

    Returns:
        [N, K, OL] (or without N) with OL = floor((L + left + right - dilation * (R - 1) - 1) / stride) + 1.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as conv2d.
    """
    given = weight
    input, weight, bias = cast_for_autocast(input, weight, bias)
    geometry = conv_geometry("conv1d", input, weight, bias, stride, padding, dilation, groups, axes=1)
    batched = input if input.dim() == 3 else input.unsqueeze(0)
    conv_output_size(batched.shape, weight.shape, *geometry)
    check_conv_tensors(spec(input), spec(weight), None if bias is None else spec(bias))
    geometry = geometry_of_height_1(geometry)
    hints = _hints(packing, given, weight)
    operands = of_height_1(batched), of_height_1(weight), bias
    output = _conv2d("conv1d", *operands, geometry, activation, padding_mode, hints).squeeze(-2)
    return output if input.dim() == 3 else output.squeeze(0)


def of_height_1(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over one axis as one over two; contiguous, for torch has no channels_last over one axis."""
    return tensor.contiguous().unsqueeze(-2)


def geometry_of_height_1(geometry):
    """The geometry of a convolution over one axis as one over two."""
    (stride,), padding, (dilation,), groups = geometry
    return (1, stride), (0, 0, *padding), (1, dilation), groups


def _hints(packing, given, weight) -> dict:
    """What the operators may make use of: a weight that autocast has cast is another one at every call."""
    return {} if packing is None or weight is not given else {"packing": packing}


def _with_policy(op, geometry, padding_mode):
    """The geometry with what the operators are told beyond it."""
    if padding_mode == "zeros":
        return (*geometry, policy.allowed.winograd)
    check_padding_mode(op, padding_mode)
    return (*geometry, policy.allowed.winograd, padding_mode)


def _conv2d(op, input, weight, bias, geometry, activation, padding_mode, hints):
    geometry = _with_policy(op, geometry, padding_mode)
    if activation is not None:
        if activation != "relu":
            raise ValueError(f"{op}() expected activation to be None or 'relu', but got {activation!r}")
        return _conv2d_relu_max_pool2d(input, weight, bias, geometry, ((1, 1), (1, 1)), hints)
    if input.dim() == 3:
        return autograd.conv2d(input.unsqueeze(0), weight, bias, geometry, **hints).squeeze(0)
    return autograd.conv2d(input, weight, bias, geometry, **hints)


@overridable
def conv2d_relu_max_pool2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    pool_size=2,
    pool_stride=None,
    *,
    padding_mode="zeros",
    packing=None,
):
    """Max pooling of ``relu(conv2d(input, weight, bias, ...))``, without the tensors in between.

    The values are those of the three functions one after the other. For backward it keeps the input, the weight and
    one byte for each pooled output; a pooling window of more than 255 taps and another padding mode than zeros run the
    three functions.

    Args:
        input, weight, bias, stride, padding, dilation, groups, padding_mode, packing: as for :func:`conv2d`.
        pool_size, pool_stride: of the pooling, which is not padded: an int or a pair (height, width); ``pool_stride``
            is ``pool_size`` if omitted.

    Returns:
        [N, K, PH, PW] (or without N) with PH = floor((OH - pool_size) / pool_stride) + 1, OH being conv2d's. Where a
        window's maximum is not above 0 the output is 0 and no gradient passes; else it passes to the first of equal
        maxima. A NaN is above all numbers.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as conv2d and max_pool2d.
    """
    op, given = "conv2d_relu_max_pool2d", weight
    input, weight, bias = cast_for_autocast(input, weight, bias)
    geometry = conv_geometry(op, input, weight, bias, stride, padding, dilation, groups, axes=2)
    geometry = _with_policy(op, geometry, padding_mode)
    pool = fused_pool(op, pool_size, pool_stride)
    return _conv2d_relu_max_pool2d(input, weight, bias, geometry, pool, _hints(packing, given, weight))


def _conv2d_relu_max_pool2d(input, weight, bias, geometry, pool, hints):
    if input.dim() == 3:
        return _conv2d_relu_max_pool2d(input.unsqueeze(0), weight, bias, geometry, pool, hints).squeeze(0)
    (pool_h, pool_w), _ = pool
    maps_padding = len(geometry) > 5
    if maps_padding or pool_h * pool_w > MOST_FUSED_TAPS:
        activated = torch.relu(autograd.conv2d(input, weight, bias, geometry, **hints))
        if pool == ((1, 1), (1, 1)):
            return activated
        return autograd.max_pool2d(activated, (*pool, (0, 0, 0, 0), (1, 1), False), False)[0]
    return autograd.conv2d_relu_max_pool2d(input, weight, bias, geometry, pool, **hints)
