"""Every row gives the same bits whatever the threads, the run, the slice of the batch, the addresses and the place in a
tile; and infinities and NaNs go where the data takes them, never through the padding.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.support import nonfinite, reference
from tests.support.cases import (
    Conv2dCase,
    FusedCase,
    Pool2dCase,
    conv2d_cases,
    for_dtype,
    fused_cases,
    generator,
    pool2d_cases,
    shared_tensors,
)
from tests.support.rows import (
    ALL_DTYPES,
    CONV2D_LAYOUTS,
    Row,
    accepts,
    cases_of,
    choice,
    forced,
    layouts_of,
    rows,
    run,
    shape_of,
)
from tests.support.tolerances import violation

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = rows()
CONV2D_ROWS = rows(op="conv2d")
FUSED_ROWS = rows(op="conv2d_relu_max_pool2d")
POOL2D_ROWS = rows(op="max_pool2d") + rows(op="avg_pool2d")
MIXED_LAYOUTS = (("nhwc", "nchw"), ("nchw", "nhwc"))
SMALL = 200_000  # multiplications of a case that may be computed in Python, or many times


def variants(row: Row, cases) -> Iterator[tuple]:
    """Every case, dtype and layout that ``row`` accepts."""
    for dtype in ALL_DTYPES:
        for layouts in layouts_of(row.op):
            for case in for_dtype(cases, dtype):
                if accepts(row, shape_of(case, dtype, layouts)):
                    yield case, dtype, layouts


@functools.cache
def offsets_of(case: Pool2dCase, dtype: torch.dtype) -> torch.Tensor:
    return reference.max_pool2d_forward(case, shared_tensors(case, dtype).input)[1].to(case.offsets_dtype)


def operands(row: Row, case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the row reads, and more, by keyword."""
    found = dict(vars(shared_tensors(case, dtype)))
    if row.op == "max_pool2d" and row.direction != "forward":
        found["offsets"] = offsets_of(case, dtype)
    return found


def same_bits(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(
        torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )


def report(problems: list, row: Row) -> None:
    assert not problems, f"{row.name} fails:\n  " + "\n  ".join(map(str, problems))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_bits_for_any_number_of_threads_and_every_run(row):
    teams, problems = set(), []
    most = 2 * SMALL if "_naive_" in row.name else math.inf  # the naive rows are slow, and share out all cases alike
    cases = [case for case in cases_of(row.op) if case.name.startswith("threads_")]
    for case, dtype, layouts in variants(row, [case for case in cases if case.multiplications < most]):
        if layouts in MIXED_LAYOUTS:
            continue
        tensors = operands(row, case, dtype)
        torch.set_num_threads(1)
        alone = run(row, case, layouts, **tensors)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with forced(row):
                teams.add(choice(row, shape_of(case, dtype, layouts), threads)["threads"])
            if not same_bits(run(row, case, layouts, **tensors), alone):
                problems.append((case.name, dtype, layouts, f"{threads} threads"))
    report(problems, row)
    assert teams >= {1, 2, 3, 5} or not list(variants(row, cases))


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.direction not in ("backward_weight", "backward_bias")], ids=str
)
def test_same_bits_for_any_slice_of_the_batch(row):
    problems = []
    most = SMALL if "_naive_" in row.name else math.inf  # the naive rows are slow, and know no tiles
    cases = [case for case in cases_of(row.op) if case.batch > 1 and case.multiplications < most]
    for case, dtype, layouts in variants(row, cases):
        tensors = operands(row, case, dtype)
        whole = run(row, case, layouts, **tensors)
        for start, count in ((0, 1), (case.batch - 1, 1), (1, case.batch - 1)):
            part = case.with_batch(count)
            if not accepts(row, shape_of(part, dtype, layouts)):
                problems.append((case.name, dtype, layouts, f"refuses a batch of {count}"))
                continue
            batched = {"input", "grad_output", "offsets", "indices", "mask"}
            slices = {name: t[start : start + count] if name in batched else t for name, t in tensors.items()}
            if not same_bits(run(row, part, layouts, **slices), tuple(t[start : start + count] for t in whole)):
                problems.append((case.name, dtype, layouts, f"images {start} to {start + count}"))
    report(problems, row)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_bits_at_misaligned_addresses(row):
    problems = []
    for case, dtype, layouts in variants(row, [case for case in cases_of(row.op) if case.multiplications < SMALL]):
        tensors = operands(row, case, dtype)
        if not same_bits(run(row, case, layouts, **tensors), run(row, case, layouts, **tensors, shift=1)):
            problems.append((case.name, dtype, layouts))
    report(problems, row)


