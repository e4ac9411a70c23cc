"""Discrete convolution and cross-correlation of one- and two-dimensional signals, as NumPy and SciPy define them.

1-D results are those of numpy.convolve and numpy.correlate, 2-D results those of scipy.signal.convolve2d and
correlate2d; they are computed by the convolution kernels of this package and have gradients.

Integers are computed in float64 and returned in their own type, wrapping as NumPy's do; where float64 might round (more
than 2**53 in a sum of absolute terms), the call is refused.
"""

from typing import NamedTuple

import torch

from cnn_ext import functional
from cnn_ext._arguments import check_tensor, conv_pair, integer
from cnn_ext.ops.shapes import conv_output_extent, window_extent

__all__ = ["convolve", "correlate", "output_size"]

_MODES = ("full", "same", "valid")
_FLOAT64_EXACT = 2**53


def output_size(n: int, m: int, p: int = 0, s: int = 1, dilation: int = 1) -> int:
    """Outputs of a convolution of ``n`` elements and ``p`` zeros on each side with ``m`` taps at stride ``s``.

    floor((n + 2p - dilation * (m - 1) - 1) / s) + 1

    Raises:
        ValueError: n or p negative; m, s or dilation below 1; a filter longer than the padded input.
        TypeError: an argument that is no integer.
    """
    smallest = {"n": 0, "m": 1, "p": 0, "s": 1, "dilation": 1}
    values = {"n": n, "m": m, "p": p, "s": s, "dilation": dilation}
    for name, value in values.items():
        if integer("output_size", name, value) < smallest[name]:
            raise ValueError(f"output_size() expected {name} of at least {smallest[name]}, but got {name}={value}")
    extent = window_extent(m, dilation)
    if extent > n + 2 * p:
        raise ValueError(
            f"output_size() expected a filter that fits into the padded input (n + 2p = {n + 2 * p}), but got a filter "
            f"that spans {extent} (m={m}, dilation={dilation})"
        )
    return conv_output_extent(n, m, s, p, p, dilation)


def convolve(x, w, mode="full", *, padding=None, stride=1):
    """Convolves ``x`` with ``w``: y[i] = sum over k of x[i - k] * w[k], zeros beyond the ends.

    Args:
        x, w: two 1-D or two 2-D tensors. As in NumPy, two 1-D operands are swapped where ``w`` is the longer one.
        mode: 'full' (every overlap), 'same' (as large as ``x``; 1-D: the longer operand) or 'valid' (whole overlaps).
        padding: zeros on each side of ``x``, an int or, in 2-D, a pair; overrides ``mode`` and swaps nothing.
        stride: takes every stride-th output; an int or, in 2-D, a pair.

    Raises:
        ValueError: empty operands, an unknown mode, negative padding, a stride below 1, a filter that does not fit.
        TypeError: operands that are not tensors, or bool tensors.
        RuntimeError: operands of different or other ranks; integers too large to be exact.
    """
    return _apply("convolve", x, w, mode, padding, stride)


def correlate(x, w, mode="valid", *, padding=None, stride=1):
    """Correlates ``x`` with ``w``: y[i] = sum over k of x[i + k] * w[k], zeros beyond the ends.

    Arguments and errors are those of :func:`convolve`. With an even number of taps 'same' is not centred; the odd
    element lies where numpy.correlate (1-D) and scipy.signal.correlate2d (2-D) put it, which differ.
    """
    return _apply("correlate", x, w, mode, padding, stride)


class _Problem(NamedTuple):
    """A correlation of ``signal`` with ``filter``, with zeros (before, after) each axis."""

    signal: torch.Tensor
    filter: torch.Tensor
    sides: list[tuple[int, int]]


