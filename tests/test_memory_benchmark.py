"""The benchmark of memory: what is kept for backward, the peak of a call, and a row of both."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import cnn_ext
from benchmarks import memory
from benchmarks.machine import allocator_environment

ROOT = Path(__file__).resolve().parent.parent


def printed(script: str, allocator: str = "default") -> str:
    """In a process of its own, as the benchmark has it: what earlier tests freed here would be used again."""
    command = [sys.executable, "-c", f"import torch; from benchmarks import memory\n{script}"]
    environment = allocator_environment(allocator)
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def test_what_is_kept_for_backward_is_counted_once_and_without_parameters():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    input = torch.randn(2, 3, 8, 8)
    output, pooled = 2 * 8 * 64, 2 * 8 * 16
    assert memory.saved_bytes(model, input) == 4 * input.numel() + 4 * output + 8 * pooled
    assert memory.saved_bytes(cnn_ext.convert(model), input) == 4 * input.numel() + 4 * output + pooled
    assert memory.saved_bytes(cnn_ext.convert(model, fuse=True), input) == 4 * input.numel() + pooled


def test_the_peak_is_of_the_call_alone():
    elements = 1 << 24
    script = f"held = torch.ones(1 << 22); print(memory.peak_bytes(lambda: torch.ones({elements})))"
    assert 0.9 * 4 * elements < int(printed(script)) < 2 * 4 * elements


def test_memory_is_given_back_where_a_peak_is_to_be_what_is_needed():
    """The default allocator keeps the hole that ``lower`` leaves, for it has seen a block as large freed before."""
    elements = 1 << 20
    script = f"""
torch.ones(4 * {elements})
lower, upper = torch.ones({elements}), torch.ones({elements})
before = memory._status("VmRSS")
del lower
print(before - memory._status("VmRSS"))
"""
    assert int(printed(script, "default")) < 0.1 * 4 * elements
    assert int(printed(script, "returning")) > 0.9 * 4 * elements


def test_a_row_of_the_memory_benchmark():
    """What is kept for backward is part of the peak, where nothing freed before is at hand to hold it."""
    script = 'import json; print(json.dumps(memory.row_of("resnet50", "cnn_ext", 2, 64)))'
    row = json.loads(printed(script, "returning"))
    assert 0 < row["saved_mb"] < row["peak_mb"]
