"""What may be passed, and how large the result is: every check and every size formula of the package, once.

Sizes may be symbolic: the fake kernels call the same functions as the real ones. Pairs are (height, width), paddings
(top, bottom, left, right). A message starts with torch's text where torch has one, and names the argument, what it got
and what it wanted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MOST_FUSED_TAPS = 255  # of the pooling of a fused convolution: 255 as an offset says that no gradient passes

_LEGACY_NAMES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SERVED_DTYPES = {"cpu": _DTYPES, "cuda": _DTYPES}


class TensorSpec(NamedTuple):
    """What is known of a tensor without its data."""

    size: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    device: torch.device


_make_spec = tuple.__new__  # half the time of the constructor, which counts before every call


def spec(tensor: torch.Tensor) -> TensorSpec:
    return _make_spec(TensorSpec, (tensor.shape, tensor.stride(), tensor.dtype, tensor.device))


# Formulas -----------------------------------------------------------------------------------------------------------


def window_extent(kernel: int, dilation: int) -> int:
    """Positions from the first to the last tap of a dilated window."""
    return dilation * (kernel - 1) + 1


def conv_output_extent(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Outputs along one axis of a convolution: the whole windows that the padded input holds."""
    return (size + before + after - window_extent(kernel, dilation)) // stride + 1


def pool_output_extent(
    size: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil_mode: bool
) -> int:
    """Outputs along one axis of a pooling; ``ceil_mode`` adds windows that run over the end but start before it."""
    overhang = stride - 1 if ceil_mode else 0
    extent = (size + before + after - window_extent(kernel, dilation) + overhang) // stride + 1
    if ceil_mode and (extent - 1) * stride >= size + before:
        extent -= 1
    return extent


def same_padding(size: int, kernel: int, stride: int, dilation: int, *, odd_before: bool) -> tuple[int, int]:
    """Padding (before, after) of one axis that gives ceil(size / stride) outputs; an odd one goes after by default."""
    total = dilation * (kernel - 1) - (size - 1) % stride
    if total < 0:
        total = 0
    half, rest = total // 2, total - total // 2
    return (rest, half) if odd_before else (half, rest)


def is_channels_last(tensor: TensorSpec) -> bool:
    """Whether the strides say channels_last, by torch's rule: what may be either (one channel, 1x1 planes) is not."""
    size, stride = tensor.size, tensor.stride
    if len(size) != 4 or stride[1] == 0:
        return False
    smallest = 0
    for axis in (1, 3, 2, 0):
        if size[axis] == 0 or stride[axis] < smallest:
            return False
        if axis == 0 and smallest == stride[1]:
            return False
        smallest = stride[axis] * size[axis] if size[axis] > 1 else stride[axis]
    return True


def is_dense(tensor: TensorSpec, memory_format: torch.memory_format) -> bool:
    """Whether a 4-D tensor lies without gaps in a format; the stride of an axis of one element says nothing."""
    step = 1
    for axis in (3, 2, 1, 0) if memory_format == torch.contiguous_format else (1, 3, 2, 0):
        if tensor.size[axis] != 1 and tensor.stride[axis] != step:
            return False
        step *= tensor.size[axis]
    return True


def memory_format(*tensors: TensorSpec) -> torch.memory_format:
    """The layout of a call: channels_last as soon as one of its tensors is."""
    return torch.channels_last if any(map(is_channels_last, tensors)) else torch.contiguous_format


def offsets_dtype(kernel_size: Sequence[int]) -> torch.dtype:
    """What holds the offset of a maximum within its window, r * kernel_w + s."""
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 256 else torch.int32


# Checks -------------------------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    return _LEGACY_NAMES.get(dtype) or str(dtype).removeprefix("torch.").capitalize()


def _type_name(tensor: TensorSpec) -> str:
    device = "" if tensor.device.type == "cpu" else f"{tensor.device.type}."
    return f"torch.{device}{dtype_name(tensor.dtype)}Tensor"