def _apply(op, x, w, mode, padding, stride):
    _check_operands(op, x, w)
    stride = _per_axis(op, "stride", stride, x.dim(), smallest=1)
    if padding is not None:
        problem = _padded(op, x, w, _per_axis(op, "padding", padding, x.dim(), smallest=0))
    elif mode in _MODES:
        problem = _in_mode(op, x, w, mode)
    else:
        raise ValueError(f"{op}() expected mode to be one of {', '.join(_MODES)}, but got mode={mode!r}")
    dtype = torch.promote_types(x.dtype, w.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return _correlate(problem, dtype, stride)
    _check_exact(op, problem)
    return _correlate(problem, torch.float64, stride).to(torch.int64).to(dtype)


def _check_operands(op, x, w) -> None:
    for name, operand in (("x", x), ("w", w)):
        check_tensor(op, name, operand)
        if operand.dim() not in (1, 2):
            raise RuntimeError(f"{op}() expected {name} to be 1-D or 2-D, but got {name} of size {list(operand.shape)}")
        if operand.numel() == 0:
            raise ValueError(f"{op}() expected {name} not to be empty, but got {name} of size {list(operand.shape)}")
        if operand.dtype == torch.bool:
            raise TypeError(f"{op}() expected {name} of numbers, but got {name} of dtype torch.bool")
    if x.dim() != w.dim():
        raise RuntimeError(f"{op}() expected x and w of one rank, but got sizes {list(x.shape)} and {list(w.shape)}")


def _per_axis(op, name, value, axes, *, smallest) -> tuple[int, ...]:
    values = conv_pair(op, name, value)
    if min(values) < smallest:
        raise ValueError(f"{op}() expected {name} of at least {smallest}, but got {name}={value}")
    if axes == 1 and isinstance(value, (tuple, list)) and len(value) != 1:
        raise RuntimeError(f"{op}() of 1-D tensors expected {name} to be an int, but got {name}={list(value)}")
    return values[:axes]


def _flip(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(tuple(range(tensor.dim())))


def _padded(op, x, w, padding) -> _Problem:
    for n, m, p in zip(x.shape, w.shape, padding, strict=True):
        if m > n + 2 * p:
            raise ValueError(
                f"{op}() expected w to fit into the padded x, but got w of size {list(w.shape)}, x of size "
                f"{list(x.shape)} and padding={list(padding)}"
            )
    return _Problem(x, _flip(w) if op == "convolve" else w, [(p, p) for p in padding])


def _in_mode(op, x, w, mode) -> _Problem:
    swapped = _swaps(op, x, w, mode)
    signal, filter = (w, x) if swapped else (x, w)
    sides = [_mode_sides(op, mode, m, filter.dim()) for m in filter.shape]
    if op == "convolve":
        return _Problem(signal, _flip(filter), sides)
    if swapped:  # correlate(x, w) is correlate(w, x) read backwards: both operands and the padding are mirrored
        return _Problem(_flip(signal), _flip(filter), [(after, before) for before, after in sides])
    return _Problem(signal, filter, sides)


def _swaps(op, x, w, mode) -> bool:
    """Whether the operands change places: in 1-D where w is longer, in 2-D where only so a whole overlap exists."""
    larger = [m > n for n, m in zip(x.shape, w.shape, strict=True)]
    if x.dim() == 1:
        return larger[0]
    if mode != "valid" or not any(larger):
        return False
    if any(n > m for n, m in zip(x.shape, w.shape, strict=True)):
        raise ValueError(
            f"{op}() in mode 'valid' expected one operand to be at least as large as the other in every dimension, "
            f"but got sizes {list(x.shape)} and {list(w.shape)}"
        )
    return True


def _mode_sides(op, mode, m, rank) -> tuple[int, int]:
    """Zeros before and after an axis for a filter of ``m`` taps."""
    if mode == "full":
        return m - 1, m - 1
    if mode == "valid":
        return 0, 0
    before = (m - 1) // 2 if op == "correlate" and rank == 2 else m // 2
    return before, m - 1 - before


def _correlate(problem: _Problem, dtype: torch.dtype, stride: tuple[int, ...]) -> torch.Tensor:
    signal, filter, sides = problem
    as_plane = (1, 1, *(1,) * (2 - signal.dim()))
    output = functional.conv2d(
        signal.to(dtype).reshape(*as_plane, *signal.shape),
        filter.to(dtype).reshape(*as_plane, *filter.shape),
        stride=(1, *stride)[-2:],
        padding=((0, 0), *sides)[-2:],
    )
    return output.reshape(output.shape[4 - signal.dim() :])


def _check_exact(op, problem: _Problem) -> None:
    """Refuses integers whose sums float64 might round."""
    signal, filter, _ = problem
    terms = min(signal.numel(), filter.numel())
    largest = terms * _magnitude(signal) * _magnitude(filter)
    if largest > _FLOAT64_EXACT:
        raise RuntimeError(
            f"{op}() computes integers in float64 and expected sums of at most 2**53, but these may reach {largest}; "
            "convert x and w to a floating dtype"
        )


def _magnitude(tensor: torch.Tensor) -> int:
    return max(abs(int(tensor.min())), abs(int(tensor.max()))) if not tensor.dtype.is_floating_point else 0
