"""Every row of the kernel table, over the whole list of cases, against the float64 truth and against the naive row.

One test is one row, dtype and layout; it runs all cases that the row accepts and reports every case that fails, by
name.
"""

import functools
import math

import pytest
import torch

from tests.support import reference, sized_pool2d, winograd
from tests.support.cases import (
    NO_GRADIENT,
    Conv2dCase,
    FusedCase,
    Pool2dCase,
    cuda_conv2d_cases,
    for_dtype,
    shared_tensors,
)
from tests.support.reference import Truth
from tests.support.rows import (
    ALL_DTYPES,
    CONV2D_LAYOUTS,
    HALF_DTYPES,
    POOL2D_LAYOUTS,
    SIZED_POOL2D_OPS,
    Row,
    accepts,
    cases_of,
    layouts_of,
    naive,
    rows,
    run_conv2d,
    run_fused,
    run_pool2d,
    run_sized_pool2d,
    shape_of,
)
from tests.support.sized_pool2d import SizedPool2dCase
from tests.support.tolerances import violation

pytestmark = pytest.mark.usefixtures("one_thread")

# What serves other padding modes than zeros alone is tested in test_padding_modes.py.
CONV2D_ROWS = [row for row in rows(op="conv2d") if "_folded_" not in row.name]
# Those of Winograd's algorithm have another bound, which test_winograd_fused.py knows.
FUSED_ROWS = [row for row in rows(op="conv2d_relu_max_pool2d") if "_winograd_" not in row.name]
POOL2D_ROWS = rows(op="max_pool2d") + rows(op="avg_pool2d")
SIZED_POOL2D_ROWS = [row for op in SIZED_POOL2D_OPS for row in rows(op=op)]


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
    return run_conv2d(row, case, **{**vars(data), "bias": data.bias if with_bias else None}).double()


def less_precise(truth: Truth, error: float) -> Truth:
    """With a tolerance of sums in float32 whose terms have a relative error of their own."""
    if truth.roundings == 0:  # nothing was added up
        return truth
    relative = torch.finfo(torch.float32).eps * math.sqrt(truth.roundings)
    return Truth(truth.value, truth.magnitude * (1 + error / relative), truth.roundings)


def rounded_to_tf32(row: Row, truth: Truth) -> Truth:
    """With the tolerance of a product whose operands were rounded to 11 bits each: 2^-10 of the magnitude on top.

    What goes from memory to the matrix unit past the registers may be cut off instead: twice that. Three products of
    the parts of both operands are off by 2^-21 (csrc/cuda/mma_fragments.cuh).
    """
    return less_precise(truth, 2.0**-9 if "_wgmma_" in row.name else 2.0**-10 if row.allows_tf32 else 2.0**-21)


def rounded_operands(row: Row, truth: Truth, dtype: torch.dtype) -> Truth:
    """Of a fused row on CUDA, which may run the convolution's row on tensor cores, and store a gradient in between."""
    if dtype == torch.float32 and ("mma_" in row.name or "_composed_" in row.name):
        return less_precise(truth, 2.0**-9)
    return less_precise(truth, torch.finfo(dtype).eps) if dtype in HALF_DTYPES and "_composed_" in row.name else truth


def conv2d_problems(row: Row, case: Conv2dCase, dtype: torch.dtype, layouts: tuple[str, str]) -> list[str]:
    problems = []
    for with_bias in (True, False) if row.direction == "forward" else (False,):
        data = shared_tensors(case, dtype)
        result = run_conv2d(row, case, layouts, **{**vars(data), "bias": data.bias if with_bias else None})
        truth = conv2d_truth(row.direction, case, dtype, with_bias)
        if "_winograd_" in row.name:
            truth = winograd.bounded(row, case, dtype, layouts, truth, vars(data))
        if "mma_" in row.name and dtype == torch.float32:
            truth = rounded_to_tf32(row, truth)
        oracle = Truth(naive_conv2d(naive(row), case, dtype, with_bias), 2 * truth.magnitude, truth.roundings)
        what = f"{case.name}{'' if with_bias or row.direction != 'forward' else ' without bias'}"
        problems += [f"{what}: {found}" for found in [violation(result, truth)] if found]
        problems += [f"{what}, against the naive row: {found}" for found in [violation(result, oracle)] if found]
    return problems


