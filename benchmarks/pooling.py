"""Pooling: inference, training (with the offsets or indices that backward needs) and backward, against torch's own."""

import copy

import torch
import torch.nn.functional as F

import cnn_ext
from benchmarks.cases import Pool2dCase, pool2d_cases
from benchmarks.harness import Call, Comparison, check_close, lower_quartile
from benchmarks.options import LAYOUTS, Bench
from cnn_ext import ops

DIRECTIONS = {"max": ("forward", "forward_training", "backward"), "avg": ("forward", "backward")}


class Pooling:
    """One case in one layout: the calls of both contenders for each direction."""

    def __init__(self, case: Pool2dCase, layout: str, bench: Bench) -> None:
        self.case = case
        self.input = bench.random(case.input_size, 1).contiguous(memory_format=LAYOUTS[layout])
        output = self.torchs("forward")()
        self.grad_output = bench.random(output.shape, 2).contiguous(memory_format=LAYOUTS[layout])
        self.bytes = bench.dtype.itemsize * (self.input.numel() + output.numel())
        if case.op == "max":
            self._indices = self._torch_training()[1]
            self._offsets = self._our_training()[1]

    def ours(self, direction: str) -> Call:
        c = self.case
        if direction == "forward_training":
            return lambda: self._our_training()[0]
        if direction == "forward":
            pool = cnn_ext.functional.max_pool2d if c.op == "max" else cnn_ext.functional.avg_pool2d
            return lambda: pool(self.input, c.kernel, c.stride, c.padding, ceil_mode=c.ceil_mode)
        size, window = tuple(c.input_size), self._window()
        if c.op == "max":
            return lambda: ops.max_pool2d_backward(self.grad_output, self._offsets, size, *window)
        return lambda: ops.avg_pool2d_backward(self.grad_output, size, *window, True, None)

    def torchs(self, direction: str) -> Call:
        c, two = self.case, self._two()
        if direction == "forward_training":
            return lambda: self._torch_training()[0]
        if direction == "forward":
            pool = F.max_pool2d if c.op == "max" else F.avg_pool2d
            return lambda: pool(self.input, c.kernel, c.stride, c.padding, ceil_mode=c.ceil_mode)
        if c.op == "max":
            return lambda: torch.ops.aten.max_pool2d_with_indices_backward(
                self.grad_output, self.input, *two, [1, 1], c.ceil_mode, self._indices
            )
        return lambda: torch.ops.aten.avg_pool2d_backward(self.grad_output, self.input, *two, c.ceil_mode, True, None)

    def double(self) -> "Pooling":
        """The same in float64, for torch's reference; the indices stay."""
        twin = copy.copy(self)
        twin.input, twin.grad_output = self.input.double(), self.grad_output.double()
        return twin

    def _two(self) -> tuple[list[int], list[int], list[int]]:
        return [self.case.kernel] * 2, [self.case.stride] * 2, [self.case.padding] * 2

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
        """Kernel size, stride, padding of each side, dilation, ceil_mode."""
        c = self.case
        return (c.kernel,) * 2, (c.stride,) * 2, (c.padding,) * 4, (1, 1), c.ceil_mode

    def _our_training(self) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.max_pool2d_forward(self.input, *self._window(), True)

    def _torch_training(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.aten.max_pool2d_with_indices(self.input, *self._two(), [1, 1], self.case.ceil_mode)


def run(bench: Bench) -> list[dict]:
    rows: list[dict] = []
    cases = pool2d_cases(bench.only)
    for number, case in enumerate(cases, 1):
        in_layout = {layout: Pooling(case, layout, bench) for layout in LAYOUTS}
        for direction in DIRECTIONS[case.op]:
            bench.progress(f"pooling {number}/{len(cases)} {case.name} {direction}")
            rows += bench.rows_of(lambda: _rows_of(case, direction, in_layout, bench))  # noqa: B023 - called at once
    return rows


def _rows_of(case: Pool2dCase, direction: str, in_layout: dict[str, Pooling], bench: Bench) -> list[dict]:
    errors = {layout: _check(direction, layout, in_layout[layout], bench) for layout in bench.layouts}
    contenders = {("torch", layout): pooling.torchs(direction) for layout, pooling in in_layout.items()}
    contenders |= {("cnn_ext", layout): in_layout[layout].ours(direction) for layout in bench.layouts}
    on_gpu = bench.device == "cuda"
    moved = next(iter(in_layout.values())).bytes
    if on_gpu:
        contenders["copy"] = _copy(moved, bench)
    times = bench.compare(contenders)
    rows = [_row(case, direction, layout, moved, times, errors[layout]) for layout in bench.layouts]
    if on_gpu:
        copy_ms = 1e3 * lower_quartile(times.flushed["copy"])
        for row in rows:
            row |= {"copy_ms": copy_ms, "share_of_copy": copy_ms / row["flushed_ms"]}
    return rows


def _copy(moved: int, bench: Bench) -> Call:
    """torch's copy of a tensor that reads and writes ``moved`` bytes: what memory allows a call of this size."""
    source, target = (torch.ones(moved // 2, dtype=torch.uint8, device=bench.device) for _ in range(2))
    return lambda: target.copy_(source)


def _row(case: Pool2dCase, direction: str, layout: str, moved: int, times: Comparison, error: float) -> dict:
    speeds = times.against_torch(layout, LAYOUTS)
    from_memory = "flushed_" if times.flushed else ""
    return {
        "name": case.name,
        "class": f"{case.op} {case.kernel}x{case.kernel} stride {case.stride}",
        "batch": case.batch,
        "op": f"{case.op}_pool2d",
        "direction": direction,
        "layout": layout,
        "bytes": moved,
        **speeds,
        "gbytes_per_s": 1e-6 * moved / speeds[f"{from_memory}ms"],
        "torch_gbytes_per_s": 1e-6 * moved / speeds[f"{from_memory}torch_ms"],
        "peak_gflops": times.peak(),
        "max_error": error,
        **times.quality(),
    }


def _check(direction: str, layout: str, pooling: Pooling, bench: Bench) -> float:
    """Against torch in float64; a maximum is exact, sums round once per term."""
    case = pooling.case
    reference = pooling.double().torchs(direction)()
    terms = 0 if case.op == "max" and direction != "backward" else case.kernel**2 + 1
    operand = pooling.input if direction != "backward" else pooling.grad_output
    tolerance = bench.unit_roundoff * terms * float(operand.abs().max())
    tolerance += bench.result_roundoff * float(reference.abs().max()) * (terms > 0)
    what = f"{case.name} {case.op} {direction} {layout}"
    return check_close(what, pooling.ours(direction)(), reference, tolerance)
