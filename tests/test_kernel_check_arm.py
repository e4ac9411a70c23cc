"""``kernel_check`` compiled for 64-bit Arm, whose vectors are NEON's, and run by qemu: where both are installed.

On Debian: ``apt install g++-aarch64-linux-gnu qemu-user``.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.build import cmake_build

ROOT = Path(__file__).resolve().parent.parent
CASES = [str(ROOT / "tests" / "cases" / name) for name in ("conv2d.csv", "pool2d.csv")]
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]

pytestmark = [
    pytest.mark.everything,
    pytest.mark.skipif(
        shutil.which("aarch64-linux-gnu-g++") is None or shutil.which(QEMU[0]) is None,
        reason="no cross-compiler for 64-bit Arm, or no qemu",
    ),
]


def test_every_row_passes_with_neon(tmp_path):
    build = cmake_build(
        tmp_path,
        CMAKE_TOOLCHAIN_FILE=str(ROOT / "cmake" / "aarch64-linux.cmake"),
        CNN_EXT_KERNEL_CHECK="ON",
        CNN_EXT_WERROR="ON",
    )
    done = subprocess.run([*QEMU, str(build / "kernel_check"), *CASES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert ", 0 failed" in done.stdout.splitlines()[-1]
