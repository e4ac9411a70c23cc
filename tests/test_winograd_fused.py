"""The fused convolution by Winograd's algorithm: bit for bit the sums of the plain Winograd row of its direction and
instruction set, pooled or with the gradient that the mask lets pass.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.support import reference
from tests.support.cases import NO_GRADIENT, FusedCase, conv2d_cases, shared_tensors
from tests.support.rows import CONV2D_LAYOUTS, Row, accepts, fused_shape, rows, run_conv2d, run_fused

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [row for row in rows(op="conv2d_relu_max_pool2d") if "_winograd_" in row.name]
PLAIN = {row.name: row for row in rows(op="conv2d")}
POOLS = [(1, 1), (2, 2), (3, 3)]  # windows that share no element, for a sum of theirs may be rounded otherwise
CASES = [case for case in conv2d_cases() if "winograd_" in case.name]


def plain(row: Row) -> Row:
    return PLAIN[row.name.replace("_relu_max_pool2d", "")]


def variants(row: Row) -> Iterator[tuple[FusedCase, tuple[str, str]]]:
    """Every case and layout that the row accepts."""
    for conv in CASES:
        for case in (FusedCase(conv, *pool) for pool in POOLS if min(conv.out_h, conv.out_w) >= pool[0]):
            for layouts in CONV2D_LAYOUTS:
                if accepts(row, fused_shape(case, torch.float32, *layouts, allow_winograd=True)):
                    yield case, layouts


def expected(row: Row, case: FusedCase, layouts, input, weight, bias, grad_output, mask) -> tuple[torch.Tensor, ...]:
    """The same of the plain row: with pooling, forward's output and mask."""
    if row.direction != "forward":
        gradient = reference.fused_gradient(case, grad_output, mask).to(grad_output.dtype)
        return (run_conv2d(plain(row), case.conv, layouts, input=input, weight=weight, grad_output=gradient),)
    conv = run_conv2d(plain(row), case.conv, layouts, input=input, weight=weight, bias=bias)
    if not case.has_pooling:
        return (conv.relu(),)
    maximum, taps = reference.max_pool2d_forward(case.pool, conv)
    mask = taps.masked_fill(maximum.value <= 0, NO_GRADIENT).to(torch.uint8)
    return maximum.value.relu().to(conv.dtype), mask


def operands(case: FusedCase) -> dict[str, torch.Tensor]:
    return dict(vars(shared_tensors(case, torch.float32)))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_sums_are_those_of_the_plain_row(row):
    problems, pools = [], set()
    for case, layouts in variants(row):
        data = operands(case)
        wanted = expected(row, case, layouts, **data)
        for shift in (0, 1):
            got = run_fused(row, case, layouts, **data, shift=shift)
            problems += [] if all(map(torch.equal, got, wanted)) else [(case.name, layouts, shift)]
        pools.add((case.window, case.stride))
    assert not problems
    assert pools >= {(1, 1), (2, 2)}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_same_bits_for_any_number_of_threads(row):
    for case, layouts in variants(row):
        if not case.name.startswith("threads_"):
            continue
        data = operands(case)
        torch.set_num_threads(1)
        alone = run_fused(row, case, layouts, **data)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, run_fused(row, case, layouts, **data), alone)), (case.name, layouts, threads)


@pytest.mark.parametrize("pool", POOLS[:2], ids=str)
@pytest.mark.parametrize("layouts", CONV2D_LAYOUTS[:2], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_an_infinity_reaches_what_it_multiplies_and_no_other_image(row, layouts, pool):
    case = FusedCase(next(case for case in CASES if case.name == "winograd_4x4_3x3").with_batch(3), *pool)
    data = operands(case)
    spoiled = "input" if row.direction == "forward" else "grad_output"
    before = run_fused(row, case, layouts, **data)[0]
    data[spoiled] = data[spoiled].clone()
    data[spoiled][1, 0, 1, 1] = torch.inf
    after = run_fused(row, case, layouts, **data)[0]
    wanted = run_fused(next(r for r in rows(op=row.op, direction=row.direction) if r.is_naive), case, layouts, **data)[
        0
    ]
    assert not wanted.isfinite().all()
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    if row.direction != "backward_weight":
        assert torch.equal(before[::2], after[::2])
