"""What an eager call costs above its kernel: each function on a 1x1x4x4 input, beside torch's and the bare kernel."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import cnn_ext.functional as C
from benchmarks import machine
from benchmarks.harness import Call, CpuTimer, Effort, compare
from benchmarks.tables import Column, plain
from cnn_ext import _native
from cnn_ext.ops import conv2d, pooling
from cnn_ext.ops.shapes import spec

EFFORT = Effort(repeats=60, seconds=2.0)
WINDOW = ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), False)
COLUMNS = [
    Column("name", lambda row: row["name"]),
    *(Column(f"{who} us", lambda row, who=who: row[who], ".2f") for who in ("kernel", "torch", "cnn_ext", "overhead")),
]


def measure(results: Path) -> None:
    """Writes ``results``/overhead_cpu.json: microseconds of a call, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        document = machine.describe("cpu") | {"command": "python -m benchmarks overhead"}
        document["rows"] = [_row(name, calls) for name, calls in _contenders()]
    finally:
        torch.set_num_threads(threads)
    path = results / "overhead_cpu.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(plain(COLUMNS, document["rows"]))
    print(f"wrote {path}")


def _row(name: str, calls: dict[str, Call]) -> dict:
    print(f"overhead: {name}", file=sys.stderr)
    comparison = compare(calls, CpuTimer(), _no_peak, EFFORT)
    microseconds = {who: 1e6 * comparison.lower_quartile(who) for who in calls}
    overhead = microseconds["cnn_ext"] - microseconds["kernel"]
    return {"name": name} | microseconds | {"overhead": overhead} | comparison.quality()


def _no_peak() -> float:
    """No rate is quoted here."""
    return 1.0


def _kernel(entry, shape, *tensors: torch.Tensor) -> Call:
    """The compiled function on prepared addresses."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    return lambda: (entry(shape, *addresses, 1), tensors)


def _contenders() -> Iterator[tuple[str, dict[str, Call]]]:
    input, weight, bias = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3), torch.randn(1)
    trained = weight.clone().requires_grad_()
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    shape, size, *_ = conv2d.prepare_forward(spec(input), spec(weight), spec(bias), geometry)
    kernel = _kernel(_native.cpu.conv2d_forward, shape, input, weight, bias, torch.empty(size))
    for name, filters in (("conv2d", weight), ("conv2d with a gradient to come", trained)):
        yield (
            name,
            {
                "kernel": kernel,
                "torch": lambda w=filters: F.conv2d(input, w, bias),
                "cnn_ext": lambda w=filters: C.conv2d(input, w, bias),
            },
        )
    shape, size, _ = pooling.prepare_avg_forward(spec(input), WINDOW, True, None)
    yield (
        "avg_pool2d",
        {
            "kernel": _kernel(_native.cpu.avg_pool2d_forward, shape, input, torch.empty(size)),
            "torch": lambda: F.avg_pool2d(input, 2),
            "cnn_ext": lambda: C.avg_pool2d(input, 2),
        },
    )
