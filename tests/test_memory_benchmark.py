"""The benchmark of memory: what is kept for backward, the peak of a call, and a row of both."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import cnn_ext
from benchmarks import memory

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_kept_for_backward_is_counted_once_and_without_parameters():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    input = torch.randn(2, 3, 8, 8)
    output, pooled = 2 * 8 * 64, 2 * 8 * 16
    assert memory.saved_bytes(model, input) == 4 * input.numel() + 4 * output + 8 * pooled
    assert memory.saved_bytes(cnn_ext.convert(model), input) == 4 * input.numel() + 4 * output + pooled
    assert memory.saved_bytes(cnn_ext.convert(model, fuse=True), input) == 4 * input.numel() + pooled


def test_the_peak_is_of_the_call_alone():
    """In a process of its own, as the benchmark has it: what earlier tests freed here would be used again."""
    elements = 1 << 24
    script = f"held = torch.ones(1 << 22); print(memory.peak_bytes(lambda: torch.ones({elements})))"
    command = [sys.executable, "-c", f"import torch; from benchmarks import memory; {script}"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert 0.9 * 4 * elements < int(done.stdout) < 2 * 4 * elements


def test_a_row_of_the_memory_benchmark():
    row = memory.row_of("resnet50", "cnn_ext", 2, 32)
    assert row["saved_mb"] > 0 and row["peak_mb"] > 0
