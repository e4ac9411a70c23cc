"""Every row of the kernel table, over the whole list of cases, against the float64 truth and against the naive row.

One test is one row, dtype and layout; it runs all cases that the row accepts and reports every case that fails, by
name.
"""

import functools

import pytest
import torch

from tests.support import reference
from tests.support.cases import Conv2dCase, Pool2dCase, conv2d_cases, pool2d_cases, shared_tensors
from tests.support.reference import Truth
from tests.support.rows import (
    CONV2D_LAYOUTS,
    DTYPES,
    POOL2D_LAYOUTS,
    Row,
    accepts,
    naive,
    rows,
    run_conv2d,
    run_pool2d,
    shape_of,
)
from tests.support.tolerances import violation

pytestmark = pytest.mark.usefixtures("one_thread")

CONV2D_ROWS = rows(op="conv2d")
POOL2D_ROWS = rows(op="max_pool2d") + rows(op="avg_pool2d")


def layout_id(layouts: str | tuple[str, str]) -> str:
    return (
        layouts
        if isinstance(layouts, str)
        else layouts[0]
        if layouts[0] == layouts[1]
        else f"{layouts[0]}_weight_{layouts[1]}"
    )


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def conv2d_truth(direction: str, case: Conv2dCase, dtype: torch.dtype, with_bias: bool) -> Truth:
    data = shared_tensors(case, dtype)
    if direction == "forward":
        return reference.conv2d_forward(case, data.input, data.weight, data.bias if with_bias else None)
    if direction == "backward_input":
        return reference.conv2d_backward_input(case, data.grad_output, data.weight)
    if direction == "backward_weight":
        return reference.conv2d_backward_weight(case, data.grad_output, data.input)
    return reference.conv2d_backward_bias(case, data.grad_output)


@functools.cache
def naive_conv2d(row: Row, case: Conv2dCase, dtype: torch.dtype, with_bias: bool) -> torch.Tensor:
    data = shared_tensors(case, dtype)
    return run_conv2d(row, case, **{**vars(data), "bias": data.bias if with_bias else None})


def conv2d_problems(row: Row, case: Conv2dCase, dtype: torch.dtype, layouts: tuple[str, str]) -> list[str]:
    problems = []
    for with_bias in (True, False) if row.direction == "forward" else (False,):
        data = shared_tensors(case, dtype)
        result = run_conv2d(row, case, layouts, **{**vars(data), "bias": data.bias if with_bias else None})
        truth = conv2d_truth(row.direction, case, dtype, with_bias)
        oracle = Truth(naive_conv2d(naive(row), case, dtype, with_bias).double(), 2 * truth.magnitude, truth.roundings)
        what = f"{case.name}{'' if with_bias or row.direction != 'forward' else ' without bias'}"
        problems += [f"{what}: {found}" for found in [violation(result, truth)] if found]
        problems += [f"{what}, against the naive row: {found}" for found in [violation(result, oracle)] if found]
    return problems


@functools.cache
def pool2d_truth(row: Row, case: Pool2dCase, dtype: torch.dtype) -> tuple[Truth, torch.Tensor | None]:
    """The truth of a row's result, and the offsets that it writes or reads."""
    data = shared_tensors(case, dtype)
    if row.op == "avg_pool2d":
        average = reference.avg_pool2d_forward if row.direction == "forward" else reference.avg_pool2d_backward
        return average(case, data.input if row.direction == "forward" else data.grad_output), None
    truth, offsets = reference.max_pool2d_forward(case, data.input)
    offsets = offsets.to(case.offsets_dtype)
    if row.direction == "backward":
        truth = reference.max_pool2d_backward(case, data.grad_output, offsets)
    elif row.direction == "gather":
        truth = reference.max_pool2d_gather(case, data.input, offsets)
    return truth, offsets


def pool2d_problems(row: Row, case: Pool2dCase, dtype: torch.dtype, layout: str) -> list[str]:
    data = shared_tensors(case, dtype)
    truth, offsets = pool2d_truth(row, case, dtype)
    result, *written = run_pool2d(row, case, layout, input=data.input, grad_output=data.grad_output, offsets=offsets)
    problems = [f"{case.name}: {found}" for found in [violation(result, truth)] if found]
    if written:
        wrong = int((written[0] != offsets).sum())
        problems += [f"{case.name}: {wrong} of {offsets.numel()} offsets off"] * (wrong > 0)
        (alone,) = run_pool2d(row, case, layout, input=data.input, with_offsets=False)
        problems += [f"{case.name}: other output without offsets"] * (not torch.equal(alone, result))
    return problems


def accepted(row: Row, dtype: torch.dtype, layouts) -> list:
    cases = conv2d_cases() if row.op == "conv2d" else pool2d_cases()
    return [case for case in cases if accepts(row, shape_of(case, dtype, layouts))]


def report(problems: list[str], row: Row) -> None:
    assert not problems, f"{row.name} fails:\n  " + "\n  ".join(problems)


@pytest.mark.parametrize("layouts", CONV2D_LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("row", CONV2D_ROWS, ids=str)
def test_conv2d_row(row, dtype, layouts):
    report(
        [problem for case in accepted(row, dtype, layouts) for problem in conv2d_problems(row, case, dtype, layouts)],
        row,
    )


@pytest.mark.parametrize("layout", POOL2D_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("row", POOL2D_ROWS, ids=str)
def test_pool2d_row(row, dtype, layout):
    report(
        [problem for case in accepted(row, dtype, layout) for problem in pool2d_problems(row, case, dtype, layout)], row
    )


@pytest.mark.parametrize("row", CONV2D_ROWS + POOL2D_ROWS, ids=str)
def test_the_naive_rows_accept_every_case_and_the_others_some(row):
    layouts = CONV2D_LAYOUTS if row.op == "conv2d" else POOL2D_LAYOUTS
    cases = conv2d_cases() if row.op == "conv2d" else pool2d_cases()
    counts = {
        (dtype_id(dtype), layout_id(layout)): len(accepted(row, dtype, layout))
        for dtype in DTYPES
        for layout in layouts
    }
    if row.is_naive:
        assert set(counts.values()) == {len(cases)}, counts
    else:
        assert any(counts.values()), f"{row.name} accepts none of the {len(cases)} cases: {counts}"


@pytest.mark.parametrize(
    ("op", "directions"),
    [
        ("conv2d", {"forward", "backward_input", "backward_weight", "backward_bias"}),
        ("max_pool2d", {"forward", "backward", "gather"}),
        ("avg_pool2d", {"forward", "backward"}),
    ],
)
def test_every_direction_has_its_oracle_as_the_last_row(op, directions):
    assert {row.direction for row in rows(op=op)} == directions
    for direction in directions:
        assert rows(op=op, direction=direction)[-1].is_naive
