"""Builds the compiled modules with CMake; everything else about the package stands in pyproject.toml."""

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
EDITABLE_BUILD = ROOT / "build" / "editable"
source_hash = runpy.run_path(str(ROOT / "cnn_ext" / "_source_hash.py"))["source_hash"]


def built_files(directory: Path) -> list[Path]:
    """What CMake installs: the modules, the summary of the build and the figures of the CUDA kernels."""
    return [path for pattern in ("_C.*.so", "_cuda.*.so", "_*.txt") for path in directory.glob(pattern)]


class CMakeBuild(build_ext):
    """Runs CMake in a fresh directory and keeps what it installs.

    A cached build directory would point into the isolated environment of the last build, which is gone. That of an
    editable install stays all the same, with kernel_check in it: the tests look at the objects that they run.
    """

    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        destination.mkdir(parents=True, exist_ok=True)
        for stale in built_files(destination):
            stale.unlink()
        if self.editable_mode:
            shutil.rmtree(EDITABLE_BUILD, ignore_errors=True)
            self._build(EDITABLE_BUILD, destination, "-DCNN_EXT_KERNEL_CHECK=ON")
        else:
            with tempfile.TemporaryDirectory(prefix="cnn_ext-build-") as build_dir:
                self._build(Path(build_dir), destination)

    def _build(self, build_dir: Path, destination: Path, *definitions: str) -> None:
        self._cmake("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *self._definitions(), *definitions)
        self._cmake("--build", str(build_dir), *self._jobs())
        self._cmake("--install", str(build_dir), "--prefix", str(destination))
        shutil.copy(build_dir / "compile_commands.json", ROOT / "compile_commands.json")
        print((build_dir / "_build_summary.txt").read_text())

    def copy_extensions_to_source(self) -> None:
        """In-place builds: everything that CMake has installed, of which setuptools knows _C alone."""
        for stale in built_files(ROOT / "cnn_ext"):
            stale.unlink()
        for built in built_files(Path(self.build_lib) / "cnn_ext"):
            shutil.copy(built, ROOT / "cnn_ext")

    @staticmethod
    def _cmake(*arguments: str) -> None:
        subprocess.run(["cmake", *arguments], check=True)

    @staticmethod
    def _definitions() -> list[str]:
        forwarded = [
            f"-D{name}={os.environ[name]}" for name in ("CNN_EXT_CUDA", "CNN_EXT_CUDA_ARCHS") if name in os.environ
        ]
        pybind11_dir = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
        ).stdout.strip()
        return [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir}",
            f"-DCNN_EXT_SOURCE_HASH={source_hash(ROOT / 'csrc')}",
            *forwarded,
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]

    @staticmethod
    def _jobs() -> list[str]:
        return ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []


setup(ext_modules=[Extension("cnn_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