def _scalar_name(dtype: torch.dtype) -> str:
    names = {
        torch.float32: "float",
        torch.float64: "double",
        torch.float16: "c10::Half",
        torch.bfloat16: "c10::BFloat16",
    }
    return names.get(dtype, str(dtype).removeprefix("torch."))


def check_served(op: str, tensor: TensorSpec) -> None:
    """Refuses a dtype or a device that no kernel serves. Tensors without data (meta) stand for any device."""
    device = tensor.device.type
    if device != "meta" and device not in SERVED_DTYPES:
        raise NotImplementedError(f'"{op}" not implemented for device {tensor.device}: expected a cpu or cuda tensor')
    served = SERVED_DTYPES.get(device, SERVED_DTYPES["cuda"])
    if tensor.dtype not in served:
        wanted = ", ".join(str(dtype) for dtype in served)
        raise NotImplementedError(
            f"\"{op}\" not implemented for '{dtype_name(tensor.dtype)}' on {device}: expected one of {wanted}"
        )


def check_same_type(tensor: TensorSpec, other: TensorSpec, names: tuple[str, str] = ("Input", "weight")) -> None:
    """Refuses a mix of dtypes or devices."""
    if tensor.device != other.device or tensor.dtype != other.dtype:
        got, wanted = _type_name(tensor), _type_name(other)
        if tensor.device != other.device:
            got, wanted = f"{got} on {tensor.device}", f"{wanted} on {other.device}"
        raise RuntimeError(f"{names[0]} type ({got}) and {names[1]} type ({wanted}) should be the same")


def _check_bias_type(input: TensorSpec, bias: TensorSpec) -> None:
    if input.dtype != bias.dtype:
        raise RuntimeError(
            f"Input type ({_scalar_name(input.dtype)}) and bias type ({_scalar_name(bias.dtype)}) should be the same"
        )
    check_same_type(input, bias, ("Input", "bias"))


def check_fits(name: str, size: Sequence[int], itemsize: int) -> None:
    """Refuses a tensor whose bytes no int64 can count; symbolic sizes are checked when they are known."""
    nbytes = itemsize
    for extent in size:
        if not isinstance(extent, int):
            return
        nbytes *= max(extent, 1)
    if nbytes > INT64_MAX:
        raise RuntimeError(
            f"Storage size calculation overflowed: {name} of size {list(size)} would need {nbytes} bytes"
        )


def check_conv_arguments(weight_size, stride, padding, dilation, groups) -> None:
    if min(padding[::2]) < 0:  # behind the input a negative one leaves its end out, as output_padding needs it
        raise RuntimeError(f"negative padding is not supported, but got padding={list(padding)}")
    if min(stride) <= 0:
        raise RuntimeError(f"non-positive stride is not supported, but got stride={list(stride)}")
    if min(dilation) <= 0:
        raise RuntimeError(f"non-positive dilation is not supported, but got dilation={list(dilation)}")
    if groups <= 0:
        raise RuntimeError(f"non-positive groups is not supported, but got groups={groups}")
    if min(weight_size[2:]) <= 0:
        raise RuntimeError(f"kernel size should be greater than zero, but got weight of size {list(weight_size)}")


def check_divisible(weight_size, groups) -> None:
    if weight_size[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {list(weight_size)} instead"
        )
    if weight_size[0] % groups != 0:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size [{list(weight_size)}] instead"
        )


def check_channels(what: str, input_size, weight_size, channels: int) -> None:
    if input_size[1] != channels:
        raise RuntimeError(
            f"Given {what}, weight of size {list(weight_size)}, expected input{list(input_size)} to have "
            f"{channels} channels, but got {input_size[1]} channels instead"
        )


def check_not_empty(input_size) -> None:
    if 0 in input_size[2:] and input_size[0] != 0 and input_size[1] != 0:
        raise RuntimeError(
            f"Only zero batch or zero channel inputs are supported, but got input shape: {list(input_size)}"
        )


def by_axis(extents: Sequence[int]) -> str:
    return f"({' x '.join(map(str, extents))})"


