"""``torch.nn.functional``'s conv2d, max_pool2d and avg_pool2d, computed by this package's kernels, and the convolution
fused with its ReLU and max pooling.

Signatures, defaults, results and exception types are torch's. Beyond torch, conv2d takes ``activation``; ``padding``
may also be ((top, bottom), (left, right)), ``'same'`` at any stride (TensorFlow's and ONNX's SAME_UPPER, which is
torch's at stride 1), ``'same_lower'`` and, for convolutions, ``'full'``; pools may be padded by up to half the dilated
window; avg_pool2d takes ``dilation``.
"""

import torch

from cnn_ext import autograd, policy
from cnn_ext._arguments import check_bool, conv2d_geometry, fused_pool, integer, pool2d_window
from cnn_ext.ops.shapes import MOST_FUSED_TAPS

__all__ = ["avg_pool2d", "conv2d", "conv2d_relu_max_pool2d", "max_pool2d"]


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation=None):
    """Cross-correlates ``input`` with ``weight`` and adds ``bias``, as :func:`torch.nn.functional.conv2d`.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32 or float64 (on CUDA float16 and bfloat16 as well).
        weight: [K, C / groups, R, S], of the same dtype and device.
        bias: [K] or None.
        stride, dilation: an int or a pair (height, width), at least 1.
        padding: zeros around the input, which never multiply: an int, a pair, ((top, bottom), (left, right)),
            'valid', 'same', 'same_lower' or 'full'.
        groups: into how many independent convolutions the channels are divided.
        activation: None or 'relu', which is then computed with the convolution: its input is never written, and
            backward reads the output instead.

    Returns:
        [N, K, OH, OW] (or without N) with OH = floor((H + top + bottom - dilation * (R - 1) - 1) / stride) + 1;
        channels_last where input or weight is. Without input channels (C = 0) the bias is all there is.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together, with torch's message.
        TypeError, ValueError: an argument of the wrong type; an integer beyond int64.
        NotImplementedError: a dtype or device that no kernel serves.
    """
    geometry = conv2d_geometry("conv2d", input, weight, bias, stride, padding, dilation, groups)
    geometry = (*geometry, policy.allowed.winograd)
    if activation is not None:
        if activation != "relu":
            raise ValueError(f"conv2d() expected activation to be None or 'relu', but got {activation!r}")
        return _conv2d_relu_max_pool2d(input, weight, bias, geometry, ((1, 1), (1, 1)))
    if input.dim() == 3:
        return autograd.conv2d(input.unsqueeze(0), weight, bias, geometry).squeeze(0)
    return autograd.conv2d(input, weight, bias, geometry)


def conv2d_relu_max_pool2d(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, pool_size=2, pool_stride=None
):
    """Max pooling of ``relu(conv2d(input, weight, bias, ...))``, without the tensors in between.

    The values are those of the three functions one after the other. For backward it keeps the input, the weight and
    one byte for each pooled output; a CUDA tensor and a pooling window of more than 255 taps run the three functions.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as for :func:`conv2d`.
        pool_size, pool_stride: of the pooling, which is not padded: an int or a pair (height, width); ``pool_stride``
            is ``pool_size`` if omitted.

    Returns:
        [N, K, PH, PW] (or without N) with PH = floor((OH - pool_size) / pool_stride) + 1, OH being conv2d's. Where a
        window's maximum is not above 0 the output is 0 and no gradient passes; else it passes to the first of equal
        maxima. A NaN is above all numbers.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as conv2d and max_pool2d.
    """
    op = "conv2d_relu_max_pool2d"
    geometry = conv2d_geometry(op, input, weight, bias, stride, padding, dilation, groups)
    geometry = (*geometry, policy.allowed.winograd)
    return _conv2d_relu_max_pool2d(input, weight, bias, geometry, fused_pool(op, pool_size, pool_stride))


