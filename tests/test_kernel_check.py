"""``csrc/tests/kernel_check``, the test program without Python: built as its head says, run over the shared cases."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cases import for_dtype, pool2d_cases
from tests.support.rows import ALL_DTYPES

ROOT = Path(__file__).resolve().parent.parent
CASES = [str(ROOT / "tests" / "cases" / name) for name in ("conv2d.csv", "pool2d.csv")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds kernel_check without the Python modules and without CUDA."""
    build = tmp_path_factory.mktemp("kernel_check")
    options = {
        "CNN_EXT_PYTHON": "OFF",
        "CNN_EXT_KERNEL_CHECK": "ON",
        "CNN_EXT_CUDA": "off",
        "CNN_EXT_WERROR": "ON",
        "CMAKE_CXX_FLAGS_RELEASE": "-O2",
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), *generator, *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return build / "kernel_check"


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_every_row_of_the_table_passes(program):
    done = run(program, *CASES)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert ", 0 failed" in done.stdout.splitlines()[-1]


def test_one_row_by_name_and_no_row_by_another(program):
    done = run(program, *CASES, "avg_pool2d_forward_naive_baseline")
    assert done.returncode == 0
    runs = sum(2 * len(for_dtype(pool2d_cases(), dtype)) for dtype in ALL_DTYPES)  # in two layouts
    assert done.stdout.startswith(f"{runs} passed, 0 failed")
    unknown = run(program, *CASES, "conv2d_forward_magic_avx9")
    assert unknown.returncode == 2
    assert "conv2d_forward_magic_avx9" in unknown.stderr


def test_a_missing_case_file_and_a_wrong_isa_are_errors(program, tmp_path):
    assert run(program, str(tmp_path / "none.csv"), CASES[1]).returncode == 2
    wrong = run(program, *CASES, CNN_EXT_ISA="avx9")
    assert wrong.returncode == 2
    assert "baseline" in wrong.stderr
