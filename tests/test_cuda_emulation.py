"""The CUDA kernels without a GPU: their sources compiled for the host, on an emulation of CUDA's execution model.

``csrc/tests/emulation_check`` tests the emulation, with faults planted that it has to catch; ``csrc/tests/cuda_check``
runs every row over the shared cases against float64; ``csrc/tests/wide_check`` runs rows where an int holds no index.
"""

import functools
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.build import cmake_build

ROOT = Path(__file__).resolve().parent.parent
CASES = [str(ROOT / "tests" / "cases" / name) for name in ("conv2d.csv", "pool2d.csv")]
DTYPES = ("float32", "float64", "float16", "bfloat16")
TOUCHES_OUTSIDE = 3  # the exit status
FOUND_BY_SANITIZER = 66  # the same
FAULTS = {
    "out_of_bounds_read": "touches memory outside its buffers",
    "out_of_bounds_shared_read": "touches memory outside its buffers",
    "missing_barrier_before_reading": "the product is wrong",
    "missing_barrier_before_writing": "the product is wrong",
    "early_read": "the product is wrong",
    "wrong_fragment": "the product is wrong",
    "divergent_barrier": "waits for threads that never come",
    "misaligned_copy": "not aligned",
    "unfinished_copy": "ends with copies on their way",
}


def built(build: Path, flags: str) -> Path:
    """The folder with the programs, compiled with these flags."""
    return cmake_build(
        build,
        CNN_EXT_CUDA_CHECK="ON",
        CNN_EXT_WERROR="ON",
        CMAKE_CXX_FLAGS_RELEASE=flags,
        targets="cuda_check emulation_check wide_check",
    )


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    options = {f"{name}_OPTIONS": f"exitcode={FOUND_BY_SANITIZER}" for name in ("ASAN", "UBSAN", "TSAN")}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=os.environ | options)


def check_rows(programs: Path, every: int) -> None:
    """All rows over each ``every``-th case in each dtype, two dtypes at a time."""

    def check(dtype: str) -> subprocess.CompletedProcess:
        return run(programs / "cuda_check", *CASES, "--every", str(every), "--dtype", dtype)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(check, DTYPES):
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            assert ", 0 failed" in done.stdout.splitlines()[-1]


ADDRESS_AND_UNDEFINED = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
THREAD = "-O1 -g1 -fsanitize=thread"
FOUND_BY_SANITIZERS = {
    "out_of_bounds_static_read": (ADDRESS_AND_UNDEFINED, "index 32 out of bounds"),
    "misaligned_read": (ADDRESS_AND_UNDEFINED, "misaligned address"),
    "missing_barrier_before_reading": (THREAD, "data race"),
    "missing_barrier_before_writing": (THREAD, "data race"),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("emulation"), "-O1")


def test_the_primitives_are_right_in_every_order(programs):
    done = run(programs / "emulation_check")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(programs, fault):
    done = run(programs / "emulation_check", fault)
    assert done.returncode == (TOUCHES_OUTSIDE if "outside" in FAULTS[fault] else 1)
    assert FAULTS[fault] in done.stdout


def test_every_operator_serves_more_elements_than_an_int_counts(programs):
    done = run(programs / "wide_check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_row_over_a_sample_of_the_cases(programs):
    check_rows(programs, every=60)


def test_an_unknown_row_or_fault_is_an_error(programs):
    assert run(programs / "cuda_check", *CASES, "--row", "conv2d_forward_magic_sm99").returncode == 2
    assert run(programs / "emulation_check", "magic").returncode == 2


@pytest.mark.everything
def test_every_row_over_every_case(programs):
    check_rows(programs, every=1)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The programs with sanitizers, by their flags. Accesses without a barrier between them are a race of threads."""
    return functools.cache(lambda flags: built(tmp_path_factory.mktemp("sanitized"), flags))


@pytest.mark.everything
@pytest.mark.parametrize("fault", FOUND_BY_SANITIZERS)
def test_sanitizers_find_a_planted_fault(sanitized, fault):
    flags, message = FOUND_BY_SANITIZERS[fault]
    done = run(sanitized(flags) / "emulation_check", fault)
    assert done.returncode == FOUND_BY_SANITIZER
    assert message in done.stderr


@pytest.mark.everything
@pytest.mark.parametrize(("flags", "every"), [(ADDRESS_AND_UNDEFINED, 4), (THREAD, 40)])
def test_sanitizers_find_nothing_else(sanitized, flags, every):
    done = run(sanitized(flags) / "emulation_check")
    assert done.returncode == 0, done.stdout + done.stderr
    check_rows(sanitized(flags), every)