def _conv2d_relu_max_pool2d(input, weight, bias, geometry, pool):
    if input.dim() == 3:
        return _conv2d_relu_max_pool2d(input.unsqueeze(0), weight, bias, geometry, pool).squeeze(0)
    (pool_h, pool_w), _ = pool
    if input.is_cuda or pool_h * pool_w > MOST_FUSED_TAPS:
        activated = torch.relu(autograd.conv2d(input, weight, bias, geometry))
        return autograd.max_pool2d(activated, (*pool, (0, 0, 0, 0), (1, 1), False), False)[0]
    return autograd.conv2d_relu_max_pool2d(input, weight, bias, geometry, pool)


def _axis_indices(offsets: torch.Tensor, taps: torch.Tensor, axis: int, window, extent: int) -> torch.Tensor:
    """Input positions along one axis; the first window starts ``padding`` before the input."""
    _, stride, padding, dilation, _ = window
    outputs = torch.arange(offsets.shape[2 + axis], device=offsets.device)
    starts = outputs * stride[axis] - padding[2 * axis]
    positions = (starts[:, None] if axis == 0 else starts) + taps * dilation[axis]
    return positions.clamp(0, extent - 1)  # only a window wholly outside of the input has its tap there


def _flat_indices(offsets: torch.Tensor, window, input_size) -> torch.Tensor:
    """torch's indices, h * W + w within a channel, int64 [N, C, OH, OW], from offsets within the windows."""
    offsets = offsets.to(torch.int64)
    kernel_w = window[0][1]
    height, width = input_size[-2:]
    rows = _axis_indices(offsets, offsets // kernel_w, 0, window, height)
    columns = _axis_indices(offsets, offsets % kernel_w, 1, window, width)
    return rows * width + columns


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """Maximum of each window, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: [N, C, H, W] or [C, H, W].
        kernel_size, stride, dilation: an int or a pair (height, width); ``stride`` is ``kernel_size`` if omitted.
        padding: an int, a pair, ((top, bottom), (left, right)), 'valid', 'same' or 'same_lower'; at most half the
            dilated window. Padding is never a maximum.
        ceil_mode: whether windows may run over the end of the padded input, as long as they start before it.
        return_indices: whether to return the place of each maximum as well.

    Returns:
        [N, C, OH, OW], or a pair of it and the int64 indices h * W + w, which have no gradient. The first of equal
        maxima counts; a NaN is above all numbers, and the last NaN of a window counts.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as torch, with its messages.
    """
    check_bool("max_pool2d", "return_indices", return_indices)
    window = pool2d_window("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output, offsets = autograd.max_pool2d(batched, window, return_indices)
    if batched is not input:
        output = output.squeeze(0)
    if not return_indices:
        return output
    indices = _flat_indices(offsets, window, input.shape)
    return output, indices if batched is input else indices.squeeze(0)


def avg_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
    *,
    dilation=1,
):
    """Mean of each window, as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: [N, C, H, W] or [C, H, W].
        kernel_size, stride: an int or a pair (height, width); ``stride`` is ``kernel_size`` if omitted.
        padding: zeros around the input: an int, a pair, ((top, bottom), (left, right)), 'valid', 'same' or
            'same_lower'; at most half the dilated window.
        ceil_mode: whether windows may run over the end of the padded input; what lies beyond the padding never counts.
        count_include_pad: whether the divisor counts taps on the padding.
        divisor_override: a divisor in place of the number of taps, not 0.
        dilation: distance of the taps (beyond torch).

    Returns:
        [N, C, OH, OW]; a window without taps inside the input gives 0.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as torch, with its messages.
    """
    check_bool("avg_pool2d", "count_include_pad", count_include_pad)
    window = pool2d_window("avg_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    if divisor_override is not None:
        divisor_override = integer("avg_pool2d", "divisor_override", divisor_override)
    divisor = (count_include_pad, divisor_override)
    if input.dim() == 4:
        return autograd.avg_pool2d(input, window, divisor)
    return autograd.avg_pool2d(input.unsqueeze(0), window, divisor).squeeze(0)
