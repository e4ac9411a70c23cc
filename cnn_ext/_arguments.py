"""What users write (an int, a pair, a word) as what the operators take.

Those take pairs (height, width) and paddings (top, bottom, left, right).
"""

import operator
from collections.abc import Sequence

import torch

from cnn_ext.ops.shapes import INT64_MAX, check_pool2d_rank, same_padding, window_extent

CONV_WORDS = ("valid", "same", "same_lower", "full")
POOL_WORDS = CONV_WORDS[:-1]


def check_tensor(op: str, name: str, value) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def check_bool(op: str, name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}(): argument '{name}' must be bool, not {type(value).__name__}")


def integer(op: str, name: str, value) -> int:
    """An integer, symbolic or NumPy's too, that an int64 holds; not a bool and not a float."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not hasattr(type(value), "__index__"):
            raise TypeError(f"{op}(): argument '{name}' must be an int or a tuple of ints, not {type(value).__name__}")
        value = operator.index(value)
    if type(value) is int and not -INT64_MAX - 1 <= value <= INT64_MAX:
        raise ValueError(f"Overflow when unpacking long long: {op}() got {name}={value}, wanted an int64")
    return value


def conv_pair(op: str, name: str, value) -> tuple[int, int]:
    """An int, or one or two ints, as (height, width)."""
    if isinstance(value, (tuple, list)):
        if len(value) not in (1, 2):
            raise RuntimeError(
                f"expected {name} to be a single integer value or a list of 2 values to match the convolution "
                f"dimensions, but got {name}={list(value)}"
            )
        return integer(op, name, value[0]), integer(op, name, value[-1])
    value = integer(op, name, value)
    return value, value


_POOL_WANTED = {
    "kernel_size": "must either be a single int, or a tuple of two ints",
    "stride": "must either be omitted, a single int, or a tuple of two ints",
    "pool_size": "must either be a single int, or a tuple of two ints",
    "pool_stride": "must either be omitted, a single int, or a tuple of two ints",
    "padding": "must either be a single int, or a tuple of two ints",
    "dilation": "must be either a single int, or a tuple of two ints",
}


def pool_pair(op: str, name: str, value) -> tuple[int, int]:
    """As conv_pair, with the words that torch's pools have for a wrong length."""
    if isinstance(value, (tuple, list)) and len(value) not in (1, 2):
        raise RuntimeError(f"{op}: {name} {_POOL_WANTED[name]}, but got {name}={list(value)}")
    return conv_pair(op, name, value)


def is_per_side(padding) -> bool:
    """Whether a padding has the form ((top, bottom), (left, right))."""
    return (
        isinstance(padding, (tuple, list)) and len(padding) == 2 and all(isinstance(p, (tuple, list)) for p in padding)
    )


def _word_padding(word: str, size, kernel_size, stride, dilation) -> tuple[int, int, int, int]:
    sides: list[int] = []
    for axis in (0, 1):
        if word == "valid":
            sides += (0, 0)
        elif word == "full":
            sides += [window_extent(kernel_size[axis], dilation[axis]) - 1] * 2
        else:
            sides += same_padding(
                size[axis], kernel_size[axis], stride[axis], dilation[axis], odd_before=word == "same_lower"
            )
    return sides[0], sides[1], sides[2], sides[3]


def resolve_padding(op: str, padding, size, kernel_size, stride, dilation, *, words: Sequence[str], as_pair):
    """Padding as (top, bottom, left, right) from an int, a pair, ((top, bottom), (left, right)) or a word.

    ``size`` and ``kernel_size`` end with (height, width); ``as_pair`` reads an int or a pair.
    """
    if type(padding) is int:
        padding = integer(op, "padding", padding)
        return padding, padding, padding, padding
    if isinstance(padding, str):
        if padding not in words:
            raise RuntimeError(f"Invalid padding string: '{padding}', {op}() expected one of {', '.join(words)}")
        if min(*stride, *dilation) < 1:
            return 0, 0, 0, 0  # the operator refuses these strides and dilations itself
        return _word_padding(padding, size[-2:], kernel_size[-2:], stride, dilation)
    if is_per_side(padding):
        (top, bottom), (left, right) = (as_pair(op, "padding", side) for side in padding)
        return top, bottom, left, right
    vertical, horizontal = as_pair(op, "padding", padding)
    return vertical, vertical, horizontal, horizontal


def conv2d_geometry(op: str, input, weight, bias, stride, padding, dilation, groups):
    """The arguments of a convolution as the operators take them: (stride, padding, dilation, groups)."""
    check_tensor(op, "input", input)
    check_tensor(op, "weight", weight)
    if bias is not None:
        check_tensor(op, "bias", bias)
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"Expected 3D (unbatched) or 4D (batched) input to {op}, but got input of size: {list(input.shape)}"
        )
    if weight.dim() != 4:
        raise RuntimeError(f"Expected 4D weight to {op}, but got weight of size: {list(weight.shape)}")
    stride = conv_pair(op, "stride", stride)
    dilation = conv_pair(op, "dilation", dilation)
    padding = resolve_padding(
        op, padding, input.shape, weight.shape, stride, dilation, words=CONV_WORDS, as_pair=conv_pair
    )
    return stride, padding, dilation, integer(op, "groups", groups)


def fused_pool(op: str, pool_size, pool_stride) -> tuple[tuple[int, int], tuple[int, int]]:
    """The pooling of a fused convolution, as the operator takes it; the stride is the size if omitted."""
    pool_size = pool_pair(op, "pool_size", pool_size)
    return pool_size, pool_size if pool_stride is None else pool_pair(op, "pool_stride", pool_stride)


def pool2d_window(op: str, input, kernel_size, stride, padding, dilation, ceil_mode):
    """The arguments that both poolings share, as the operators take them."""
    check_tensor(op, "input", input)
    check_bool(op, "ceil_mode", ceil_mode)
    check_pool2d_rank(op, input.shape)
    kernel_size = pool_pair(op, "kernel_size", kernel_size)
    omitted = stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)
    stride = kernel_size if omitted else pool_pair(op, "stride", stride)
    dilation = pool_pair(op, "dilation", dilation)
    padding = resolve_padding(
        op, padding, input.shape, kernel_size, stride, dilation, words=POOL_WORDS, as_pair=pool_pair
    )
    return kernel_size, stride, padding, dilation, ceil_mode
