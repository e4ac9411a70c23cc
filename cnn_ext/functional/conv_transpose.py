"""Transposed convolutions over one axis and two."""

from cnn_ext import autograd, policy
from cnn_ext._arguments import conv_transpose_geometry
from cnn_ext.functional.autocast import cast_for_autocast
from cnn_ext.functional.conv import geometry_of_height_1, of_height_1
from cnn_ext.functional.overridable import overridable


@overridable
def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """The transposed convolution, as :func:`torch.nn.functional.conv_transpose2d`: the gradient of conv2d's input.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, float16 or bfloat16.
        weight: [C, K / groups, R, S], of the same dtype and device.
        bias: [K] or None.
        stride, dilation: an int or a pair (height, width), at least 1.
        padding: what is left out at the sides of the result: an int, a pair, ((top, bottom), (left, right)), 'valid',
            or 'same' and 'same_lower', which give ``stride`` outputs for each input (where the odd one of what is left
            out is behind, or before).
        output_padding: what the result has more behind: an int or a pair, smaller than stride or dilation.
        groups: into how many independent convolutions the channels are divided.

    Returns:
        [N, K, OH, OW] (or without N) with OH = (H - 1) * stride - top - bottom + dilation * (R - 1) + output_padding
        + 1; channels_last where input or weight is.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together, with torch's message.
        TypeError, ValueError: an argument of the wrong type; an integer beyond int64.
        NotImplementedError: a dtype or device that no kernel serves.
    """
    input, weight, bias = cast_for_autocast(input, weight, bias)
    geometry, extents = conv_transpose_geometry(
        "conv_transpose2d", input, weight, bias, stride, padding, output_padding, groups, dilation, axes=2
    )
    if input.dim() == 3:
        return _conv_transpose2d(input.unsqueeze(0), weight, bias, extents, geometry).squeeze(0)
    return _conv_transpose2d(input, weight, bias, extents, geometry)


@overridable
def conv_transpose1d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """The transposed convolution over one axis, as :func:`torch.nn.functional.conv_transpose1d`.

    Args:
        input: [N, C, L] or [C, L].
        weight: [C, K / groups, R].
        bias: [K] or None.
        stride, padding, output_padding, groups, dilation: as for :func:`conv_transpose2d`, with an int or a list of
            one, and ((left, right),).

    Returns:
        [N, K, OL] (or without N).

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as conv_transpose2d.
    """
    input, weight, bias = cast_for_autocast(input, weight, bias)
    geometry, extents = conv_transpose_geometry(
        "conv_transpose1d", input, weight, bias, stride, padding, output_padding, groups, dilation, axes=1
    )
    batched = of_height_1(input if input.dim() == 3 else input.unsqueeze(0))
    output = _conv_transpose2d(batched, of_height_1(weight), bias, [1, *extents], geometry_of_height_1(geometry))
    output = output.squeeze(-2)
    return output if input.dim() == 3 else output.squeeze(0)


def _conv_transpose2d(input, weight, bias, extents, geometry):
    groups = geometry[-1]
    output_size = (input.shape[0], weight.shape[1] * groups, *extents)
    return autograd.conv_transpose2d(input, weight, bias, output_size, (*geometry, policy.allowed.winograd))
