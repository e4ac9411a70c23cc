"""Calls drawn at random: shapes, arguments and how they are written, dtypes, layouts, which operands want gradients.

A call is a function of its function's name and a number, so that a failure reproduces alone. Sizes are chosen against
vectors and register tiles (1, 7, 8, 9, 14, 15, 16, 17, 33). What torch refuses is drawn too: both have to refuse it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 5, 7, 8, 9, 11, 14, 15, 16, 17, 33)
CHANNELS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33)


@dataclass(frozen=True)
class Call:
    """One call: the operands as recipes (a size, a layout, a seed), the other arguments in the signature's order."""

    function: str
    number: int
    dtype: torch.dtype
    sizes: dict[str, tuple[int, ...] | None]
    layouts: dict[str, str]
    arguments: dict[str, object]
    positional: int  # how many of the arguments are written without their names
    wants_grad: frozenset[str]
    grad_layout: str
    values: str = "normal"
    unpooled: tuple[tuple[int, int], int] | None = None  # of max_unpool: the windows and the width of its output

    def __str__(self) -> str:
        operands = ", ".join(f"{name} {size} {self.layouts[name]}" for name, size in self.sizes.items() if size)
        return (
            f"{self.function} #{self.number} {self.dtype} ({operands}; {self.arguments}, {self.positional} positional; "
            f"gradients of {sorted(self.wants_grad)}, {self.grad_layout})"
        )

    @property
    def repeats_terms(self) -> bool:
        """Whether a sum may have many equal terms."""
        return "expanded" in (*self.layouts.values(), self.grad_layout)

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The operands, the same in every process."""
        generator = torch.Generator().manual_seed(self.number)
        made = {}
        for name, size in self.sizes.items():
            made[name] = None if size is None else self._tensor(size, self.layouts[name], generator)
        if self.unpooled is not None:
            made["indices"] = self._indices(self.sizes["input"], generator)
        return made

    def _indices(self, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """One place in each window of an output without overlap: where two share one, torch's result is not defined."""
        (kernel_h, kernel_w), width = self.unpooled
        rows = torch.arange(size[-2])[:, None] * kernel_h + torch.randint(kernel_h, size, generator=generator)
        columns = torch.arange(size[-1]) * kernel_w + torch.randint(kernel_w, size, generator=generator)
        return rows * width + columns

    def _tensor(self, size: tuple[int, ...], layout: str, generator: torch.Generator) -> torch.Tensor:
        tensor = torch.randn(size, generator=generator, dtype=torch.float64)
        if self.values != "normal":  # ties: the first of equal maxima counts
            tensor = tensor.mul(2).round().div(2)
        if self.values == "salted" and tensor.numel():
            salt = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0], dtype=torch.float64)
            chosen = torch.rand(size, generator=generator) < 0.1
            tensor = torch.where(chosen, salt[torch.randint(4, size, generator=generator)], tensor)
        return laid_out(tensor.to(self.dtype), layout)

    def grad_output(self, output: torch.Tensor) -> torch.Tensor:
        """The gradient that backward starts from, in the layout that was drawn."""
        generator = torch.Generator().manual_seed(self.number + 1)
        if self.grad_layout == "expanded":
            return torch.randn((), generator=generator, dtype=torch.float64).to(self.dtype).expand(output.shape)
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        return laid_out(grad.to(self.dtype), self.grad_layout)

    def split_arguments(self) -> tuple[list, dict]:
        """The arguments after the operands: those without and those with their names."""
        names = list(self.arguments)
        first = names[: self.positional]
        return [self.arguments[name] for name in first], {name: self.arguments[name] for name in names[len(first) :]}


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor
    if layout == "sliced":  # every second element of a larger tensor, from an odd place
        larger = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
        larger[..., 1::2] = tensor
        return larger[..., 1::2]
    if layout == "expanded" and tensor.dim() > 1 and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    return tensor


LAYOUTS = ("contiguous", "contiguous", "channels_last", "channels_last", "transposed", "sliced", "expanded")


