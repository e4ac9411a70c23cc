"""The device, the threads and the versions of a run."""

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path

import numpy
import torch

from cnn_ext.mnist.errors import InputError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that the CPU affinity and the cgroup's quota leave to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota(Path("/sys/fs/cgroup")) or cores))


def _quota(root: Path) -> int | None:
    """The cgroup's CPU quota in cores, rounded up (version 2, then 1); None if there is none."""
    places = ((root / "cpu.max",), (root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"))
    for paths in places:
        try:
            quota, period = " ".join(path.read_text() for path in paths).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and int(quota) > 0:
            return -(-int(quota) // int(period))
    return None


def set_threads(requested: int | None) -> int:
    """Sets torch's threads, which the kernels follow, to at most the usable cores."""
    threads = min(requested or torch.get_num_threads(), usable_cores())
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> None:
    """Lets glibc keep the memory of freed tensors: fresh memory costs a page fault for every 4 KiB of every step."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_TOP_PAD, 1 << 26)


def versions() -> dict[str, str]:
    return {
        "cnn_ext": _version("cnn_ext"),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
