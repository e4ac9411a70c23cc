"""Max and average pooling over one axis and two."""

import torch

from cnn_ext import autograd
from cnn_ext._arguments import avg_pool1d_window, check_bool, integer, max_pool1d_window, pool2d_window
from cnn_ext.functional.overridable import overridable


def _axis_indices(offsets: torch.Tensor, taps: torch.Tensor, axis: int, window, extent: int) -> torch.Tensor:
    """Input positions along one axis; the first window starts ``padding`` before the input."""
    _, stride, padding, dilation, _ = window
    outputs = torch.arange(offsets.shape[2 + axis], device=offsets.device)
    starts = outputs * stride[axis] - padding[2 * axis]
    positions = (starts[:, None] if axis == 0 else starts) + taps * dilation[axis]
    return positions.clamp(0, extent - 1)  # only a window wholly outside of the input has its tap there


def _flat_indices(offsets: torch.Tensor, window, input_size) -> torch.Tensor:
    """torch's indices, h * W + w within a channel, int64 [N, C, OH, OW], from offsets within the windows."""
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError("cnn_ext does not export return_indices to ONNX")
    offsets = offsets.to(torch.int64)
    kernel_w = window[0][1]
    height, width = input_size[-2:]
    rows = _axis_indices(offsets, offsets // kernel_w, 0, window, height)
    columns = _axis_indices(offsets, offsets % kernel_w, 1, window, width)
    return rows * width + columns


@overridable
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
    return _max_pool2d(input, window, return_indices, added=() if input.dim() == 4 else (0,))


@overridable
def max_pool1d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """Maximum of each window, as :func:`torch.nn.functional.max_pool1d`.

    Args:
        input: [N, C, L] or [C, L].
        kernel_size, stride, dilation: an int or a list of one; ``stride`` is ``kernel_size`` if omitted.
        padding: an int, a list of one, ((left, right),), 'valid', 'same' or 'same_lower'; at most half the dilated
            window.
        ceil_mode, return_indices: as for :func:`max_pool2d`; an index is the place along L.

    Returns:
        [N, C, OL], or a pair of it and the int64 indices.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as torch, with its messages.
    """
    check_bool("max_pool1d", "return_indices", return_indices)
    window = max_pool1d_window(input, kernel_size, stride, padding, dilation, ceil_mode)
    return _max_pool2d(input, window, return_indices, added=(-2,) if input.dim() == 3 else (-2, 0))


def _max_pool2d(input, window, return_indices, added):
    """The maxima, or the pair of them and their indices; ``added`` axes are given to the input and taken again."""
    for axis in added:
        input = input.unsqueeze(axis)
    results = max_pool2d_of(input, window, return_indices)
    for axis in reversed(added):
        results = [result.squeeze(axis) for result in results]
    return tuple(results) if return_indices else results[0]


def max_pool2d_of(input, window, return_indices):
    """[maxima] of a batch, or [maxima, indices]."""
    output, offsets = autograd.max_pool2d(input, window, return_indices)
    return [output, _flat_indices(offsets, window, input.shape)] if return_indices else [output]


@overridable
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


@overridable
def avg_pool1d(input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, *, dilation=1):
    """Mean of each window, as :func:`torch.nn.functional.avg_pool1d`.

    Args:
        input: [N, C, L] or [C, L].
        kernel_size, stride, dilation: an int or a list of one; ``stride`` is ``kernel_size`` if omitted, ``dilation``
            is beyond torch.
        padding: an int, a list of one, ((left, right),), 'valid', 'same' or 'same_lower'; at most half the dilated
            window.
        ceil_mode, count_include_pad: as for :func:`avg_pool2d`.

    Returns:
        [N, C, OL]; a window without taps inside the input gives 0.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as torch, with its messages.
    """
    check_bool("avg_pool1d", "count_include_pad", count_include_pad)
    window = avg_pool1d_window(input, kernel_size, stride, padding, dilation, ceil_mode)
    divisor = (count_include_pad, None)
    if input.dim() == 3:
        return autograd.avg_pool2d(input.unsqueeze(-2), window, divisor).squeeze(-2)
    return autograd.avg_pool2d(input.unsqueeze(0).unsqueeze(-2), window, divisor).squeeze(-2).squeeze(0)