@pytest.mark.parametrize("row", rows(op="conv2d", direction="forward"), ids=str)
def test_every_pixel_and_channel_of_a_tile_adds_in_the_same_order(row):
    """With an input that is constant over its pixels and equal filters, all outputs are the same sum: those of Winograd
    rows at the same place in their tiles of 2 x 2 or 4 x 4 outputs, but for tiles that reach over the edge.
    """
    period = 4 if "_winograd_" in row.name else 1
    problems = []
    cases = [
        replace(case, pad_top=0, pad_bottom=0, pad_left=0, pad_right=0, batch=max(case.batch, 1))
        for case in conv2d_cases()
        if case.multiplications < SMALL and case.in_channels > 0
    ]
    for case, dtype, layouts in variants(row, [case for case in cases if case.out_h > 0 and case.out_w > 0]):
        g = generator(case.name)
        group_in = case.in_channels // case.groups
        pixel = torch.randn(1, 1, group_in, 1, 1, generator=g, dtype=dtype).expand(
            case.batch, case.groups, -1, case.in_h, case.in_w
        )
        filter = torch.randn(1, *case.weight_size[1:], generator=g, dtype=dtype)
        tensors = {"input": pixel.flatten(1, 2), "weight": filter.expand(case.weight_size)}
        (output,) = run(row, case, layouts, **tensors)
        output = output[:, :, : case.out_h // period * period, : case.out_w // period * period]
        in_row, in_column = (torch.arange(size) % period for size in output.shape[2:])
        if not same_bits((output,), (output[:1, :1, in_row[:, None], in_column].expand_as(output),)):
            problems.append((case.name, dtype, layouts))
    report(problems, row)


@pytest.mark.parametrize("row", rows(op="conv2d", direction="backward_input"), ids=str)
def test_every_channel_of_a_gradient_adds_in_the_same_order(row):
    """With filters that are equal over their input channels, all channels of a group's gradient are the same sums."""
    problems = []
    for case, dtype, layouts in variants(row, [case for case in conv2d_cases() if 0 < case.multiplications < SMALL]):
        data = shared_tensors(case, dtype)
        weight = data.weight[:, :1].expand(case.weight_size)
        (grad_input,) = run(row, case, layouts, grad_output=data.grad_output, weight=weight)
        by_group = grad_input.unflatten(1, (case.groups, -1))
        if not same_bits((by_group,), (by_group[:, :, :1].expand_as(by_group),)):
            problems.append((case.name, dtype, layouts))
    report(problems, row)


@pytest.mark.parametrize("row", rows(op="avg_pool2d", direction="forward"), ids=str)
def test_every_pixel_of_an_average_adds_in_the_same_order(row):
    """With an input that repeats with the stride, all full windows show the same values."""
    problems = []
    cases = [replace(case, pad_top=0, pad_bottom=0, pad_left=0, pad_right=0, ceil_mode=0) for case in pool2d_cases()]
    for case, dtype, layout in variants(
        row, [case for case in cases if case.out_h > 0 and case.out_w > 0 and case.batch > 0]
    ):
        pattern = torch.randn(1, 1, case.stride_h, case.stride_w, generator=generator(case.name), dtype=dtype)
        repeats = -(-case.in_h // case.stride_h), -(-case.in_w // case.stride_w)
        input = pattern.tile(1, 1, *repeats)[..., : case.in_h, : case.in_w].expand(case.input_size)
        (output,) = run(row, case, layout, input=input)
        if not same_bits((output,), (output[:1, :1, :1, :1].expand_as(output),)):
            problems.append((case.name, dtype, layout))
    report(problems, row)


def spoil(tensor: torch.Tensor, *values: float) -> torch.Tensor:
    """A copy with zeros for infinities to meet, and with ``values`` as its first, last and middle element."""
    spoiled = tensor.clone()
    flat = spoiled.flatten()
    flat[::3] = 0
    for place, value in zip((0, flat.numel() - 1, flat.numel() // 2), values, strict=False):
        flat[place] = value
    return flat.reshape(tensor.shape)


# Which operand holds what; the other one has zeros for it to meet.
SPOILS = {
    "infinity_at_the_corner": (torch.inf,),
    "minus_infinity_at_the_end_and_nan_in_the_middle": (0.5, -torch.inf, torch.nan),
    "infinities_of_both_signs": (torch.inf, -torch.inf, torch.inf),
}
SPOILED_CASES = [
    case
    for case in conv2d_cases()
    if 0 < case.multiplications < SMALL and not case.name.startswith(("in_channels_", "out_channels_"))
]
READS = {
    "forward": ("input", "weight"),
    "backward_input": ("grad_output", "weight"),
    "backward_weight": ("input", "grad_output"),
}


@functools.cache
def spoiled_operands(
    direction: str, case: Conv2dCase, dtype: torch.dtype, name: str, key: str
) -> dict[str, torch.Tensor]:
    data = vars(shared_tensors(case, dtype))
    return {read: spoil(data[read], *(SPOILS[name] if read == key else ())) for read in READS[direction]}


@functools.cache
def spoiled_truth(direction: str, case: Conv2dCase, dtype: torch.dtype, name: str, key: str) -> reference.Truth:
    return nonfinite.conv2d(case, direction, **spoiled_operands(direction, case, dtype, name, key))


@pytest.mark.parametrize("spoiled", [0, 1], ids=["first_operand", "second_operand"])
@pytest.mark.parametrize("row", [row for row in CONV2D_ROWS if row.direction in READS], ids=str)
def test_conv2d_multiplies_data_and_never_padding(row, spoiled):
    problems = []
    for dtype in ALL_DTYPES:
        for case in for_dtype(SPOILED_CASES, dtype):
            accepted = [layouts for layouts in CONV2D_LAYOUTS if accepts(row, shape_of(case, dtype, layouts))]
            for name, layouts in itertools.product(SPOILS, accepted):
                key = READS[row.direction][spoiled]
                tensors = spoiled_operands(row.direction, case, dtype, name, key)
                truth = spoiled_truth(row.direction, case, dtype, name, key)
                found = violation(*run(row, case, layouts, **tensors), truth)
                problems += [(case.name, dtype, layouts, f"{name} of {key}", found)] if found else []
    report(problems, row)


GROUPED_CASES = [case for case in conv2d_cases() if "groups" in case.name and case.multiplications > 0]


@pytest.mark.parametrize("row", [row for row in CONV2D_ROWS if row.direction in READS], ids=str)
def test_infinities_stay_in_their_groups(row):
    """Rows that read on into the next group's channels have to leave them out."""
    problems = []
    key = READS[row.direction][0]
    for dtype in (torch.float32, torch.bfloat16):
        for case in for_dtype(GROUPED_CASES, dtype):
            data = vars(shared_tensors(case, dtype))
            spoiled = data[key].clone()
            spoiled[:, spoiled.shape[1] // case.groups :] = torch.inf
            for layouts in CONV2D_LAYOUTS[:2]:
                if accepts(row, shape_of(case, dtype, layouts)):
                    (result,) = run(row, case, layouts, **{**data, key: spoiled})
                    channels = 0 if row.direction == "backward_weight" else 1
                    first_group = result.narrow(channels, 0, result.shape[channels] // case.groups)
                    if not first_group.isfinite().all():
                        problems.append((case.name, dtype, layouts))
    report(problems, row)


@functools.cache
def spoiled_fused_truth(direction: str, case: FusedCase, dtype: torch.dtype, name: str, key: str) -> reference.Truth:
    operands = dict(spoiled_fused_operands(direction, case, dtype, name, key))
    if direction != "forward":
        operands["grad_output"] = reference.fused_gradient(case, operands["grad_output"], operands.pop("mask"))
        return nonfinite.conv2d(case.conv, direction, **operands)
    conv = nonfinite.conv2d(case.conv, direction, **operands)
    value, magnitude = (
        reference.max_pool2d_forward(case.pool, t)[0].value for t in (conv.value.relu(), conv.magnitude)
    )
    return reference.Truth(value, magnitude, conv.roundings)


@functools.cache
def spoiled_fused_operands(
    direction: str, case: FusedCase, dtype: torch.dtype, name: str, key: str
) -> dict[str, torch.Tensor]:
    data = vars(shared_tensors(case, dtype))
    operands = {read: spoil(data[read], *(SPOILS[name] if read == key else ())) for read in READS[direction]}
    return operands if direction == "forward" else {**operands, "mask": data["mask"]}


@pytest.mark.parametrize("spoiled", [0, 1], ids=["first_operand", "second_operand"])
@pytest.mark.parametrize("row", [row for row in FUSED_ROWS if row.direction in READS], ids=str)
def test_the_fused_rows_multiply_data_and_stopped_gradients_and_never_padding(row, spoiled):
    problems = []
    key = READS[row.direction][spoiled]
    for dtype in ALL_DTYPES:
        for case in for_dtype([case for case in fused_cases() if case.conv in SPOILED_CASES[::3]], dtype):
            accepted = [layouts for layouts in CONV2D_LAYOUTS[:2] if accepts(row, shape_of(case, dtype, layouts))]
            for name, layouts in itertools.product(SPOILS, accepted):
                tensors = spoiled_fused_operands(row.direction, case, dtype, name, key)
                truth = spoiled_fused_truth(row.direction, case, dtype, name, key)
                found = violation(run(row, case, layouts, **tensors)[0], truth)
                problems += [(case.name, dtype, layouts, f"{name} of {key}", found)] if found else []
    report(problems, row)


def with_nonfinites(case: Pool2dCase, tensor: torch.Tensor) -> torch.Tensor:
    """A copy with about one NaN in ten elements, as many infinities, and a last plane of -inf alone."""
    g = generator(case.name)
    lot = torch.rand(tensor.shape, generator=g)
    spoiled = (
        tensor.masked_fill(lot < 0.3, -torch.inf).masked_fill(lot < 0.2, torch.inf).masked_fill(lot < 0.1, torch.nan)
    )
    spoiled[:, -1:] = -torch.inf
    return spoiled


@functools.cache
def pool2d_operands(case: Pool2dCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    data = {name: with_nonfinites(case, tensor) for name, tensor in vars(shared_tensors(case, dtype)).items()}
    return {**data, "offsets": reference.max_pool2d_forward(case, data["input"])[1].to(case.offsets_dtype)}


@functools.cache
def pool2d_truth(op: str, direction: str, case: Pool2dCase, dtype: torch.dtype) -> reference.Truth:
    data = pool2d_operands(case, dtype)
    if (op, direction) == ("max_pool2d", "forward"):
        return reference.max_pool2d_forward(case, data["input"])[0]
    read = {"forward": ("input",), "backward": ("grad_output", "offsets"), "gather": ("input", "offsets")}[direction]
    return getattr(reference, f"{op}_{direction}")(
        case, *(data[name] for name in read if (op, name) != ("avg_pool2d", "offsets"))
    )


@pytest.mark.parametrize("row", POOL2D_ROWS, ids=str)
def test_pool2d_takes_the_first_of_equals_and_the_last_nan(row):
    problems = []
    for case, dtype, layout in variants(row, pool2d_cases()):
        tensors = pool2d_operands(case, dtype)
        result, *written = run(row, case, layout, **tensors)
        found = violation(result, pool2d_truth(row.op, row.direction, case, dtype))
        problems += [(case.name, dtype, layout, found)] if found else []
        problems += [(case.name, dtype, layout, "offsets") for w in written if not torch.equal(w, tensors["offsets"])]
    report(problems, row)


@pytest.mark.parametrize("row", rows(op="conv2d", direction="backward_bias"), ids=str)
def test_bias_gradient_of_infinities_and_nans(row):
    problems = []
    for case, dtype, layouts in variants(row, [case for case in conv2d_cases() if 0 < case.multiplications < SMALL]):
        grad_output = shared_tensors(case, dtype).grad_output.clone()
        grad_output[0, 0, 0, 0], grad_output[-1, -1, -1, -1] = torch.inf, torch.nan
        (grad_bias,) = run(row, case, layouts, grad_output=grad_output)
        sums = grad_output.double().sum((0, 2, 3))
        if not torch.equal(grad_bias.isnan(), sums.isnan()) or not torch.equal(grad_bias.isinf(), sums.isinf()):
            problems.append((case.name, dtype, layouts))
    report(problems, row)
