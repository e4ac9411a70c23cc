"""The shared list of cases, read from ``tests/cases/*.csv`` (``csrc/tests/kernel_check`` reads the same files).

A case is a problem, not yet a dtype or a layout: ``case.tensors(dtype)`` makes its inputs, contiguous, from a seed
that is a function of the case's name, so a failure reproduces alone.
"""

import csv
import functools
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

CASES = Path(__file__).resolve().parent.parent / "cases"


def conv_extent(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    """Output size of a convolution along one axis."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def pool_extent(size: int, before: int, after: int, kernel: int, stride: int, dilation: int, ceil_mode: bool) -> int:
    """Output size of a pooling along one axis; with ``ceil_mode`` no window starts in the padding behind the input."""
    overhang = stride - 1 if ceil_mode else 0
    out = (size + before + after - dilation * (kernel - 1) - 1 + overhang) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + before else out


def generator(name: str) -> torch.Generator:
    """A random generator whose seed is a function of ``name`` alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Conv2dCase:
    """One line of ``conv2d.csv``."""

    name: str
    batch: int
    in_channels: int
    in_h: int
    in_w: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_bottom: int
    pad_left: int
    pad_right: int
    dilation_h: int
    dilation_w: int
    groups: int

    def __str__(self) -> str:
        return self.name

    def with_batch(self, batch: int):
        return replace(self, batch=batch)

    @property
    def out_h(self) -> int:
        return conv_extent(self.in_h, self.pad_top, self.pad_bottom, self.kernel_h, self.stride_h, self.dilation_h)

    @property
    def out_w(self) -> int:
        return conv_extent(self.in_w, self.pad_left, self.pad_right, self.kernel_w, self.stride_w, self.dilation_w)

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.kernel_h, self.kernel_w

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Top, bottom, left, right."""
        return self.pad_top, self.pad_bottom, self.pad_left, self.pad_right

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_h, self.dilation_w

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, self.in_h, self.in_w

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, self.kernel_h, self.kernel_w

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, self.out_h, self.out_w

    @property
    def multiplications(self) -> int:
        """Of one direction, as dispatch counts them."""
        taps = self.in_channels // self.groups * self.kernel_h * self.kernel_w
        return self.batch * self.out_channels * self.out_h * self.out_w * taps

    def tensors(self, dtype: torch.dtype) -> SimpleNamespace:
        """``input``, ``weight``, ``bias`` and ``grad_output``: contiguous, normally distributed."""
        g = generator(self.name)
        sizes = {
            "input": self.input_size,
            "weight": self.weight_size,
            "bias": (self.out_channels,),
            "grad_output": self.output_size,
        }
        return SimpleNamespace(
            **{name: torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for name, size in sizes.items()}
        )


@dataclass(frozen=True)
class Pool2dCase:
    """One line of ``pool2d.csv``; ``divisor_override`` 0 means none."""

    name: str
    batch: int
    channels: int
    in_h: int
    in_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_bottom: int
    pad_left: int
    pad_right: int
    dilation_h: int
    dilation_w: int
    ceil_mode: int
    count_include_pad: int
    divisor_override: int

    def __str__(self) -> str:
        return self.name

    def with_batch(self, batch: int):
        return replace(self, batch=batch)

    @property
    def out_h(self) -> int:
        return pool_extent(
            self.in_h,
            self.pad_top,
            self.pad_bottom,
            self.kernel_h,
            self.stride_h,
            self.dilation_h,
            bool(self.ceil_mode),
        )

    @property
    def out_w(self) -> int:
        return pool_extent(
            self.in_w,
            self.pad_left,
            self.pad_right,
            self.kernel_w,
            self.stride_w,
            self.dilation_w,
            bool(self.ceil_mode),
        )

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.kernel_h, self.kernel_w

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Top, bottom, left, right."""
        return self.pad_top, self.pad_bottom, self.pad_left, self.pad_right

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_h, self.dilation_w

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.in_h, self.in_w

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.out_h, self.out_w

    @property
    def offsets_dtype(self) -> torch.dtype:
        """One byte per output while the window has at most 256 taps."""
        return torch.uint8 if self.kernel_h * self.kernel_w <= 256 else torch.int32

    @property
    def multiplications(self) -> int:
        """The taps of all windows, as dispatch counts them."""
        return self.batch * self.channels * self.out_h * self.out_w * self.kernel_h * self.kernel_w

    def tensors(self, dtype: torch.dtype) -> SimpleNamespace:
        """``input``, with many ties and both zeros (max pooling takes the first of equals), and ``grad_output``."""
        g = generator(self.name)
        input = torch.randn(self.input_size, generator=g, dtype=torch.float64)
        half = torch.rand(self.input_size, generator=g) < 0.5
        grad_output = torch.randn(self.output_size, generator=g, dtype=torch.float64)
        return SimpleNamespace(
            input=torch.where(half, input.mul(2).round().div(2), input).to(dtype), grad_output=grad_output.to(dtype)
        )


# Window and stride, the same along both axes, of the poolings that every convolution is fused with; as kernel_check's.
FUSED_POOLS = ((1, 1), (2, 2), (3, 2), (2, 1))
NO_GRADIENT = 255  # the offset of a window that passes no gradient


@dataclass(frozen=True)
class FusedCase:
    """A convolution, its ReLU and the max pooling of that; (1, 1) is the ReLU alone."""

    conv: Conv2dCase
    window: int
    stride: int

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return f"{self.conv.name}_pool{self.window}_stride{self.stride}"

    @property
    def batch(self) -> int:
        return self.conv.batch

    def with_batch(self, batch: int) -> "FusedCase":
        return replace(self, conv=self.conv.with_batch(batch))

    @property
    def has_pooling(self) -> bool:
        return (self.window, self.stride) != (1, 1)

    @property
    def pool(self) -> Pool2dCase:
        """The pooling of the convolution's output."""
        channels, height, width = self.conv.output_size[1:]
        return Pool2dCase(
            self.name,
            self.batch,
            channels,
            height,
            width,
            *(self.window, self.window, self.stride, self.stride),
            *(0, 0, 0, 0, 1, 1),
            ceil_mode=0,
            count_include_pad=0,
            divisor_override=0,
        )

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return self.pool.output_size

    @property
    def multiplications(self) -> int:
        return self.conv.multiplications

    def tensors(self, dtype: torch.dtype) -> SimpleNamespace:
        """The convolution's operands; ``grad_output`` and ``mask`` of the pooled size.

        The mask is what backward reads: offsets, of which a quarter passes no gradient, or an output, half of it zeros.
        """
        g = generator(self.name)
        conv = shared_tensors(self.conv, dtype)
        taps = torch.randint(self.window**2, self.output_size, generator=g).to(torch.uint8)
        stopped = torch.rand(self.output_size, generator=g) < 0.25
        normal = torch.randn(self.output_size, generator=g, dtype=torch.float64).to(dtype)
        return SimpleNamespace(
            input=conv.input,
            weight=conv.weight,
            bias=conv.bias,
            grad_output=torch.randn(self.output_size, generator=g, dtype=torch.float64).to(dtype),
            mask=taps.masked_fill(stopped, NO_GRADIENT) if self.has_pooling else normal.relu(),
        )


def _read(file: str, case: type) -> tuple:
    with open(CASES / file, newline="") as lines:
        return tuple(
            case(**{field: value if field == "name" else int(value) for field, value in row.items()})
            for row in csv.DictReader(lines)
        )


@functools.cache
def conv2d_cases() -> tuple[Conv2dCase, ...]:
    """Every convolution of the list."""
    return _read("conv2d.csv", Conv2dCase)


@functools.cache
def cuda_conv2d_cases() -> tuple[Conv2dCase, ...]:
    """More convolutions for the rows that only a GPU runs: as large as their tiles, or as deep as their splits."""
    return _read("conv2d_cuda.csv", Conv2dCase)


@functools.cache
def pool2d_cases() -> tuple[Pool2dCase, ...]:
    """Every pooling of the list; each one serves max and average pooling."""
    return _read("pool2d.csv", Pool2dCase)


@functools.cache
def fused_cases() -> tuple[FusedCase, ...]:
    """The convolutions of the list, each with one of the poolings in turn, where its output holds the window, and those
    for the rows that go by the maxima of windows alone."""
    poolings = zip(conv2d_cases(), itertools.cycle(FUSED_POOLS), strict=False)
    in_turn = tuple(
        FusedCase(conv, window, stride)
        for conv, (window, stride) in poolings
        if conv.out_h >= window and conv.out_w >= window
    )
    return in_turn + tuple(FusedCase(conv, 2, 2) for conv in _read("conv2d_maxima.csv", Conv2dCase))


HALF_STEP = 5  # as kernel_check's


def for_dtype(cases: Sequence, dtype: torch.dtype) -> Sequence:
    """Of ``cases``, those to run in ``dtype``: of the half types, whose paths are float32's between other loads and
    stores, some show that."""
    return cases[::HALF_STEP] if dtype.itemsize == 2 else cases


@functools.cache
def shared_tensors(case: Conv2dCase | FusedCase | Pool2dCase, dtype: torch.dtype) -> SimpleNamespace:
    """``case.tensors(dtype)``, made once, for tests that only read them."""
    return case.tensors(dtype)


def case_named(name: str) -> Conv2dCase | Pool2dCase:
    """The case called ``name``; convolutions are looked at first."""
    return next(case for case in (*conv2d_cases(), *pool2d_cases()) if case.name == name)
