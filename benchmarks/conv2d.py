"""Convolution: every direction and layout of a list of layers against torch's own."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import cnn_ext
from benchmarks.cases import Conv2dCase, conv2d_cases
from benchmarks.harness import BenchmarkError, Call, Comparison, check_close
from benchmarks.options import LAYOUTS, Bench
from cnn_ext import ops

DIRECTIONS = ("forward", "backward_input", "backward_weight")

# Where Winograd's algorithm is measured: below the first, transforms cost most; up to the second, the padding of tiles.
FEW_CHANNELS = 64
SMALL_MAP = 7

# What a number meets in Winograd's three transforms, at most: two passes of 8 (docs/kernels/winograd.md).
WINOGRAD_ROUNDINGS = 3 * 2 * 8

# A result is checked on the first samples of the batch, as many as torch in float64 computes in about a second.
CHECKED_FLOPS = 2e9

# Where torch has no fast kernel (0.2 to 1 GFLOP/s, up to a minute for a call), layers are measured on so many samples
# of their batch.
SLOW_FLOPS = {("cpu", torch.float16, "backward_weight"): 1e9}


@dataclass(frozen=True)
class Tensors:
    """The operands of one convolution, all in one layout, as a model in that memory format has them."""

    input: torch.Tensor
    weight: torch.Tensor
    grad_output: torch.Tensor
    channels_last: bool = False

    def in_layout(self, layout: str) -> "Tensors":
        moved = (tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in self._all())
        return Tensors(*moved, channels_last=layout == "channels_last")

    def first_samples(self, samples: int) -> "Tensors":
        return Tensors(self.input[:samples], self.weight, self.grad_output[:samples], self.channels_last)

    def double(self) -> "Tensors":
        return Tensors(*(tensor.double() for tensor in self._all()), channels_last=self.channels_last)

    def _all(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.input, self.weight, self.grad_output


def random_tensors(case: Conv2dCase, bench: Bench) -> Tensors:
    sizes = (case.input_size, case.weight_size, case.output_size)
    return Tensors(*(bench.random(size, seed) for seed, size in enumerate(sizes, 1)))


def ours(direction: str, case: Conv2dCase, t: Tensors, winograd: bool = False) -> Call:
    """The call at the level that users pay, with checks and allocation: the function, and what its backward calls."""
    stride, padding, dilation = (case.stride,) * 2, (case.padding,) * 4, (case.dilation,) * 2
    if direction == "forward":
        return lambda: cnn_ext.functional.conv2d(
            t.input, t.weight, None, case.stride, case.padding, case.dilation, case.groups
        )
    geometry = stride, padding, dilation, case.groups
    if direction == "backward_input":
        return lambda: ops.conv2d_backward_input(t.grad_output, t.weight, tuple(t.input.shape), *geometry, winograd)
    return lambda: ops.conv2d_backward_weight(
        t.grad_output, t.input, tuple(t.weight.shape), *geometry, t.channels_last, winograd
    )


def torchs(direction: str, case: Conv2dCase, t: Tensors) -> Call:
    """The same of torch: what its autograd calls, with only the wanted gradient asked for."""
    if direction == "forward":
        return lambda: F.conv2d(t.input, t.weight, None, case.stride, case.padding, case.dilation, case.groups)
    mask = [direction == "backward_input", direction == "backward_weight", False]
    stride, padding, dilation = [case.stride] * 2, [case.padding] * 2, [case.dilation] * 2

    def backward() -> torch.Tensor:
        gradients = torch.ops.aten.convolution_backward(
            t.grad_output, t.input, t.weight, None, stride, padding, dilation, False, [0, 0], case.groups, mask
        )
        return gradients[mask.index(True)]

    return backward


def run(bench: Bench, directions: tuple[str, ...] = DIRECTIONS) -> list[dict]:
    rows: list[dict] = []
    cases = conv2d_cases(bench.only, bench.layers)
    with cnn_ext.flags(winograd=bench.winograd):
        for number, case in enumerate(cases, 1):
            tensors = random_tensors(case, bench)
            for direction in directions:
                if bench.winograd and "_winograd_" not in _kernel(case, direction, tensors):
                    continue
                bench.progress(f"conv2d {number}/{len(cases)} {case.name} {direction}")
                rows += bench.rows_of(lambda: _rows_of(case, direction, tensors, bench))  # noqa: B023 - called at once
    if not rows and not bench.failures:
        raise BenchmarkError("--winograd: none of these layers takes it")
    return rows


def _class_of(case: Conv2dCase, bench: Bench) -> str:
    """The class of the list; where Winograd's algorithm is measured, what its speed depends on."""
    if not bench.winograd:
        return case.category
    kernel = f"{case.kernel_h}x{case.kernel_w}"
    if min(case.in_channels, case.out_channels) // case.groups < FEW_CHANNELS:
        return f"{kernel}, few channels"
    return f"{kernel}, 7x7 maps" if case.out_w <= SMALL_MAP else kernel


