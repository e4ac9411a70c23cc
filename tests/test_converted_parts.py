"""Large dense convolutions of the half types are cut into parts: rows of an image, blocks of channels."""

import pytest
import torch

import cnn_ext
from cnn_ext import _native

CONVERTED = {
    row["direction"]: row["name"]  # of the best instruction set, the first in the table
    for row in reversed(_native.cpu.kernels())
    if row["op"] == "conv2d" and "_converted_" in row["name"] and row["supported"]
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# An image takes more than 1 MB as floats, the weights more than 256 KB.
SHAPES = {
    "3x3": dict(size=(2, 96, 70, 64), outputs=160, kernel=3, stride=1, padding=1, dilation=1, groups=1),
    "strided": dict(size=(2, 96, 71, 64), outputs=144, kernel=5, stride=2, padding=2, dilation=1, groups=1),
    "dilated": dict(size=(1, 80, 64, 64), outputs=112, kernel=3, stride=3, padding=4, dilation=2, groups=1),
    "reaching far": dict(size=(2, 192, 40, 40), outputs=160, kernel=3, stride=1, padding=12, dilation=12, groups=1),
    "many parts, many weights": dict(
        size=(6, 256, 20, 20), outputs=256, kernel=3, stride=1, padding=1, dilation=1, groups=1
    ),
    "grouped": dict(size=(2, 96, 64, 64), outputs=192, kernel=5, stride=1, padding=0, dilation=1, groups=3),
}


def operands(shape: dict, layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers, whose sums are exact in float32: input, weight and grad_output."""
    generator = torch.Generator().manual_seed(1)

    def small(*size: int) -> torch.Tensor:
        values = torch.randint(-1, 2, size, generator=generator).to(dtype)
        return values.contiguous(memory_format=LAYOUTS[layout])

    input = small(*shape["size"])
    weight = small(shape["outputs"], shape["size"][1] // shape["groups"], shape["kernel"], shape["kernel"])
    geometry = (shape["stride"], shape["padding"], shape["dilation"], shape["groups"])
    return input, weight, small(*torch.nn.functional.conv2d(input.float(), weight.float(), None, *geometry).shape)


@pytest.mark.parametrize("direction", CONVERTED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_parts_are_the_whole(name, layout, direction):
    shape = SHAPES[name]
    input, weight, grad_output = operands(shape, layout, torch.bfloat16)
    stride, padding, dilation = [shape["stride"]] * 2, [shape["padding"]] * 2, [shape["dilation"]] * 2
    geometry = (stride, [shape["padding"]] * 4, dilation, shape["groups"])
    mask = [direction == "backward_input", direction == "backward_weight", False]
    bias = torch.arange(shape["outputs"]).fmod(3).to(torch.bfloat16)

    def computed(images: slice) -> torch.Tensor:
        with cnn_ext.force_kernel(CONVERTED[direction]):
            if direction == "forward":
                return cnn_ext.functional.conv2d(
                    input[images], weight, bias, stride, padding, dilation, shape["groups"]
                )
            if direction == "backward_input":
                size = list(input[images].shape)
                return torch.ops.cnn_ext.conv2d_backward_input(grad_output[images], weight, size, *geometry)
            sizes = list(weight.shape)
            last = layout == "channels_last"
            return torch.ops.cnn_ext.conv2d_backward_weight(grad_output[images], input[images], sizes, *geometry, last)

    if direction == "forward":
        wanted = torch.nn.functional.conv2d(
            input.float(), weight.float(), bias.float(), stride, padding, dilation, shape["groups"]
        )
    else:
        gradients = torch.ops.aten.convolution_backward(
            *(t.float() for t in (grad_output, input, weight)),
            None, stride, padding, dilation, False, [0, 0], shape["groups"], mask,
        )  # fmt: skip
        wanted = gradients[mask.index(True)]
    whole = computed(slice(None))
    assert torch.equal(whole, wanted.to(torch.bfloat16))
    if direction != "backward_weight":
        assert torch.equal(whole[:1], computed(slice(0, 1)))
