"""Where and with what a result was measured: without it, a figure means nothing."""

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from cnn_ext import _native

# glibc keeps freed memory under these: timings show kernels, not first-touch page faults. Both contenders get them.
NO_FAULT_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "67108864",
}
ALLOCATORS = ("nofault", "default")

# Under this one it gives every freed block of a tensor's size back at once. By default it stops doing so for blocks as
# large as one that it has seen freed, up to 32 MB: the resident set then counts the holes between them too.
RETURNING_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def allocator_environment(allocator: str) -> dict[str, str]:
    """This process's environment with the allocator's variables set, or taken away."""
    settings = {"default": {}, "nofault": NO_FAULT_ALLOCATOR, "returning": RETURNING_ALLOCATOR}
    environment = {name: value for name, value in os.environ.items() if name not in NO_FAULT_ALLOCATOR}
    return environment | settings[allocator]


def describe(device: str) -> dict:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "caches": _caches(),
            "isa": _native.cpu.best_isa(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "platform": platform.platform(),
        },
        "versions": {
            "commit": _commit(),
            "source_hash": _native.cpu.source_hash,
            "compiler": _native.cpu.compiler,
            "torch": torch.__version__,
            "onednn": _onednn(),
            "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
    }


def headline(document: dict) -> str:
    """What a result was measured with, in a line."""
    machine, versions = document["machine"], document["versions"]
    if document["device"] == "cuda":
        where = f"{machine['gpu']}, {arithmetic(document)}, torch {versions['torch']}, cuDNN {versions['cudnn']}"
    else:
        where = (
            f"{machine['cpu']}, {document['threads']} threads, {machine['isa']}, torch {versions['torch']}, "
            f"allocator {document['allocator']}"
        )
    return f"{where}, {document['date'][:10]}"


def arithmetic(document: dict) -> str:
    """The dtype of a result; on a GPU both contenders may round the operands of float32 products."""
    return "float32 (TF32)" if (document["device"], document["dtype"]) == ("cuda", "float32") else document["dtype"]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _caches() -> dict[str, str]:
    """Of the first core: level and type to size."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            caches[f"L{level}"] = size
    return caches


def _commit() -> str | None:
    """The commit of this clone, marked where files differ from it; None outside a clone, or without git."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _onednn() -> str | None:
    for line in torch.__config__.show().splitlines():
        if "MKL-DNN" in line or "oneDNN" in line:
            return line.strip(" -")
    return None