def _rows_of(case: Conv2dCase, direction: str, tensors: Tensors, bench: Bench) -> list[dict]:
    """One comparison: ours in each layout asked for, torch in both, for its better one is the best peer."""
    case, tensors = _measured(case, direction, tensors, bench)
    in_layout = {layout: tensors.in_layout(layout) for layout in LAYOUTS}
    errors = _check(case, direction, {layout: in_layout[layout] for layout in bench.layouts}, bench)
    contenders = {("torch", layout): torchs(direction, case, t) for layout, t in in_layout.items()}
    contenders |= {
        ("cnn_ext", layout): ours(direction, case, in_layout[layout], bench.winograd) for layout in bench.layouts
    }
    comparison = bench.compare(contenders)
    kernels = {layout: _kernel(case, direction, in_layout[layout]) for layout in bench.layouts}
    moved = case.elements * bench.dtype.itemsize
    return [
        _row(case, _class_of(case, bench), direction, layout, moved, comparison, kernels[layout], errors[layout])
        for layout in bench.layouts
    ]


def _measured(case: Conv2dCase, direction: str, tensors: Tensors, bench: Bench) -> tuple[Conv2dCase, Tensors]:
    """The case with as many samples as its direction is measured on."""
    flops = SLOW_FLOPS.get((bench.device, bench.dtype, direction), case.flops)
    samples = max(1, min(case.batch, int(flops * case.batch / case.flops)))
    return replace(case, batch=samples), tensors.first_samples(samples)


def _row(
    case: Conv2dCase,
    category: str,
    direction: str,
    layout: str,
    moved: int,
    times: Comparison,
    kernel: str,
    error: float,
) -> dict:
    speeds = times.against_torch(layout, LAYOUTS)
    gflops = 1e-6 * case.flops / speeds["ms"]
    return {
        "name": case.name,
        "class": category,
        "batch": case.batch,
        "op": "conv2d",
        "direction": direction,
        "layout": layout,
        "flops": case.flops,
        "bytes": moved,
        "kernel": kernel,
        **speeds,
        "gflops": gflops,
        "torch_gflops": 1e-6 * case.flops / speeds["torch_ms"],
        "peak_gflops": times.peak(),
        "share_of_peak": gflops / times.peak(),
        "max_error": error,
        **times.quality(),
    }


def _kernel(case: Conv2dCase, direction: str, t: Tensors) -> str:
    explanation = cnn_ext.explain(
        t.input, t.weight, None, case.stride, case.padding, case.dilation, case.groups, direction=direction
    )
    return explanation.kernel


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Inside, torch uses convolutions of its own on a GPU."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _check(case: Conv2dCase, direction: str, in_layout: dict[str, Tensors], bench: Bench) -> dict[str, float]:
    """The largest error of each layout against torch in float64, on the first samples."""
    samples = max(1, min(case.batch, int(CHECKED_FLOPS * case.batch / case.flops)))
    first = {layout: t.first_samples(samples) for layout, t in in_layout.items()}
    some = next(iter(first.values()))
    with _without_cudnn():  # which searches long in float64
        reference = torchs(direction, case, some.double())()
    tolerance = _tolerance(case, direction, some, bench)
    tolerance += bench.result_roundoff * float(reference.abs().max())
    return {
        layout: check_close(
            f"{case.name} {direction} {layout}", ours(direction, case, t, bench.winograd)(), reference, tolerance
        )
        for layout, t in first.items()
    }


def _tolerance(case: Conv2dCase, direction: str, t: Tensors, bench: Bench) -> float:
    """Error grows at most with the number of roundings and with the largest product among the terms. Winograd's may
    exceed that by far; on random data it does not, and its documented bound would let whole terms go missing.
    """
    operands: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor, int]]] = {
        "forward": lambda: (t.input, t.weight, case.terms_per_output),
        "backward_input": lambda: (t.grad_output, t.weight, case.terms_per_input),
        "backward_weight": lambda: (t.grad_output, t.input, case.terms_per_weight),
    }
    left, right, terms = operands[direction]()
    roundings = terms + 1 + (WINOGRAD_ROUNDINGS if bench.winograd else 0)
    return bench.unit_roundoff * roundings * float(left.abs().max()) * float(right.abs().max())
