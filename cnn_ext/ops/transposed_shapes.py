"""What a transposed convolution may be passed, and how large its result is; as ``cnn_ext.ops.shapes``."""

from collections.abc import Sequence

from cnn_ext.ops.shapes import (
    TensorSpec,
    by_axis,
    check_bias_size,
    check_channels,
    check_conv_arguments,
    check_divisible,
    check_fits,
    check_not_empty,
    check_same_type,
    check_served,
    window_extent,
)


def _check_output_padding(output_padding, stride, dilation) -> None:
    if min(output_padding) < 0:
        raise RuntimeError(f"negative output_padding is not supported, but got output_padding={list(output_padding)}")
    if any(p >= s and p >= d for p, s, d in zip(output_padding, stride, dilation, strict=True)):
        (p_h, p_w), (s_h, s_w), (d_h, d_w) = (
            values if len(values) == 2 else (missing, *values)
            for values, missing in ((output_padding, 0), (stride, 1), (dilation, 1))
        )
        raise RuntimeError(
            "output padding must be smaller than either stride or dilation, but got "
            f"output_padding_height: {p_h} output_padding_width: {p_w} stride_height: {s_h} stride_width: {s_w} "
            f"dilation_height: {d_h} dilation_width: {d_w}"
        )


def check_conv_transpose(input_size, weight_size, stride, output_padding, dilation, groups) -> None:
    """Checks a transposed convolution over any number of axes; its padding is known not to be negative."""
    check_conv_arguments(weight_size, stride, (0,), dilation, groups)
    check_divisible(weight_size, groups)
    check_channels("transposed=1", input_size, weight_size, weight_size[0])
    check_not_empty(input_size)
    _check_output_padding(output_padding, stride, dilation)


def check_conv_transpose_tensors(input: TensorSpec, weight: TensorSpec, bias: TensorSpec | None, groups: int) -> None:
    """Dtypes and devices of a transposed convolution, and the bias's size."""
    check_same_type(input, weight)
    if bias is not None:
        check_same_type(input, bias, ("Input", "bias"))
        check_bias_size("transposed=1, ", weight, bias, weight.size[1] * groups)
    check_served("conv2d", input)


def conv_transpose_extents(
    size: Sequence[int], kernel_size: Sequence[int], stride, sides: Sequence[int], dilation
) -> list[int]:
    """Outputs along each axis; ``sides`` are what is left out (before, after) of each axis in turn."""
    axes = zip(size, kernel_size, stride, sides[::2], sides[1::2], dilation, strict=True)
    extents = [(n - 1) * s + window_extent(k, d) - before - after for n, k, s, before, after, d in axes]
    if min(extents) < 1:
        raise RuntimeError(
            f"Given input size per channel: {by_axis(size)}. Calculated output size per channel: {by_axis(extents)}. "
            "Output size is too small"
        )
    check_fits("the output", extents, 8)
    return extents
