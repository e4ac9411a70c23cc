"""What users write (an int, a pair, a word) as what the operators take.

Those take pairs (height, width) and paddings (top, bottom, left, right).
"""

import functools
import operator
from collections.abc import Sequence

import torch

from cnn_ext.ops.shapes import INT64_MAX, check_max_pool1d, check_pool2d_rank, same_padding, spec, window_extent
from cnn_ext.ops.sized_shapes import check_adaptive_pool2d, check_unpool2d, refuse_empty_unpool2d
from cnn_ext.ops.transposed_shapes import check_conv_transpose, check_conv_transpose_tensors, conv_transpose_extents

CONV_WORDS = ("valid", "same", "same_lower", "full")
POOL_WORDS = TRANSPOSED_WORDS = CONV_WORDS[:-1]


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


def _are_ints(value, axes: int) -> bool:
    """Whether there is nothing to do for a value: the usual case, which is decided fast."""
    if type(value) is not tuple or len(value) != axes:
        return False
    for item in value:  # noqa: SIM110 (all() and its generator take four times as long)
        if type(item) is not int or not -INT64_MAX <= item <= INT64_MAX:
            return False
    return True


def conv_ints(op: str, name: str, value, axes: int) -> tuple[int, ...]:
    """An int, or one int or one for each axis, as one for each axis."""
    if type(value) is int:
        return (integer(op, name, value),) * axes
    if _are_ints(value, axes):
        return value
    if isinstance(value, (tuple, list)):
        if len(value) not in (1, axes):
            raise RuntimeError(
                f"expected {name} to be a single integer value or a list of {axes} values to match the convolution "
                f"dimensions, but got {name}={list(value)}"
            )
        values = tuple(integer(op, name, item) for item in value)
        return values if len(values) == axes else values * axes
    return (integer(op, name, value),) * axes


def conv_pair(op: str, name: str, value) -> tuple[int, int]:
    """An int, or one or two ints, as (height, width)."""
    return conv_ints(op, name, value, 2)


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


def max_pool1d_ints(op: str, name: str, value) -> tuple[int]:
    """An int, or one int in a list."""
    if isinstance(value, (tuple, list)) and len(value) != 1:
        none = "None, " if name == "stride" else ""
        raise RuntimeError(f"{op}() {name} must be {none}an int{_OF_SIZE_1[name]} of size 1 but got size {len(value)}")
    return conv_ints(op, name, value, 1)


_OF_SIZE_1 = {  # torch sets its commas so
    "kernel_size": ", list of ints or tuple of ints",
    "stride": ", list of ints, or tuple of ints",
    "padding": ", list of ints, or tuple of ints",
    "dilation": ", list of ints or tuple of ints",
}


def avg_pool1d_ints(op: str, name: str, value) -> tuple[int]:
    """An int, or one int in a list."""
    if isinstance(value, (tuple, list)) and len(value) != 1:
        raise RuntimeError(f"{op}() argument '{name}' should contain one int (got {len(value)})")
    return conv_ints(op, name, value, 1)


def is_per_side(padding) -> bool:
    """Whether a padding has the form ((top, bottom), (left, right)), or ((left, right),) of one axis."""
    return (
        isinstance(padding, (tuple, list))
        and len(padding) in (1, 2)
        and all(isinstance(sides, (tuple, list)) for sides in padding)
    )


def _word_padding(word: str, size, kernel_size, stride, dilation) -> tuple[int, ...]:
    sides: list[int] = []
    for axis in range(len(stride)):
        if word == "valid":
            sides += (0, 0)
        elif word == "full":
            sides += [window_extent(kernel_size[axis], dilation[axis]) - 1] * 2
        else:
            sides += same_padding(
                size[axis], kernel_size[axis], stride[axis], dilation[axis], odd_before=word == "same_lower"
            )
    return tuple(sides)


