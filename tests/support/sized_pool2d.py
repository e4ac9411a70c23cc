"""Adaptive pooling and unpooling for the tests: cases (the sizes of every pooling of the list), shape and truth."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy
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


def _windows(in_size: int, out_size: int) -> list[slice]:
    """The positions of each output's window over one axis."""
    return [slice(i * in_size // out_size, -(-(i + 1) * in_size // out_size)) for i in range(out_size)]


def _covered(in_size: int, out_size: int) -> torch.Tensor:
    """[out, in]: 1 where a position lies in the window of an output over one axis."""
    covered = torch.zeros(out_size, in_size, dtype=torch.float64)
    for row, window in zip(covered, _windows(in_size, out_size), strict=True):
        row[window] = 1
    return covered


def _adaptive_avg(case: SizedPool2dCase, backward: bool, tensor: torch.Tensor) -> Truth:
    (_, _, h, w), (_, _, oh, ow) = case.large_size, case.small_size
    covered = _covered(h, oh), _covered(w, ow)
    shares = [axis / axis.sum(1, keepdim=True) for axis in covered]
    equation = "ncij,ih,jw->nchw" if backward else "nchw,ih,jw->ncij"
    value, magnitude = (torch.einsum(equation, t.double(), *shares) for t in (tensor, tensor.abs()))
    terms = math.prod(axis.sum(0 if backward else 1).amax().item() for axis in covered)
    return Truth(value, magnitude, int(terms) + 1)


def _first_of_equals_or_last_nan(values: numpy.ndarray) -> numpy.ndarray:
    """Where along the last axis a maximum is taken from."""
    is_nan = numpy.isnan(values)
    last_nan = values.shape[-1] - 1 - is_nan[..., ::-1].argmax(-1)
    return numpy.where(is_nan.any(-1), last_nan, numpy.where(is_nan, -numpy.inf, values).argmax(-1))


def _adaptive_max(case: SizedPool2dCase, input: torch.Tensor) -> tuple[Truth, torch.Tensor]:
    best, index = torch.empty(case.small_size, dtype=torch.float64), torch.empty(case.small_size, dtype=torch.int64)
    (_, _, h, w), (_, _, oh, ow) = case.large_size, case.small_size
    planes, places = input.double().numpy(), numpy.arange(h * w).reshape(h, w)
    for i, rows in enumerate(_windows(h, oh)):
        for j, cols in enumerate(_windows(w, ow)):
            positions = places[rows, cols].reshape(-1)
            window = planes[:, :, rows, cols].reshape(*planes.shape[:2], len(positions))
            taken = _first_of_equals_or_last_nan(window)
            best[:, :, i, j] = torch.from_numpy(numpy.take_along_axis(window, taken[..., None], -1)[..., 0])
            index[:, :, i, j] = torch.from_numpy(positions[taken])
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