class Draw:
    """Draws the parts of a call."""

    def __init__(self, function: str, number: int):
        self.random = random.Random(f"{function} {number}")
        self.function, self.number = function, number

    def of(self, *values):
        return self.random.choice(values)

    def extent(self) -> int:
        return self.of(*SIZES)

    def per_axis(self, rank: int, *values):
        """A number for all axes or one for each, as a tuple or a list."""
        if self.random.random() < 0.5:
            return self.of(*values)
        return self.of(tuple, list)(self.of(*values) for _ in range(rank))

    def batched(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The size of one sample, of a batch, or of an empty one."""
        batch = self.of(None, 0, 1, 1, 2, 2, 3)
        return size if batch is None else (batch, *size)

    def call(self, sizes: dict, arguments: dict, *, optional: int = 0, **rest) -> Call:
        """The rest of a call, at random. Of the arguments, the last ``optional`` may be left to their defaults."""
        kept = dict(list(arguments.items())[: len(arguments) - self.random.randint(0, optional)])
        given = [name for name, size in sizes.items() if size is not None]
        return Call(
            function=self.function,
            number=self.number,
            dtype=self.of(*DTYPES),
            sizes=sizes,
            layouts={name: self.of(*LAYOUTS) for name in sizes},
            arguments=kept,
            positional=self.random.randint(0, len(kept)),
            wants_grad=frozenset(name for name in given if self.random.random() < 0.6),
            grad_layout=self.of("contiguous", "channels_last", "expanded", "sliced"),
            **rest,
        )


def _channels(draw: Draw) -> tuple[int, int, int]:
    """(groups, input channels of a group, output channels of a group): dense, grouped or depthwise."""
    kind = draw.of("dense", "dense", "grouped", "depthwise")
    if kind == "dense":
        return 1, draw.of(*CHANNELS), draw.of(*CHANNELS)
    if kind == "grouped":
        return draw.of(2, 3, 4), draw.of(1, 2, 4, 5, 8), draw.of(1, 2, 4, 5, 8)
    return draw.of(*CHANNELS), 1, draw.of(1, 1, 1, 2, 3)


def convolution(rank: int) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        groups, inputs, outputs = _channels(draw)
        size = tuple(draw.extent() for _ in range(rank))
        kernel = tuple(draw.of(1, 1, 2, 3, 3, 3, 4, 5, 7) for _ in range(rank))
        stride = draw.per_axis(rank, 1, 1, 2, 3)
        padding = draw.of("same", "valid", *(draw.per_axis(rank, 0, 1, 2, 3) for _ in range(4)))
        sizes = {
            "input": draw.batched((groups * inputs, *size)),
            "weight": (groups * outputs, inputs, *kernel),
            "bias": draw.of(None, (groups * outputs,)),
        }
        arguments = {"stride": stride, "padding": padding, "dilation": draw.per_axis(rank, 1, 1, 2), "groups": groups}
        return draw.call(sizes, arguments, optional=0 if groups > 1 else 4)

    return make


def transposed_convolution(rank: int) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        groups, inputs, outputs = _channels(draw)
        size = tuple(draw.of(1, 2, 3, 5, 7, 8, 9, 14, 17) for _ in range(rank))
        kernel = tuple(draw.of(1, 2, 3, 3, 4, 5) for _ in range(rank))
        sizes = {
            "input": draw.batched((groups * inputs, *size)),
            "weight": (groups * inputs, outputs, *kernel),
            "bias": draw.of(None, (groups * outputs,)),
        }
        empty = len(sizes["input"]) == rank + 2 and sizes["input"][0] == 0
        arguments = {
            "stride": draw.per_axis(rank, 1, 2, 2, 3),
            # Of an empty batch torch does not check these two.
            "padding": 0 if empty else draw.per_axis(rank, 0, 0, 1, 2),
            "output_padding": 0 if empty else draw.per_axis(rank, 0, 0, 0, 1, 2),
            "groups": groups,
            "dilation": draw.per_axis(rank, 1, 1, 2),
        }
        return draw.call(sizes, arguments, optional=1 if groups > 1 else 5)

    return make


def _window(draw: Draw, rank: int) -> dict:
    kernel = draw.per_axis(rank, 1, 2, 2, 3, 3, 5, draw.of(3, 13))
    smallest = kernel if isinstance(kernel, int) else min(kernel)
    refused = draw.random.random() < 0.1  # more than half a window
    paddings = (1, 2) if refused else (0, 0, smallest // 2)
    return {
        "kernel_size": kernel,
        "stride": draw.of(None, draw.per_axis(rank, 1, 2, 2, 3)),
        "padding": draw.per_axis(rank, *paddings),
    }


def _pooled_input(draw: Draw, rank: int, smallest: int = 1) -> dict:
    extents = (max(smallest, draw.extent()) for _ in range(rank))
    return {"input": draw.batched((draw.of(*CHANNELS), *extents))}


def max_pooling(rank: int) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        arguments = _window(draw, rank) | {
            "dilation": draw.per_axis(rank, 1, 1, 2),
            "ceil_mode": draw.of(False, True),
            "return_indices": draw.of(False, True),
        }
        # At least a dilation wide: torch writes outside of its memory where all taps of a window miss the input.
        input = _pooled_input(draw, rank, smallest=2)
        return draw.call(input, arguments, optional=5, values=draw.of("ties", "normal", "salted"))

    return make


def average_pooling(rank: int) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        arguments = _window(draw, rank) | {"ceil_mode": draw.of(False, True), "count_include_pad": draw.of(True, False)}
        if rank == 2:
            arguments["divisor_override"] = draw.of(None, None, 1, 3, -2, 0)
        return draw.call(_pooled_input(draw, rank), arguments, optional=len(arguments) - 1)

    return make


def adaptive_pooling(values: tuple[str, ...], **more: tuple) -> Callable[[Draw], Call]:
    def make(draw: Draw) -> Call:
        size = draw.of(1, 2, 3, 7, (1, 1), (2, 3), (5, None), (None, 4), (7, 7), (17, 1), (0, 2))
        arguments = {"output_size": size} | {name: draw.of(*options) for name, options in more.items()}
        return draw.call(_pooled_input(draw, 2), arguments, optional=len(more), values=draw.of(*values))

    return make


def max_unpooling(draw: Draw) -> Call:
    kernel = (draw.of(1, 2, 3), draw.of(1, 2, 3))
    outputs = [draw.of(1, 2, 3, 4, 7, 8, 17) for _ in range(2)]
    extents = [output * k + draw.of(0, 0, k - 1) for output, k in zip(outputs, kernel, strict=True)]
    size = draw.batched((draw.of(*CHANNELS), *outputs))
    full = draw.of(tuple(extents), [*size[:-2], *extents])
    arguments = {"kernel_size": kernel, "stride": draw.of(None, kernel), "padding": 0, "output_size": full}
    return draw.call({"input": size}, arguments, unpooled=(kernel, extents[1]))


FUNCTIONS: dict[str, Callable[[Draw], Call]] = {
    "conv1d": convolution(1),
    "conv2d": convolution(2),
    "conv_transpose1d": transposed_convolution(1),
    "conv_transpose2d": transposed_convolution(2),
    "max_pool1d": max_pooling(1),
    "max_pool2d": max_pooling(2),
    "avg_pool1d": average_pooling(1),
    "avg_pool2d": average_pooling(2),
    "adaptive_avg_pool2d": adaptive_pooling(("normal",)),
    "adaptive_max_pool2d": adaptive_pooling(("ties", "normal", "salted"), return_indices=(False, True)),
    "max_unpool2d": max_unpooling,
}

# How often each function is drawn: convolutions have the most arguments.
SHARES = {"conv2d": 4, "conv_transpose2d": 3, "conv1d": 2, "conv_transpose1d": 2, "max_pool2d": 3, "avg_pool2d": 3}


def draw_call(function: str, number: int) -> Call:
    return FUNCTIONS[function](Draw(function, number))


def draw_calls(count: int, functions: list[str]) -> list[Call]:
    """The first calls of each function, ``count`` in all."""
    total = sum(SHARES.get(function, 1) for function in functions)
    return [
        draw_call(function, number)
        for function in functions
        for number in range(-(-count * SHARES.get(function, 1) // total))
    ]
