"""The problems of shapes/*.csv: layers of real networks, each with its source."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import cnn_ext
from benchmarks.harness import BenchmarkError

SHAPES = Path(__file__).parent / "shapes"

# The lists of convolutions: characteristic ones, and every one of some networks (network_layers.py).
LAYERS = ("conv2d", "networks")


@dataclass(frozen=True)
class Conv2dCase:
    name: str
    category: str
    batch: int
    in_channels: int
    in_h: int
    in_w: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride: int
    padding: int
    dilation: int
    groups: int

    @property
    def out_h(self) -> int:
        return cnn_ext.output_size(self.in_h, self.kernel_h, self.padding, self.stride, self.dilation)

    @property
    def out_w(self) -> int:
        return cnn_ext.output_size(self.in_w, self.kernel_w, self.padding, self.stride, self.dilation)

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return (self.batch, self.in_channels, self.in_h, self.in_w)

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.in_channels // self.groups, self.kernel_h, self.kernel_w)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return (self.batch, self.out_channels, self.out_h, self.out_w)

    @property
    def terms_per_weight(self) -> int:
        """How many products one element of grad_weight adds up."""
        return self.batch * self.out_h * self.out_w

    @property
    def terms_per_output(self) -> int:
        return self.weight_size[1] * self.kernel_h * self.kernel_w

    @property
    def terms_per_input(self) -> int:
        """At most; fewer where the stride is above 1."""
        return self.out_channels // self.groups * self.kernel_h * self.kernel_w

    @property
    def flops(self) -> int:
        """The same in each direction: a multiplication and an addition per tap, those on the padding included."""
        return 2 * self.batch * self.out_channels * self.out_h * self.out_w * self.terms_per_output

    @property
    def elements(self) -> int:
        """Of the three tensors: what any algorithm has to move."""
        return sum(_count(size) for size in (self.input_size, self.weight_size, self.output_size))


@dataclass(frozen=True)
class Pool2dCase:
    name: str
    op: str  # max or avg
    batch: int
    channels: int
    in_h: int
    in_w: int
    kernel: int
    stride: int
    padding: int
    ceil_mode: bool

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, self.in_h, self.in_w)


def _count(size: tuple[int, ...]) -> int:
    product = 1
    for extent in size:
        product *= extent
    return product


def conv2d_cases(only: str | None = None, layers: str = "conv2d") -> list[Conv2dCase]:
    """Of ``shapes/<layers>.csv``."""
    columns = ("N", "C", "H", "W", "K", "kh", "kw", "stride", "pad", "dilation", "groups")
    return [
        Conv2dCase(row["name"], row["class"], *(int(row[column]) for column in columns))
        for row in _rows(f"{layers}.csv", only)
    ]


def pool2d_cases(only: str | None = None) -> list[Pool2dCase]:
    columns = ("N", "C", "H", "W", "k", "s", "p")
    return [
        Pool2dCase(row["name"], row["op"], *(int(row[column]) for column in columns), ceil_mode=row["ceil"] == "1")
        for row in _rows("pool2d.csv", only)
    ]


def _rows(file: str, only: str | None) -> list[dict[str, str]]:
    with open(SHAPES / file, newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if only is None or re.search(only, row["name"])]
    if not rows:
        raise BenchmarkError(f"--only: no name in shapes/{file} matches {only!r}")
    return rows