def conv_output_size(input_size, weight_size, stride, padding, dilation, groups) -> tuple[int, ...]:
    """Checks a convolution over any number of axes and returns [N, K, ...]; ``padding`` has (before, after) of each
    axis in turn."""
    check_conv_arguments(weight_size, stride, padding, dilation, groups)
    check_divisible(weight_size, groups)
    check_channels(f"groups={groups}", input_size, weight_size, weight_size[1] * groups)
    sides = list(zip(padding[::2], padding[1::2], strict=True))
    padded = [size + before + after for size, (before, after) in zip(input_size[2:], sides, strict=True)]
    extents = [window_extent(kernel, step) for kernel, step in zip(weight_size[2:], dilation, strict=True)]
    if any(size < extent for size, extent in zip(padded, extents, strict=True)):
        raise RuntimeError(
            f"Calculated padded input size per channel: {by_axis(padded)}. "
            f"Kernel size: {by_axis(extents)}. Kernel size can't be greater than actual input size"
        )
    check_not_empty(input_size)
    check_fits("the padded input", padded, 8)
    axes = zip(input_size[2:], weight_size[2:], stride, sides, dilation, strict=True)
    outputs = (conv_output_extent(size, kernel, s, *side, d) for size, kernel, s, side, d in axes)
    return input_size[0], weight_size[0], *outputs


def conv2d_output_size(input_size, weight_size, stride, padding, dilation, groups) -> tuple[int, int, int, int]:
    """Checks a convolution and returns [N, K, OH, OW]."""
    if len(input_size) != 4:
        raise RuntimeError(
            f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(input_size)}"
        )
    if len(weight_size) != 4:
        raise RuntimeError(f"Expected 4D weight to conv2d, but got weight of size: {list(weight_size)}")
    return conv_output_size(input_size, weight_size, stride, padding, dilation, groups)


def check_bias_size(what: str, weight: TensorSpec, bias: TensorSpec, channels: int) -> None:
    if len(bias.size) != 1 or bias.size[0] != channels:
        raise RuntimeError(
            f"Given {what}weight of size {list(weight.size)}, expected bias to be 1-dimensional with {channels} "
            f"elements, but got bias of size {list(bias.size)} instead"
        )


def check_conv_tensors(input: TensorSpec, weight: TensorSpec, bias: TensorSpec | None) -> None:
    """Dtypes and devices of a convolution, and the bias's size."""
    check_same_type(input, weight)
    if bias is not None:
        _check_bias_type(input, bias)
        check_bias_size("", weight, bias, weight.size[0])
    check_served("conv2d", input)


