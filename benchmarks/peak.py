"""What the machine does at most: multiply-adds in registers, bytes copied, and torch's own large matrix product."""

import time
from collections.abc import Callable

import torch

from benchmarks.harness import Timer, lower_quartile
from cnn_ext import _native

BESIDE_SECONDS = 0.005
MEMORY_BYTES = 256 << 20
CACHE_BYTES = 1 << 20
GEMM_SIZE = 2048


def beside(device: str, timer: Timer, dtype: torch.dtype) -> Callable[[], float]:
    """The GFLOP/s that are measured between the contenders: the multiply-add loop (float32's for the half types), on a
    GPU a large matrix product."""
    if device == "cpu":
        return lambda: fma_gflops(BESIDE_SECONDS, dtype=dtype)
    matrix = torch.randn(2 * GEMM_SIZE, 2 * GEMM_SIZE, device=device)
    flops = 2 * matrix.shape[0] ** 3
    return lambda: 1e-9 * flops / timer.seconds(lambda: torch.mm(matrix, matrix), 1)


def fma_gflops(seconds: float, threads: int | None = None, dtype: torch.dtype = torch.float32) -> float:
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    return _native.cpu.fma_gflops(_native.DTYPES[computed_in], threads or torch.get_num_threads(), seconds)


def machine_peaks(device: str, timer: Timer, seconds: float) -> dict[str, float]:
    """The figures of the roofline, each measured once, for about ``seconds``."""
    peaks = {
        "gemm_gflops": _gemm_gflops(device, timer, seconds),
        "memory_gbytes_per_s": _copy_rate(MEMORY_BYTES, device, timer, seconds),
        "cache_gbytes_per_s": _copy_rate(CACHE_BYTES, device, timer, seconds),
    }
    if device == "cpu":
        peaks["fma_gflops"] = 1 / lower_quartile([1 / fma_gflops(0.01) for _ in range(10)])
        peaks["fma_gflops_one_thread"] = 1 / lower_quartile([1 / fma_gflops(0.01, threads=1) for _ in range(10)])
    return peaks


def _gemm_gflops(device: str, timer: Timer, seconds: float) -> float:
    matrix = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device)
    return 1e-9 * 2 * GEMM_SIZE**3 * _rate(lambda: torch.mm(matrix, matrix), timer, seconds)


def _copy_rate(total_bytes: int, device: str, timer: Timer, seconds: float) -> float:
    """GB/s read plus written by a copy that touches ``total_bytes`` in all."""
    source, target = (torch.ones(total_bytes // 8, device=device) for _ in range(2))
    return 1e-9 * total_bytes * _rate(lambda: target.copy_(source), timer, seconds)


def _rate(call: Callable[[], object], timer: Timer, seconds: float) -> float:
    """Calls per second, at the lower quartile of their times."""
    call()
    samples, start = [], time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - start < seconds:
        samples.append(timer.seconds(call, 1))
    return 1 / lower_quartile(samples)