def _side_pair(op: str, sides) -> tuple[int, int]:
    """What lies before and behind one axis, as two ints or one for both."""
    if len(sides) not in (1, 2):
        raise RuntimeError(f"{op}(): padding of one axis must be (before, after), but got padding={list(sides)}")
    before, after = integer(op, "padding", sides[0]), integer(op, "padding", sides[-1])
    return before, after


def resolve_padding(op: str, padding, size, kernel_size, stride, dilation, *, words: Sequence[str], as_ints):
    """Padding as (before, after) of each axis in turn, (top, bottom, left, right), from an int, an int for each axis,
    a pair of sides for each axis or a word.

    ``size`` and ``kernel_size`` end with the axes'; ``as_ints`` reads an int or one for each axis.
    """
    axes = len(stride)
    if type(padding) is int:
        return (integer(op, "padding", padding),) * (2 * axes)
    if _are_ints(padding, axes):
        return (padding[0], padding[0]) if axes == 1 else (padding[0], padding[0], padding[1], padding[1])
    if isinstance(padding, str):
        if padding not in words:
            raise RuntimeError(f"Invalid padding string: '{padding}', {op}() expected one of {', '.join(words)}")
        if min(*stride, *dilation) < 1:
            return (0,) * (2 * axes)  # the operator refuses these strides and dilations itself
        return _word_padding(padding, size[-axes:], kernel_size[-axes:], stride, dilation)
    if is_per_side(padding) and len(padding) == axes:
        return tuple(side for sides in padding for side in _side_pair(op, sides))
    return tuple(side for value in as_ints(op, "padding", padding) for side in (value, value))


_CONV_INTS = {axes: functools.partial(conv_ints, axes=axes) for axes in (1, 2)}


def conv_geometry(op: str, input, weight, bias, stride, padding, dilation, groups, axes: int):
    """The arguments of a convolution as the operators take them: (stride, padding, dilation, groups).

    This runs before every call: what needs no further look is decided here, without a call.
    """
    tensor = torch.Tensor
    if not (isinstance(input, tensor) and isinstance(weight, tensor) and (bias is None or isinstance(bias, tensor))):
        _check_conv_operands(op, input, weight, bias)
    if input.dim() not in (axes + 1, axes + 2) or weight.dim() != axes + 2:
        check_conv_ranks(op, input, weight, axes)
    are_ints = type(stride) is type(padding) is type(dilation) is type(groups) is int
    if are_ints and 0 <= stride | padding | dilation | groups <= INT64_MAX:  # each of them
        return (stride,) * axes, (padding,) * (2 * axes), (dilation,) * axes, groups
    stride = conv_ints(op, "stride", stride, axes)
    dilation = conv_ints(op, "dilation", dilation, axes)
    as_ints = _CONV_INTS[axes]
    padding = resolve_padding(
        op, padding, input.shape, weight.shape, stride, dilation, words=CONV_WORDS, as_ints=as_ints
    )
    _check_not_negative(padding)
    return stride, padding, dilation, integer(op, "groups", groups)


def _check_conv_operands(op: str, input, weight, bias) -> None:
    check_tensor(op, "input", input)
    check_tensor(op, "weight", weight)
    if bias is not None:
        check_tensor(op, "bias", bias)


def _check_not_negative(padding) -> None:
    if min(padding) < 0:
        raise RuntimeError(f"negative padding is not supported, but got padding={list(padding)}")


PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def check_padding_mode(op: str, mode) -> None:
    if mode not in PADDING_MODES:
        raise ValueError(f"{op}() expected padding_mode to be one of {', '.join(PADDING_MODES)}, but got {mode!r}")


def check_conv_ranks(op: str, input, weight, axes: int) -> None:
    if input.dim() not in (axes + 1, axes + 2):
        raise RuntimeError(
            f"Expected {axes + 1}D (unbatched) or {axes + 2}D (batched) input to {op}, but got input of size: "
            f"{list(input.shape)}"
        )
    if weight.dim() != axes + 2:
        raise RuntimeError(f"Expected {axes + 2}D weight to {op}, but got weight of size: {list(weight.shape)}")


