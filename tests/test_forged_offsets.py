"""Offsets come from a caller: those that name no tap, or one in the padding, lead nowhere outside of grad_input."""

import pytest
import torch

from cnn_ext import _native
from tests.support.cases import pool2d_cases
from tests.support.rows import accepts, dense, forced, pool2d_shape, rows

BACKWARD_ROWS = [row for row in rows(op="max_pool2d", direction="backward") if row.device == "cpu"]
GUARD = 1 << 14  # elements on either side, more than a window of the cases taken is away
UNTOUCHED = 7.0


def guarded(size: tuple[int, ...], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor in the middle of a buffer of sevens, and that buffer."""
    batch, channels, height, width = size
    count = batch * channels * height * width
    buffer = torch.full((GUARD + count + GUARD,), UNTOUCHED)
    inner = buffer[GUARD : GUARD + count]
    if layout == "nchw":
        return inner.reshape(size), buffer
    return inner.reshape(batch, height, width, channels).permute(0, 3, 1, 2), buffer


def forged(size: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """The largest and the smallest number, and any."""
    bounds = torch.iinfo(dtype)
    any_number = torch.randint(bounds.min, bounds.max, size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return [torch.full(size, bounds.max, dtype=dtype), torch.full(size, bounds.min, dtype=dtype), any_number]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("row", BACKWARD_ROWS, ids=str)
def test_nothing_outside_is_written(row, layout):
    problems = []
    for case in pool2d_cases():
        rows_away = case.kernel_h * case.dilation_h + case.pad_top
        shape = pool2d_shape(case, torch.float32, layout)
        if rows_away * case.in_w * case.channels > GUARD or not accepts(row, shape):
            continue
        grad_output = dense(torch.ones(case.output_size), layout)
        for offsets in forged(case.output_size, case.offsets_dtype):
            grad_input, buffer = guarded(case.input_size, layout)
            with forced(row):
                _native.max_pool2d_backward(shape, grad_output, dense(offsets, layout), grad_input)
            outside = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
            problems += [f"{case.name}, {offsets.flatten()[0]}"] if (outside != UNTOUCHED).any() else []
    assert not problems, f"{row.name}: {problems}"
