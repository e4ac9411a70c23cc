"""The device, the threads and the versions of a run."""

import ctypes
import os
import platform
from pathlib import Path

import numpy
import torch

import cnn_ext
from cnn_ext.mnist.errors import InputError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def device(name: str, backend: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``; ``auto`` is a GPU where there is one that the backend can use."""
    hindrance = None if name == "cpu" else _no_cuda(backend)
    if name == "cuda" and hindrance:
        raise InputError(f"--device cuda: {hindrance}; use --device cpu")
    return torch.device("cpu" if name == "cpu" or hindrance else "cuda")


def _no_cuda(backend: str) -> str | None:
    """Why CUDA cannot be used; None if it can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    if backend == "cnn_ext" and not isinstance(cnn_ext.build_info()["cuda"], dict):
        return "cnn_ext was built without CUDA"
    return None


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
        "cnn_ext": cnn_ext.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