def whole_numbers(case: FusedCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Operands whose sums of products are not rounded: maxima tie, and every order of additions finds the same ones."""
    data = shared_tensors(case, dtype)
    return {name: getattr(data, name).mul(2).round() for name in ("input", "weight", "bias")}


@functools.cache
def fused_truth(direction: str, case: FusedCase, dtype: torch.dtype) -> Truth:
    data = shared_tensors(case, dtype)
    if direction == "forward":
        return reference.fused_forward(case, data.input, data.weight, data.bias)
    other = {"backward_input": data.weight, "backward_weight": data.input}.get(direction)
    return reference.fused_backward(case, direction, data.grad_output, data.mask, other)


@functools.cache
def fused_maxima(case: FusedCase, dtype: torch.dtype, device: str) -> tuple[Truth, torch.Tensor]:
    """The output of whole_numbers without a bias, and the offsets: CUDA finds maxima among rounded outputs."""
    operands = {**whole_numbers(case, dtype), "bias": None}
    conv = reference.conv2d_forward(case.conv, **operands).value
    if device == "cuda":
        conv = conv.to(dtype).double()
    truth, taps = reference.max_pool2d_forward(case.pool, conv)
    value = truth.value.relu().to(dtype)
    return reference.exact(value), taps.masked_fill(value <= 0, NO_GRADIENT).to(torch.uint8)


def fused_problems(row: Row, case: FusedCase, dtype: torch.dtype, layouts: tuple[str, str]) -> list[str]:
    data = vars(shared_tensors(case, dtype))
    result = run_fused(row, case, layouts, **data)[0]
    truth = fused_truth(row.direction, case, dtype)
    if row.device == "cuda":
        truth = rounded_operands(row, truth, dtype)
    problems = [violation(result, truth)]
    if row.direction == "forward":
        operands = {**whole_numbers(case, dtype), "bias": None}
        truth, offsets = fused_maxima(case, dtype, row.device)
        output, *written = run_fused(row, case, layouts, **operands)
        problems += [violation(output, truth)]
        problems += ["other offsets" for found in written if not torch.equal(found, offsets)]
        alone = run_fused(row, case, layouts, **operands, with_offsets=False)[0]
        problems += [] if torch.equal(alone, output) else ["other output without offsets"]
    return [f"{case.name}: {problem}" for problem in problems if problem]


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


@functools.cache
def sized_pool2d_truth(op: str, direction: str, case: SizedPool2dCase, dtype: torch.dtype):
    return sized_pool2d.truth(op, direction, case, shared_tensors(case, dtype))


def sized_pool2d_problems(row: Row, case: SizedPool2dCase, dtype: torch.dtype, layout: str) -> list[str]:
    data = vars(shared_tensors(case, dtype))
    truth, indices = sized_pool2d_truth(row.op, row.direction, case, dtype)
    result, *written = run_sized_pool2d(row, case, layout, **data)
    problems = [f"{case.name}: {found}" for found in [violation(result, truth)] if found]
    if indices is not None:
        problems += [f"{case.name}: other indices"] * (not torch.equal(written[0], indices))
        (alone,) = run_sized_pool2d(row, case, layout, **data, with_indices=False)
        problems += [f"{case.name}: other output without indices"] * (not torch.equal(alone, result))
    return problems


def accepted(row: Row, dtype: torch.dtype, layouts) -> list:
    large = cuda_conv2d_cases() if row.device == "cuda" and row.op == "conv2d" else ()
    cases = for_dtype(cases_of(row.op) + large, dtype)
    return [case for case in cases if accepts(row, shape_of(case, dtype, layouts))]


def report(problems: list[str], row: Row) -> None:
    assert not problems, f"{row.name} fails:\n  " + "\n  ".join(problems)


@pytest.mark.parametrize("layouts", CONV2D_LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("row", CONV2D_ROWS, ids=str)
def test_conv2d_row(row, dtype, layouts):
    report(
        [problem for case in accepted(row, dtype, layouts) for problem in conv2d_problems(row, case, dtype, layouts)],
        row,
    )


@pytest.mark.parametrize("layouts", CONV2D_LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("row", FUSED_ROWS, ids=str)
def test_conv2d_relu_max_pool2d_row(row, dtype, layouts):
    report(
        [problem for case in accepted(row, dtype, layouts) for problem in fused_problems(row, case, dtype, layouts)],
        row,
    )


@pytest.mark.parametrize("layout", POOL2D_LAYOUTS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("row", POOL2D_ROWS, ids=str)
def test_pool2d_row(row, dtype, layout):
    report(
        [problem for case in accepted(row, dtype, layout) for problem in pool2d_problems(row, case, dtype, layout)], row
    )


@pytest.mark.parametrize("layout", POOL2D_LAYOUTS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("row", SIZED_POOL2D_ROWS, ids=str)
def test_sized_pool2d_row(row, dtype, layout):
    cases = accepted(row, dtype, layout)
    report([problem for case in cases for problem in sized_pool2d_problems(row, case, dtype, layout)], row)


@pytest.mark.parametrize("row", CONV2D_ROWS + FUSED_ROWS + POOL2D_ROWS + SIZED_POOL2D_ROWS, ids=str)
def test_the_naive_rows_accept_every_case_and_the_others_some(row):
    cases = cases_of(row.op)
    counts = {
        (dtype_id(dtype), layout_id(layout)): len(accepted(row, dtype, layout))
        for dtype in ALL_DTYPES
        for layout in layouts_of(row.op)
    }
    if row.is_naive:
        wanted = {len(for_dtype(cases, dtype)) for dtype in ALL_DTYPES}
        assert set(counts.values()) == wanted, counts
    else:
        assert any(counts.values()), f"{row.name} accepts none of the {len(cases)} cases: {counts}"


@pytest.mark.parametrize(
    ("op", "directions"),
    [
        ("conv2d", {"forward", "backward_input", "backward_weight", "backward_bias"}),
        ("conv2d_relu_max_pool2d", {"forward", "backward_input", "backward_weight", "backward_bias"}),
        ("max_pool2d", {"forward", "backward", "gather"}),
        ("avg_pool2d", {"forward", "backward"}),
        ("adaptive_max_pool2d", {"forward"}),
        ("adaptive_avg_pool2d", {"forward", "backward"}),
        ("max_unpool2d", {"forward", "scatter", "gather"}),
    ],
)
def test_every_direction_has_its_oracle_as_the_last_row(op, directions):
    assert {row.direction for row in rows(op=op)} == directions
    for direction in directions:
        assert rows(op=op, direction=direction)[-1].is_naive
