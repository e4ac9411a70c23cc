"""``csrc/tests/kernel_check``, the test program without Python, run over the shared cases."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cnn_ext import _native
from tests.support.build import kernels_build
from tests.support.cases import for_dtype, pool2d_cases
from tests.support.rows import ALL_DTYPES

ROOT = Path(__file__).resolve().parent.parent
CASES = [str(ROOT / "tests" / "cases" / name) for name in ("conv2d.csv", "pool2d.csv")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kernels_build(tmp_path_factory) / "kernel_check"


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"} | environment  # other tests need the cores
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.everything)])
def test_every_row_of_the_table_passes(program, every):
    done = run(program, *CASES, "--every", str(every))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert ", 0 failed" in done.stdout.splitlines()[-1]


def test_one_row_by_name_and_no_row_by_another(program):
    done = run(program, *CASES, "--row", "avg_pool2d_forward_naive_baseline")
    assert done.returncode == 0
    runs = sum(2 * len(for_dtype(pool2d_cases(), dtype)) for dtype in ALL_DTYPES)  # in two layouts
    assert done.stdout.startswith(f"{runs} passed, 0 failed")
    unknown = run(program, *CASES, "--row", "conv2d_forward_magic_avx9")
    assert unknown.returncode == 2
    assert "conv2d_forward_magic_avx9" in unknown.stderr


def test_a_missing_case_file_and_a_wrong_isa_are_errors(program, tmp_path):
    assert run(program, str(tmp_path / "none.csv"), CASES[1]).returncode == 2
    wrong = run(program, *CASES, CNN_EXT_ISA="avx9")
    assert wrong.returncode == 2
    assert "baseline" in wrong.stderr


def has_row(name: str) -> bool:
    return any(row["name"] == name and row["supported"] for row in _native.cpu.kernels())


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(not has_row("conv2d_forward_direct_avx2"), reason="counts AVX2's instructions")
@pytest.mark.parametrize(
    ("kernel", "sums", "loads", "others"), [(4, 12, 6 + 2, 12), (3, 36, 8 + 3, 12), (5, 60, 7 + 20, 18)]
)
def test_the_register_tile_executes_no_more_instructions_than_its_loop_has(
    kernel, sums, loads, others, program, tmp_path
):
    """Counted, not timed: sums that leave their registers would add two instructions to each multiply-add.

    A step of the tile, 2 vectors of output channels x 6 points, is 12 multiply-adds, 6 broadcasts, 2 loads; a span
    of 3 tap columns 36 multiply-adds, 8 broadcasts, 3 loads (and 3 weights that stay in memory). A span of 5, of
    4 vectors x 3 points, is 60 multiply-adds, 7 broadcasts, 20 loads. There are few others: to count, to address and
    to fetch ahead.
    """
    batch, channels, outputs, size = 1, 64, 32, 11 + kernel
    header = Path(CASES[0]).read_text().splitlines()[0]
    values = (batch, channels, size, size, outputs, kernel, kernel, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    (tmp_path / "conv2d.csv").write_text(f"{header}\nunpadded,{','.join(map(str, values))}\n")
    (tmp_path / "pool2d.csv").write_text(Path(CASES[1]).read_text().splitlines()[0] + "\n")
    count = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={tmp_path / 'counts'}"]
    count += ["--toggle-collect=cnn_ext::cpu::avx2::run_channel_tile*", str(program)]
    files = [str(tmp_path / name) for name in ("conv2d.csv", "pool2d.csv")]
    row = ["--row", "conv2d_forward_direct_avx2", "--dtype", "float32"]
    done = subprocess.run([*count, *files, *row], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("4 passed, 0 failed"), done.stdout + done.stderr
    runs, lanes = 4 * 2, 8  # layouts of activations and weights, one and three threads
    pixels = (size - kernel + 1) ** 2
    multiply_adds = runs * batch * channels * outputs * pixels * kernel * kernel // lanes
    instructions = int(re.search(r"Collected : (\d+)", done.stderr)[1])
    assert multiply_adds * (sums + loads) / sums <= instructions <= multiply_adds * (sums + loads + others) / sums
