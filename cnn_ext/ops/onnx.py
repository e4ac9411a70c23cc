"""The operators as plain nodes of ONNX (Conv, ConvTranspose, MaxPool, AveragePool) while ``torch.onnx.export`` traces.

Each takes an operator's arguments. Backward operators have no node of their own in ONNX: of them, backward_input is
what transposed convolutions are made of.
"""

from collections.abc import Callable

import torch

from cnn_ext.ops import shapes


def _node(name: str, inputs, attributes: dict, like: torch.Tensor, size) -> torch.Tensor:
    if torch._C._get_tracing_state():
        raise NotImplementedError("cnn_ext is exported to ONNX by torch.onnx.export(..., dynamo=True)")
    given = [tensor for tensor in inputs if tensor is not None]
    return torch.onnx.ops.symbolic(name, given, attributes, dtype=like.dtype, shape=list(size))


def _window(kernel_size, stride, padding, dilation) -> dict:
    top, bottom, left, right = padding
    return {
        "kernel_shape": list(kernel_size),
        "strides": list(stride),
        "pads": [top, left, bottom, right],
        "dilations": list(dilation),
    }


def _conv2d(input, weight, bias, stride, padding, dilation, groups, allow_winograd=False, padding_mode="zeros"):
    if padding_mode != "zeros":  # which are all that a Conv knows
        top, bottom, left, right = padding
        input, padding = torch.nn.functional.pad(input, (left, right, top, bottom), mode=padding_mode), (0, 0, 0, 0)
    size = shapes.conv2d_output_size(input.shape, weight.shape, stride, padding, dilation, groups)
    attributes = _window(weight.shape[2:], stride, padding, dilation) | {"group": groups}
    return _node("Conv", (input, weight, bias), attributes, input, size)


def _conv_transpose2d(grad_output, weight, bias, input_size, stride, padding, dilation, groups, *_):
    """The output padding is what the output's size has above the least that these arguments give."""
    padding = [max(side, 0) for side in padding]
    attributes = _window(weight.shape[2:], stride, padding, dilation) | {"group": groups}
    attributes["output_padding"] = [
        int(
            input_size[2 + axis]
            - (grad_output.shape[2 + axis] - 1) * stride[axis]
            - shapes.window_extent(weight.shape[2 + axis], dilation[axis])
            + padding[2 * axis]
            + padding[2 * axis + 1]
        )
        for axis in (0, 1)
    ]
    return _node("ConvTranspose", (grad_output, weight, bias), attributes, grad_output, input_size)


def _conv2d_backward_input(grad_output, weight, *arguments):
    return _conv_transpose2d(grad_output, weight, None, *arguments)


def _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, *_):
    size = shapes.pool2d_output_size(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    attributes = _window(kernel_size, stride, padding, dilation) | {"ceil_mode": int(ceil_mode)}
    no_offsets = torch.empty(0, dtype=shapes.offsets_dtype(kernel_size), device=input.device)
    return _node("MaxPool", (input,), attributes, input, size), no_offsets


def _conv2d_relu_max_pool2d(
    input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, with_offsets, *_
):
    activated = torch.relu(_conv2d(input, weight, bias, stride, padding, dilation, groups))
    if tuple(pool_size) == tuple(pool_stride) == (1, 1):
        return activated, torch.empty(0, dtype=torch.uint8, device=input.device)
    return _max_pool2d(activated, pool_size, pool_stride, (0, 0, 0, 0), (1, 1), False)


def _avg_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override):
    size = shapes.pool2d_output_size(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    attributes = _window(kernel_size, stride, padding, dilation) | {"ceil_mode": int(ceil_mode)}
    attributes["count_include_pad"] = int(count_include_pad or divisor_override is not None)
    output = _node("AveragePool", (input,), attributes, input, size)
    if divisor_override is None:
        return output
    if ceil_mode:
        raise NotImplementedError("ONNX has no average pooling with both divisor_override and ceil_mode")
    return output * (kernel_size[0] * kernel_size[1] / divisor_override)


TRANSLATIONS: dict[str, Callable] = {
    "conv2d_forward": _conv2d,
    "conv2d_backward_input": _conv2d_backward_input,
    "conv_transpose2d_forward": _conv_transpose2d,
    "conv2d_relu_max_pool2d_forward": _conv2d_relu_max_pool2d,
    "max_pool2d_forward": _max_pool2d,
    "avg_pool2d_forward": _avg_pool2d,
}
