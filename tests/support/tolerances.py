"""THE tolerance: how far a kernel may be from the truth.

An output is a sum of terms. Each of the ``roundings`` that a term meets on its way (its product, the additions, a
division) is off by at most u = eps / 2 of what it rounds, which is at most the sum of the terms' magnitudes. In the
worst case all of them add up, roundings * u * sum|terms|; being independent of one another they grow as the square
root (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019):

    |computed - exact| <= 2 * sqrt(roundings) * u * sum|terms| = eps * sqrt(roundings) * sum|terms|

The factor 2 makes that the worst case itself up to four roundings. The truth is computed in float64 and has this
error too, with float64's eps. Where nothing is rounded (a copy, a maximum, an empty sum) the tolerance is zero.
Products below the smallest normal number lose absolute, not relative precision: one such number is granted to each
sum that has a rounding.

The half types are summed in float32, whose eps stands above, and rounded once: one distance between neighbouring halves
is granted on top.
"""

import math

import torch

from tests.support.reference import Truth


def tolerance(truth: Truth, dtype: torch.dtype) -> torch.Tensor:
    """The largest allowed distance from ``truth.value`` of a result computed in ``dtype``, elementwise."""
    if dtype not in truth.tolerances:
        truth.tolerances[dtype] = _tolerance(truth, dtype)
    return truth.tolerances[dtype]


def _tolerance(truth: Truth, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype)
    eps = info.eps + torch.finfo(torch.float64).eps
    rounded = (truth.magnitude > 0) & (truth.roundings > 0)
    granted = info.tiny + (last_place(truth.value, dtype) if dtype.itemsize == 2 else 0.0)
    return eps * math.sqrt(truth.roundings) * truth.magnitude + granted * rounded


def last_place(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of ``dtype``'s numbers around the finite ones of ``value``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.double().nan_to_num(0.0, 0.0, 0.0))
    return (info.eps * torch.exp2(exponent.double() - 1)).clamp(min=info.eps * info.tiny)


def violation(result: torch.Tensor, truth: Truth) -> str | None:
    """None where ``result`` is within the tolerance (NaN where the truth is), else a line on the worst element."""
    if result.shape != truth.value.shape:
        return f"shape {tuple(result.shape)}, wanted {tuple(truth.value.shape)}"
    if result.numel() == 0:
        return None
    value = result.double()
    excess = (value - truth.value).abs_().sub_(tolerance(truth, result.dtype))
    if excess.max() <= 0:  # most results by far; the maximum of numbers with a NaN is NaN
        return None
    same = (value == truth.value) | (value.isnan() & truth.value.isnan())
    excess = torch.where(same, -torch.inf, excess.nan_to_num(torch.inf))
    worst = int(excess.argmax())
    if excess.flatten()[worst] <= 0:
        return None
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), result.shape))
    return (
        f"{int((excess > 0).sum())} of {result.numel()} elements off, worst at {at}: {result[at].item()!r}, "
        f"wanted {truth.value[at].item()!r} within {tolerance(truth, result.dtype)[at].item():.2g}"
    )


def assert_close(result: torch.Tensor, truth: Truth, what: str = "result") -> None:
    """Raises AssertionError where ``result`` is further from ``truth`` than the tolerance."""
    problem = violation(result, truth)
    assert problem is None, f"{what}: {problem}"
