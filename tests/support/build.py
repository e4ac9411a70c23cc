"""The build of the CPU kernels whose objects and ``kernel_check`` the tests look at."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cnn_ext import _native

ROOT = Path(__file__).resolve().parent.parent.parent
EDITABLE_BUILD = ROOT / "build" / "editable"  # as in setup.py


def cmake_build(folder: Path, **options: str) -> Path:
    """``folder``, with the CMake project built in it; without the Python modules and CUDA unless the options say so."""
    options = {"CNN_EXT_PYTHON": "OFF", "CNN_EXT_CUDA": "off"} | options
    targets = options.pop("targets", "all")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *definitions]
    make = ["cmake", "--build", str(folder), "--parallel", "2", "--target", *targets.split()]
    for command in (configure, make):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return folder


def kernels_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the editable install which is tested, or one of its own where there is none of the same sources."""
    cache = EDITABLE_BUILD / "CMakeCache.txt"
    if cache.is_file() and f"={_native.cpu.source_hash}\n" in cache.read_text():
        return EDITABLE_BUILD
    return cmake_build(tmp_path_factory.mktemp("kernels"), CNN_EXT_KERNEL_CHECK="ON")
