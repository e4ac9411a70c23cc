"""The choice of a kernel, by the table alone, visible and forcible; and what is around it: threads, forks, the lock."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cnn_ext import _native
from tests.support.cases import Conv2dCase, case_named
from tests.support.rows import (
    Row,
    accepts,
    cases_of,
    choice,
    conv2d_shape,
    forced,
    layouts_of,
    pool2d_shape,
    rows,
    run_conv2d,
    shape_of,
)

ROOT = Path(__file__).resolve().parent.parent
CPU_ROWS = [row for row in rows() if row.device == "cpu"]
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]
SUPPORTED_ISAS = ISAS[: ISAS.index(_native.cpu.best_isa()) + 1]


def example(row: Row) -> tuple:
    """The first case that a row accepts, in the first dtype and layout that it accepts it in, with the shape."""
    for dtype, case, layouts in itertools.product(
        (torch.float32, torch.bfloat16), cases_of(row.op), layouts_of(row.op)[:2]
    ):
        shape = shape_of(case, dtype, layouts, allow_winograd="_winograd_" in row.name)
        if "_folded_" in row.name:  # which serves no zeros
            shape = conv2d_shape(case, dtype, *layouts, padding_mode="replicate")
        if accepts(row, shape):
            return case, layouts, shape
    raise AssertionError(f"{row.name} accepts no case")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("row", CPU_ROWS, ids=str)
def test_a_forced_row_is_the_one_that_runs(row):
    _, _, shape = example(row)
    before = choice(row, shape)["kernel"]
    with forced(row):
        assert choice(row, shape)["kernel"] == row.name
        assert choice(row, shape)["isa"] == row.isa
    assert choice(row, shape)["kernel"] == before


def test_forcing_nests_and_restores():
    first, *_, last = rows(op="conv2d", direction="forward")
    _, _, shape = example(last)
    with forced(last):
        with forced(first):
            pass
        assert choice(last, shape)["kernel"] == last.name


def test_the_names_follow_the_grammar_and_are_unique():
    names = [row["name"] for row in _native.cpu.kernels()]
    assert len(names) == len(set(names))
    for row in _native.cpu.kernels():
        assert row["name"].startswith(f"{row['op']}_{row['direction']}_")
        assert row["name"].endswith(f"_{row['isa']}")


def test_a_better_isa_comes_first_and_the_naive_row_last():
    for row in CPU_ROWS:
        slot = [other for other in rows(op=row.op, direction=row.direction) if other.device == "cpu"]
        # Dot products of bfloat16 stand in front where a processor is fast at them, else behind float32's rows.
        slot = [other for other in slot if "_dot_" not in other.name]
        order = [ISAS.index(other.isa) for other in slot]
        assert order == sorted(order, reverse=True), slot
        assert [other.is_naive for other in slot] == [False] * (len(slot) - 1) + [True]


@pytest.mark.parametrize("name", ["", "conv2d_forward", "conv2d_forward_magic_avx512", "naive"])
def test_an_unknown_name_is_a_value_error_that_repeats_it(name):
    with pytest.raises(ValueError, match=f'"{name}"'):
        _native.cpu.force_kernel(name)


def test_a_forced_row_that_refuses_the_shape_is_a_value_error_and_nothing_runs():
    row, case = rows(op="avg_pool2d", direction="forward")[0], case_named("resnet_stem")  # windows of 2x2, of 3x3
    shape, output = shape_of(case, torch.float32, "nchw"), torch.full(case.output_size, torch.nan)
    with forced(row), pytest.raises(ValueError, match=row.name):
        choice(row, shape)
    with forced(row), pytest.raises(ValueError, match=row.name):
        _native.avg_pool2d_forward(shape, torch.zeros(case.input_size), output)
    assert output.isnan().all()


@pytest.mark.parametrize("row", [row for row in CPU_ROWS if "max_pool2d_backward_in_place" in row.name], ids=str)
def test_windows_that_int32_cannot_measure_are_not_added_in_place(row):
    """The last tap of the window lies 2**31 elements behind the first."""
    wide = replace(case_named("resnet_stem"), in_h=2, in_w=1 << 15, kernel_h=2, kernel_w=1 << 15)
    wide = replace(wide, pad_top=0, pad_bottom=0, pad_left=0, pad_right=0)
    for channels, fits in ((8, True), (1 << 15, True), ((1 << 15) + 1, False)):
        shape = pool2d_shape(replace(wide, channels=channels), torch.float32, "nhwc")
        assert accepts(row, shape) == fits


@pytest.mark.parametrize("isa", SUPPORTED_ISAS)
def test_cnn_ext_isa_caps_the_table(isa):
    done = run_python(
        "import json; from cnn_ext import _native as n;"
        "print(json.dumps([n.cpu.best_isa(), [[r['name'], r['isa']] for r in n.cpu.kernels() if r['supported']]]))",
        CNN_EXT_ISA=isa,
    )
    assert done.returncode == 0, done.stderr
    best, supported = json.loads(done.stdout)
    assert best == isa
    allowed = SUPPORTED_ISAS[: SUPPORTED_ISAS.index(isa) + 1]
    assert supported == [[row.name, row.isa] for row in CPU_ROWS if row.isa in allowed]


def test_a_row_above_cnn_ext_isa_cannot_be_forced():
    above = next((row for row in CPU_ROWS if row.isa != "baseline"), None)
    if above is None:
        assert SUPPORTED_ISAS == ["baseline"] or all(row.is_naive for row in CPU_ROWS)
        return
    done = run_python(
        f"from cnn_ext import _native as n\ntry: n.cpu.force_kernel('{above.name}')\nexcept ValueError as e: print(e)",
        CNN_EXT_ISA="baseline",
    )
    assert above.name in done.stdout, done.stderr
    assert "CNN_EXT_ISA" in done.stdout


@pytest.mark.parametrize("isa", ["avx9", "AVX2"])
def test_a_wrong_isa_is_an_error_that_names_the_choices(isa):
    done = run_python(
        "from cnn_ext import _native as n\ntry: n.cpu.best_isa()\nexcept ValueError as e: print(e)", CNN_EXT_ISA=isa
    )
    assert f'"{isa}"' in done.stdout, done.stdout + done.stderr
    assert all(name in done.stdout for name in SUPPORTED_ISAS)


@pytest.mark.parametrize("row", [row for row in CPU_ROWS if row.direction != "backward_weight"], ids=str)
def test_the_choice_does_not_depend_on_the_batch_nor_on_threads(row):
    for case in cases_of(row.op):
        for layouts in layouts_of(row.op)[:2]:
            kernels = {
                choice(row, shape_of(case.with_batch(batch), torch.float32, layouts), threads)["kernel"]
                for batch in (1, 2, 64)
                for threads in (1, 5)
            }
            assert len(kernels) == 1, (case.name, layouts, kernels)


def test_the_best_instruction_set_leaves_nothing_to_a_lesser_one():
    """What no row of the best one serves goes to composed rows, which call the best of the parts, or to naive ones."""
    best = [isa for isa in SUPPORTED_ISAS if isa != "avx512_bf16"][-1]  # of float32
    for row in (row for row in CPU_ROWS if row.is_naive):
        for case in cases_of(row.op):
            for layouts in layouts_of(row.op)[:2]:
                chosen = choice(row, shape_of(case, torch.float32, layouts))
                fallback = any(word in chosen["kernel"] for word in ("_composed_", "_naive_"))
                assert fallback or chosen["isa"] == best, (case.name, layouts, chosen["kernel"])


def test_small_problems_run_serially_and_large_ones_with_all_threads():
    forward = rows(op="conv2d", direction="forward")[-1]
    small, large = case_named("one_of_everything"), case_named("threads_dense")
    assert choice(forward, shape_of(small, torch.float32, ("nchw", "nchw")), 7)["threads"] == 1
    assert choice(forward, shape_of(large, torch.float32, ("nchw", "nchw")), 7)["threads"] == 7


@pytest.mark.parametrize("row", CPU_ROWS, ids=str)
def test_the_plan_is_a_plan(row):
    """The numbers make sense. (kernel_check proves, at guard pages, that no row touches more scratch than it says.)"""
    _, _, shape = example(row)
    with forced(row):
        plans = [choice(row, shape, threads) for threads in (1, 2, 5)]
    for plan in plans:
        assert plan["tile_channels"] >= 1
        assert plan["tile_pixels"] >= 1
        assert plan["tasks"] >= 0
        assert 0 <= plan["workspace_bytes"] < 1 << 28
    if row.is_naive:  # at most a plane of sums for each thread of a pooling's gradient
        planes = [0 if "conv2d" in row.op else plan["threads"] * shape.in_h * shape.in_w * 8 for plan in plans]
        assert all(plan["workspace_bytes"] in (0, sums) for plan, sums in zip(plans, planes, strict=True))


LARGE = Conv2dCase("large", 8, 16, 40, 40, 32, 5, 5, 1, 1, 2, 2, 2, 2, 1, 1, 1)


def test_the_interpreter_lock_is_released_while_a_kernel_runs():
    """Another Python thread advances during one long call; with the lock held it could not."""
    row = rows(op="conv2d", direction="forward")[-1]
    data = LARGE.tensors(torch.float32)
    running, ticks = threading.Event(), 0

    def tick() -> None:
        nonlocal ticks
        while running.is_set():
            ticks += 1
            time.sleep(0.001)

    torch.set_num_threads(1)
    shape, output = shape_of(LARGE, torch.float32, ("nchw", "nchw")), torch.empty(LARGE.output_size)
    other = threading.Thread(target=tick)
    running.set()
    other.start()
    with forced(row):
        before = ticks
        _native.conv2d_forward(shape, data.input, data.weight, None, output)
        during = ticks - before
    running.clear()
    other.join()
    assert during > 3


def test_calls_from_several_threads_at_once_do_not_disturb_one_another():
    data = LARGE.tensors(torch.float32)
    shape = shape_of(LARGE, torch.float32, ("nchw", "nchw"))
    row = next(row for row in rows(op="conv2d", direction="forward") if accepts(row, shape))
    wanted = run_conv2d(row, LARGE, input=data.input, weight=data.weight)
    results = [None] * 4

    def work(i: int) -> None:
        output = torch.empty(LARGE.output_size)
        _native.conv2d_forward(shape, data.input, data.weight, None, output)
        results[i] = output

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, wanted) for result in results)


FORK = """
import os, signal, sys
sys.path.insert(0, ".")
import torch
torch.set_num_threads(2)
from tests.support.cases import case_named
from tests.support.rows import accepts, choice, rows, run_conv2d, shape_of
case = case_named("threads_dense")
data, shape = case.tensors(torch.float32), shape_of(case, torch.float32, ("nchw", "nchw"))
row = next(row for row in rows(op="conv2d", direction="forward") if accepts(row, shape))
wanted = run_conv2d(row, case, input=data.input, weight=data.weight)
assert choice(row, shape, 2)["threads"] == 2
child = os.fork()
if child == 0:
    signal.alarm(20)  # a child that waits for the parent's threads ends by this signal
    assert choice(row, shape, 2)["threads"] == 1
    same = (run_conv2d(row, case, input=data.input, weight=data.weight) == wanted).all()
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert (run_conv2d(row, case, input=data.input, weight=data.weight) == wanted).all()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_runs_serially_and_does_not_hang():
    done = run_python(FORK)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"


def test_one_openmp_runtime_in_the_process():
    done = run_python(
        "import torch, cnn_ext._native as n\n"
        "maps = {line.split(maxsplit=5)[-1].strip() for line in open('/proc/self/maps') if '/' in line}\n"
        "print('\\n'.join(p for p in maps if p.rsplit('/', 1)[-1].startswith(('libgomp', 'libomp', 'libiomp'))))\n"
        "print(n.openmp_runtime)"
    )
    assert done.returncode == 0, done.stderr
    runtimes = done.stdout.split()
    assert len(runtimes) == 2, runtimes  # the one that is mapped, and the same as _native says it
    assert Path(runtimes[0]).samefile(runtimes[1])
