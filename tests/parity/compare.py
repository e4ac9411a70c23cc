"""What this package makes of a call, beside what torch made of it.

With eps of the arithmetic (float32 for the half types) and r the roundings of a term, a sum may be off by
eps * sqrt(r) * sum|terms| (``tests/support/tolerances.py`` has the reason); a half type's one rounding at the end adds
an ulp of the result. What is copied or selected is equal bit by bit.
"""

import numpy as np
import torch

import cnn_ext.functional
from tests.parity.beyond import is_accepted
from tests.parity.draws import Call
from tests.parity.expected import Expected, Refusal, Value, run

HALF = (torch.bfloat16, torch.float16)


def tolerance(truth: Value, call: Call) -> np.ndarray:
    dtype = call.dtype
    arithmetic = torch.float32 if dtype in HALF else dtype
    eps = torch.finfo(arithmetic).eps + torch.finfo(torch.float64).eps
    growth = np.sqrt(truth.roundings)
    if call.repeats_terms:  # whose errors are the same, not independent of one another
        growth = np.maximum(growth, np.asarray(truth.roundings) / 2)
    allowed = eps * growth * truth.magnitude + torch.finfo(arithmetic).tiny
    if dtype in HALF:
        allowed = allowed + torch.finfo(dtype).eps * np.abs(truth.value) + torch.finfo(dtype).smallest_normal
    return np.where(np.asarray(truth.roundings) > 0, allowed, 0)


def difference(result: torch.Tensor, truth: Value, call: Call) -> str | None:
    """What is wrong with a result, or None."""
    if tuple(result.shape) != truth.value.shape:
        return f"shape {tuple(result.shape)}, wanted {truth.value.shape}"
    wanted = torch.int64 if truth.value.dtype == np.int64 else call.dtype
    if result.dtype != wanted:
        return f"dtype {result.dtype}, wanted {wanted}"
    if result.numel() == 0:
        return None
    value = result.detach().double().numpy()
    with np.errstate(invalid="ignore"):
        same = (value == truth.value) | (np.isnan(value) & np.isnan(truth.value))
        allowed = 0 if truth.magnitude is None else tolerance(truth, call)
        excess = np.where(same, -np.inf, np.nan_to_num(np.abs(value - truth.value) - allowed, nan=np.inf))
    worst = np.unravel_index(excess.argmax(), excess.shape)
    if excess[worst] <= 0:
        return None
    return f"{(excess > 0).sum()} of {value.size} off, at {worst} {value[worst]}, wanted {truth.value[worst]}"


def problem(call: Call, truth: Expected) -> str | None:
    """How this package differs from torch on a call, or None."""
    try:
        results = run(cnn_ext.functional, call, call.tensors())
    except Exception as error:  # to be compared, whatever it is
        if isinstance(truth, Refusal) and isinstance(error, truth.error):
            return None
        wanted = f"torch raises {truth.error.__name__}: {truth.message}" if isinstance(truth, Refusal) else "no error"
        return f"{type(error).__name__}: {error}; wanted {wanted}"
    if isinstance(truth, Refusal):
        if is_accepted(call.function, truth.message):
            return None
        return f"accepted; torch raises {truth.error.__name__}: {truth.message}"
    for name, value in truth.items():
        found = difference(results[name], value, call)
        if found:
            return f"{name}: {found}"
    return None
