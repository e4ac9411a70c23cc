"""``csrc/tests/kernel_check``, the test program without Python, run over the shared cases."""

import os
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.everything)])
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
