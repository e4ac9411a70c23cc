"""What a training step of a whole network keeps for backward, and its peak memory beyond parameters and gradients.

Every run has a process of its own: the peak is the kernel's, of the process's resident set, from the step's
beginning on. It is taken twice: with an allocator that gives freed blocks back at once, where it is what the step
needs, the same in every run to 0.1 MB, and with the default one, where holes between blocks come on top: of
ResNet-50's peak a fifth, more or less by a tenth of the peak from run to run.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import cnn_ext
from benchmarks import machine
from benchmarks.harness import BenchmarkError
from benchmarks.networks import CLASSES, NETWORKS
from benchmarks.tables import Column, plain

CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda model: model,
    "cnn_ext": cnn_ext.convert,
    "cnn_ext fused": lambda model: cnn_ext.convert(model, fuse=True),
}
BATCH, EXTENT = 8, 224
RUNS = 9  # the one with the middle peak is quoted: what the C library gives back, and when, varies
WARM_EXTENT = 32  # a first step on small images loads code and starts threads, and allocates the gradients

COLUMNS = [
    Column("network", lambda row: row["network"]),
    Column("who", lambda row: row["backend"]),
    Column("saved MB", lambda row: row["saved_mb"], ".1f"),
    Column("of torch's", lambda row: row["saved_vs_torch"], ".3f"),
    Column("needed MB", lambda row: row["needed_mb"], ".1f"),
    Column("of torch's", lambda row: row["needed_vs_torch"], ".3f"),
    Column("peak MB", lambda row: row["peak_mb"], ".1f"),
    Column("of torch's", lambda row: row["peak_vs_torch"], ".3f"),
]


def measure(results: Path, batch: int = BATCH, extent: int = EXTENT) -> None:
    """Prints the table and writes ``results``/memory.json."""
    rows = []
    for network in NETWORKS:
        for backend in CONTENDERS:
            print(f"memory: {network}, {backend}", file=sys.stderr)
            runs = [_in_own_process(network, backend, batch, extent, "default") for _ in range(RUNS)]
            rows.append(sorted(runs, key=lambda run: run["peak_mb"])[RUNS // 2])
            rows[-1]["needed_mb"] = _in_own_process(network, backend, batch, extent, "returning")["peak_mb"]
            for figure in ("saved", "needed", "peak"):
                torchs = next(row for row in rows if row["network"] == network)
                rows[-1][f"{figure}_vs_torch"] = rows[-1][f"{figure}_mb"] / torchs[f"{figure}_mb"]
    what = {"benchmark": "memory", "device": "cpu", "allocator": "default", "command": "python -m benchmarks memory"}
    document = machine.describe("cpu") | what | {"rows": rows}
    print(plain(COLUMNS, rows))
    path = results / "memory.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}")


def _in_own_process(network: str, backend: str, batch: int, extent: int, allocator: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", network, backend, str(batch), str(extent)]
    environment = machine.allocator_environment(allocator)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"memory: {network}, {backend} ended with status {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def row_of(network: str, backend: str, batch: int, extent: int) -> dict:
    torch.manual_seed(1)
    model = CONTENDERS[backend](NETWORKS[network]()).train()
    step(model, 2, WARM_EXTENT)
    peak = peak_bytes(lambda: step(model, batch, extent))
    saved = saved_bytes(model, torch.randn(batch, 3, extent, extent))
    return {
        "network": network,
        "backend": backend,
        "batch_size": batch,
        "extent": extent,
        "saved_mb": saved / 1e6,
        "peak_mb": peak / 1e6,
    }


def step(model: nn.Module, batch: int, extent: int) -> None:
    """Forward and backward; the gradients are added to those that are there."""
    images, labels = torch.randn(batch, 3, extent, extent), torch.randint(CLASSES, (batch,))
    F.cross_entropy(model(images), labels).backward()


def saved_bytes(model: nn.Module, input: torch.Tensor) -> int:
    """Of the storages that autograd keeps for backward, each once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input)
    saved = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)
    assert output.requires_grad
    return saved


def peak_bytes(call: Callable[[], None]) -> int:
    """How far the resident set of this process grows during ``call``."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("backend", choices=CONTENDERS)
    parser.add_argument("batch", type=int)
    parser.add_argument("extent", type=int)
    print(json.dumps(row_of(**vars(parser.parse_args()))))