def _transposed_sides(op: str, padding, kernel_size, stride, dilation) -> tuple[int, ...]:
    """What a transposed convolution leaves out of its result, as (before, after) of each axis in turn.

    'same' and 'same_lower' give ``stride`` outputs for each input: where the window is smaller than the stride,
    something is added behind instead.
    """
    axes = len(stride)
    if isinstance(padding, str) and padding in TRANSPOSED_WORDS and padding != "valid":
        sides: list[int] = []
        for kernel, step, distance in zip(kernel_size, stride, dilation, strict=True):
            total = window_extent(kernel, distance) - step
            before = max(total, 0) // 2 if padding == "same" else (max(total, 0) + 1) // 2
            sides += (before, total - before)
        return tuple(sides)
    as_ints = functools.partial(conv_ints, axes=axes)
    sides = resolve_padding(op, padding, (), kernel_size, stride, dilation, words=TRANSPOSED_WORDS, as_ints=as_ints)
    _check_not_negative(sides)
    return sides


def conv_transpose_geometry(op: str, input, weight, bias, stride, padding, output_padding, groups, dilation, axes: int):
    """The arguments of a transposed convolution as the operators take them: the geometry (stride, padding, dilation,
    groups) of the convolution that it transposes, whose padding behind lacks the output padding, and the extents of
    the result."""
    _check_conv_operands(op, input, weight, bias)
    check_conv_ranks(op, input, weight, axes)
    stride = conv_ints(op, "stride", stride, axes)
    dilation = conv_ints(op, "dilation", dilation, axes)
    output_padding = conv_ints(op, "output_padding", output_padding, axes)
    groups = integer(op, "groups", groups)
    sides = _transposed_sides(op, padding, weight.shape[2:], stride, dilation)
    size = input.shape if input.dim() == axes + 2 else (1, *input.shape)
    check_conv_transpose(size, weight.shape, stride, output_padding, dilation, groups)
    check_conv_transpose_tensors(spec(input), spec(weight), None if bias is None else spec(bias), groups)
    sides = [side - output_padding[i // 2] if i % 2 else side for i, side in enumerate(sides)]
    extents = conv_transpose_extents(size[2:], weight.shape[2:], stride, sides, dilation)
    return (stride, tuple(sides), dilation, groups), extents


def fused_pool(op: str, pool_size, pool_stride) -> tuple[tuple[int, int], tuple[int, int]]:
    """The pooling of a fused convolution, as the operator takes it; the stride is the size if omitted."""
    pool_size = pool_pair(op, "pool_size", pool_size)
    return pool_size, pool_size if pool_stride is None else pool_pair(op, "pool_stride", pool_stride)


def _pool_window(op: str, input, kernel_size, stride, padding, dilation, ceil_mode, as_ints):
    kernel_size = as_ints(op, "kernel_size", kernel_size)
    omitted = stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)
    stride = kernel_size if omitted else as_ints(op, "stride", stride)
    dilation = as_ints(op, "dilation", dilation)
    padding = resolve_padding(
        op, padding, input.shape, kernel_size, stride, dilation, words=POOL_WORDS, as_ints=as_ints
    )
    return kernel_size, stride, padding, dilation, ceil_mode


def pool2d_window(op: str, input, kernel_size, stride, padding, dilation, ceil_mode):
    """The arguments that both poolings share, as the operators take them."""
    check_tensor(op, "input", input)
    check_bool(op, "ceil_mode", ceil_mode)
    check_pool2d_rank(op, input.shape)
    return _pool_window(op, input, kernel_size, stride, padding, dilation, ceil_mode, pool_pair)


def _of_height_1(kernel_size, stride, padding, dilation, ceil_mode):
    """A window over one axis as one over two, the first of size 1."""
    return (1, *kernel_size), (1, *stride), (0, 0, *padding), (1, *dilation), ceil_mode


def max_pool1d_window(input, kernel_size, stride, padding, dilation, ceil_mode):
    """The arguments of max_pool1d as the operators of two axes take them."""
    check_tensor("max_pool1d", "input", input)
    check_bool("max_pool1d", "ceil_mode", ceil_mode)
    window = _pool_window("max_pool1d", input, kernel_size, stride, padding, dilation, ceil_mode, max_pool1d_ints)
    check_max_pool1d(input.shape, *window)
    return _of_height_1(*window)


def avg_pool1d_window(input, kernel_size, stride, padding, dilation, ceil_mode):
    """The arguments of avg_pool1d as the operators of two axes take them."""
    check_tensor("avg_pool1d", "input", input)
    check_bool("avg_pool1d", "ceil_mode", ceil_mode)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"Expected 2 to 3 dimensions, but got {input.dim()}-dimensional tensor for argument #1 'self' (while "
            f"checking arguments for avg_pool1d)"
        )
    window = _pool_window("avg_pool1d", input, kernel_size, stride, padding, dilation, ceil_mode, avg_pool1d_ints)
    return _of_height_1(*window)


