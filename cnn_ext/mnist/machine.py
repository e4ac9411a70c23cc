"""The device, the threads and the versions of a run."""

import os
import platform
from pathlib import Path

import numpy
import torch

import cnn_ext
from cnn_ext.mnist.errors import InputError


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


def allow_tf32() -> None:
    """Lets a GPU round the operands of float32 matrix products to TF32, as torch lets it in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = True


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
    """The cores that the CPU affinity and the cgroups' quotas leave to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        membership = Path("/proc/self/cgroup").read_text()
    except OSError:
        return cores
    return max(1, min(cores, quota(membership, Path("/sys/fs/cgroup")) or cores))


def quota(membership: str, root: Path) -> int | None:
    """The least CPU quota of a process's cgroups and of those above them, in cores, rounded up; None if there is none.

    ``membership`` is its /proc/PID/cgroup: lines of number:controllers:path, version 2 without controllers.
    """
    quotas = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        own = base / path.strip("/")
        quotas += [_read_quota(group, names) for group in (own, *own.parents) if group.is_relative_to(base)]
    return min(filter(None, quotas), default=None)


def _read_quota(group: Path, names: tuple[str, ...]) -> int | None:
    try:
        allowed, period = " ".join((group / name).read_text() for name in names).split()
    except (OSError, ValueError):
        return None
    return -(-int(allowed) // int(period)) if allowed.isdigit() else None


def set_threads(requested: int | None) -> int:
    """Sets torch's threads, which the kernels follow, to at most the usable cores."""
    threads = min(requested or torch.get_num_threads(), usable_cores())
    torch.set_num_threads(threads)
    return threads


def versions() -> dict[str, str]:
    return {
        "cnn_ext": cnn_ext.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