def check_size(name: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuses a tensor (a gradient, the offsets) that does not belong to the call."""
    if len(got) != len(wanted) or any(g != w for g, w in zip(got, wanted, strict=True)):
        raise RuntimeError(f"Expected {name} of size {list(wanted)}, but got {name} of size {list(got)}")


def check_device(name: str, got: torch.device, wanted: torch.device) -> None:
    """Refuses a tensor that lies elsewhere than the others of the call."""
    if got != wanted:
        raise RuntimeError(f"Expected {name} on {wanted}, but got {name} on {got}")


def _check_pool2d_arguments(kernel_size, stride, padding, dilation) -> None:
    for name, values in (
        ("kernel_size", kernel_size),
        ("stride", stride),
        ("padding", padding),
        ("dilation", dilation),
    ):
        if any(isinstance(value, int) and abs(value) > INT32_MAX for value in values):
            raise RuntimeError(f"value cannot be converted to type int without overflow: {name}={list(values)}")
    if stride[0] == 0 or stride[1] == 0:
        raise RuntimeError(f"stride should not be zero, but got stride={list(stride)}")
    if kernel_size[0] <= 0 or kernel_size[1] <= 0:
        raise RuntimeError(
            f"kernel size should be greater than zero, but got kH: {kernel_size[0]} kW: {kernel_size[1]}"
        )
    if stride[0] < 0 or stride[1] < 0:
        raise RuntimeError(f"stride should be greater than zero, but got dH: {stride[0]} dW: {stride[1]}")
    if dilation[0] <= 0 or dilation[1] <= 0:
        raise RuntimeError(
            f"dilation should be greater than zero, but got dilationH: {dilation[0]} dilationW: {dilation[1]}"
        )
    for axis in (0, 1):
        for pad in padding[2 * axis : 2 * axis + 2]:
            if pad < 0:
                raise RuntimeError(f"pad must be non-negative, but got pad: {pad}")
            if pad > window_extent(kernel_size[axis], dilation[axis]) // 2:
                raise RuntimeError(
                    f"pad should be at most half of effective kernel size, but got pad={pad}, "
                    f"kernel_size={kernel_size[axis]} and dilation={dilation[axis]}"
                )


def check_pool2d_rank(op: str, input_size) -> None:
    if len(input_size) not in (3, 4):
        if op == "max_pool2d":
            wanted = "non-empty 3D or 4D (batch mode) tensor expected for input, but got:"
        else:
            wanted = "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got:"
        raise RuntimeError(f"{wanted}{list(input_size)}")


def pool2d_output_size(input_size, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[int, int, int, int]:
    """Checks a pooling and returns [N, C, OH, OW]."""
    _check_pool2d_arguments(kernel_size, stride, padding, dilation)
    if len(input_size) != 4 or input_size[1] == 0 or input_size[2] == 0 or input_size[3] == 0:
        raise RuntimeError(
            "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got:{list(input_size)}"
        )
    batch, channels, in_h, in_w = input_size
    out_h = pool_output_extent(in_h, kernel_size[0], stride[0], padding[0], padding[1], dilation[0], ceil_mode)
    out_w = pool_output_extent(in_w, kernel_size[1], stride[1], padding[2], padding[3], dilation[1], ceil_mode)
    if out_h < 1 or out_w < 1:
        raise RuntimeError(
            f"Given input size: ({channels}x{in_h}x{in_w}). Calculated output size: "
            f"({channels}x{out_h}x{out_w}). Output size is too small"
        )
    return batch, channels, out_h, out_w


def check_max_pool1d(input_size, kernel_size, stride, padding, dilation, ceil_mode) -> None:
    """Refuses what max_pool1d refuses in words of its own; the operator of two axes checks the rest."""
    for name, (value,) in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if value <= 0:
            raise RuntimeError(f"max_pool1d() {name} must be greater than zero, but got {value}")
    for pad in padding:
        if pad < 0:
            raise RuntimeError(f"max_pool1d() padding must be non-negative, but got {pad}")
        if pad > window_extent(kernel_size[0], dilation[0]) // 2:
            raise RuntimeError(
                f"max_pool1d() padding should be at most half of kernel size, but got padding={pad} and "
                f"kernel_size={kernel_size[0]} with dilation={dilation[0]}"
            )
    if len(input_size) not in (2, 3) or 0 in input_size[-2:]:
        raise RuntimeError(
            "max_pool1d: Expected 2D or 3D (batch mode) tensor with optional 0 dim batch size for input, but got:"
            f"{list(input_size)}"
        )
    extent = pool_output_extent(input_size[-1], kernel_size[0], stride[0], *padding, dilation[0], ceil_mode)
    if extent < 1:
        raise RuntimeError(f"max_pool1d() Invalid computed output size: {extent}")


def conv2d_relu_max_pool2d_output_size(input_size, weight_size, geometry, pool) -> tuple[int, int, int, int]:
    """Checks a convolution and the unpadded pooling of its output, and returns [N, K, PH, PW]; ``pool`` is (pool_size,
    pool_stride)."""
    if pool[0][0] * pool[0][1] > MOST_FUSED_TAPS:
        raise RuntimeError(
            f"pool_size={list(pool[0])} has more than the {MOST_FUSED_TAPS} taps that a one-byte offset can tell apart"
        )
    return pool2d_output_size(
        conv2d_output_size(input_size, weight_size, *geometry), *pool, (0, 0, 0, 0), (1, 1), False
    )
