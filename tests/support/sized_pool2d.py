"""Adaptive pooling and unpooling for the tests: cases (the sizes of every pooling of the list), shape and truth."""

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from cnn_ext import _native
from tests.support.cases import Pool2dCase
from tests.support.reference import Truth, exact


@dataclass(frozen=True)
class SizedPool2dCase:
    """The sizes of a pooling."""

    pool: Pool2dCase

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return self.pool.name

    @property
    def batch(self) -> int:
        return self.pool.batch

    def with_batch(self, batch: int) -> "SizedPool2dCase":
        return replace(self, pool=self.pool.with_batch(batch))

    @property
    def large_size(self) -> tuple[int, int, int, int]:
        return self.pool.input_size

    @property
    def small_size(self) -> tuple[int, int, int, int]:
        return self.pool.output_size

    @property
    def multiplications(self) -> int:
        """The elements of both tensors, as dispatch counts them."""
        (n, c, h, w), (_, _, oh, ow) = self.large_size, self.small_size
        return n * c * (h * w + oh * ow)

    def tensors(self, dtype: torch.dtype) -> SimpleNamespace:
        """The pooling's ``input`` and ``grad_output`` of the larger and the smaller size, and ``indices``, not all of
        them different."""
        tensors = self.pool.tensors(dtype)
        places = self.large_size[2] * self.large_size[3]
        steps = torch.arange(tensors.grad_output.numel()).reshape(self.small_size)
        return SimpleNamespace(**vars(tensors), indices=steps * 7919 % places // 2)

    def shape(self, dtype: torch.dtype, layout: str):
        """The struct that the kernels are given."""
        fields = "batch channels in_h in_w out_h out_w"
        return _native.SizedPool2dShape(
            **{field: getattr(self.pool, field) for field in fields.split()},
            dtype=_native.DTYPES[dtype],
            layout=getattr(_native.Layout, layout),
        )


def _covered(in_size: int, out_size: int) -> torch.Tensor:
    """[out, in]: whether a position lies in the window of an output over one axis."""
    outputs, positions = torch.arange(out_size)[:, None], torch.arange(in_size)
    first, last = outputs * in_size // out_size, -(-(outputs + 1) * in_size // out_size)
    return (first <= positions) & (positions < last)


@functools.cache
def _membership(case: SizedPool2dCase) -> torch.Tensor:
    """[OH, OW, H, W]: whether an element lies in a window."""
    (_, _, h, w), (_, _, oh, ow) = case.large_size, case.small_size
    return _covered(h, oh)[:, None, :, None] & _covered(w, ow)[None, :, None, :]


def _adaptive_avg(case: SizedPool2dCase, backward: bool, tensor: torch.Tensor) -> Truth:
    inside = _membership(case).double()
    shares = inside / inside.sum((2, 3), keepdim=True)
    equation = "ncij,ijhw->nchw" if backward else "nchw,ijhw->ncij"
    value, magnitude = (torch.einsum(equation, t.double(), shares) for t in (tensor, tensor.abs()))
    terms = inside.sum((0, 1) if backward else (2, 3)).amax().item()
    return Truth(value, magnitude, int(terms) + 1)


def _adaptive_max(case: SizedPool2dCase, input: torch.Tensor) -> tuple[Truth, torch.Tensor]:
    """The first of equals, the last of NaNs."""
    best = torch.full(case.small_size, -torch.inf, dtype=torch.float64)
    index = torch.full(case.small_size, -1)
    (_, _, h, w), inside = case.large_size, _membership(case)
    for place in range(h * w):
        value = input[:, :, place // w, place % w].double()[..., None, None]
        takes = inside[:, :, place // w, place % w] & ((index < 0) | (value > best) | value.isnan())
        best, index = torch.where(takes, value, best), torch.where(takes, place, index)
    return exact(best), index


def _unpool(case: SizedPool2dCase, direction: str, tensors) -> Truth:
    (n, c, h, w), indices = case.large_size, tensors.indices.flatten(2)
    if direction == "gather":
        return exact(tensors.input.flatten(2).gather(2, indices).reshape(case.small_size))
    values, planes = tensors.grad_output.double().flatten(2), torch.zeros(n, c, h * w, dtype=torch.float64)
    if direction == "scatter":
        scattered = [planes.scatter_add(2, indices, t).reshape(case.large_size) for t in (values, values.abs())]
        return Truth(*scattered, max(0, values.shape[2] - 1))
    for i in range(values.shape[2]):
        planes.scatter_(2, indices[:, :, i : i + 1], values[:, :, i : i + 1])
    return exact(planes.reshape(case.large_size))


def truth(op: str, direction: str, case: SizedPool2dCase, tensors) -> tuple[Truth, torch.Tensor | None]:
    """What a row writes, and the indices if it writes them."""
    if op == "adaptive_max_pool2d":
        return _adaptive_max(case, tensors.input)
    if op == "adaptive_avg_pool2d":
        backward = direction == "backward"
        return _adaptive_avg(case, backward, tensors.grad_output if backward else tensors.input), None
    return _unpool(case, direction, tensors), None