_LENGTH_WORDS = {
    "adaptive_avg_pool2d": "adaptive_avg_pool2d: output_size must be 2",
    "adaptive_max_pool2d": "adaptive_max_pool2d(): internal error: output_size.size() must be 2",
}


def adaptive_output_size(op: str, input, output_size) -> tuple[int, int]:
    """(height, width) of an adaptive pooling, checked; None stands for the input's own."""
    check_tensor(op, "input", input)
    if isinstance(output_size, (tuple, list)):
        if input.dim() <= len(output_size):
            raise ValueError(f"Input dimension should be at least {len(output_size) + 1}, but got {input.dim()}")
        if len(output_size) != 2:
            raise RuntimeError(f"{_LENGTH_WORDS[op]}, but got output_size={list(output_size)}")
        items = zip(output_size, input.shape[-2:], strict=True)
        height, width = (own if item is None else integer(op, "output_size", item) for item, own in items)
    else:
        height = width = integer(op, "output_size", output_size)
    check_adaptive_pool2d(op, input.shape, (height, width))
    return height, width


def unpool2d_output_size(input, indices, kernel_size, stride, padding, output_size) -> tuple[int, int]:
    """(height, width) of an unpooling, checked against what the pooling's arguments allow."""
    op = "max_unpool2d"
    check_tensor(op, "input", input)
    check_tensor(op, "indices", indices)
    kernel_size = pool_pair(op, "kernel_size", kernel_size)
    stride = kernel_size if stride is None else pool_pair(op, "stride", stride)
    padding = pool_pair(op, "padding", padding)
    check_unpool2d(spec(input), spec(indices))
    refuse_empty_unpool2d(input.shape)
    default = [
        (size - 1) * step + kernel - 2 * pad
        for size, kernel, step, pad in zip(input.shape[-2:], kernel_size, stride, padding, strict=True)
    ]
    wanted = default if output_size is None else list(output_size)
    if len(wanted) == 4:
        wanted = wanted[2:]
    if len(wanted) != 2:
        raise ValueError(
            f"output_size should be a sequence containing 2 or 4 elements, but it has a length of '{len(wanted)}'"
        )
    height, width = (integer(op, "output_size", item) for item in wanted)
    for axis, (got, usual, step) in enumerate(zip((height, width), default, stride, strict=True)):
        if output_size is not None and not usual - step < got < usual + step:
            raise ValueError(
                f'invalid output_size "{output_size}" (dim {axis} must be between {usual - step} and {usual + step})'
            )
        if got < 0:
            raise ValueError(
                "max_unpooling: output_size must contain non-negative spatial dimensions, but got "
                f"output_size[{axis}]={got}"
            )
    return height, width
