"""What the machine does at most: multiply-adds in registers, bytes copied, and torch's own large matrix product."""

import time
from collections.abc import Callable

import torch

from benchmarks.cuda_timer import CudaTimer
from benchmarks.harness import CpuTimer, Effort, lower_quartile
from cnn_ext import _native

BESIDE_SECONDS = 0.005
MEMORY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
CACHE_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


def fma_gflops(seconds: float, threads: int | None = None, dtype: torch.dtype = torch.float32) -> float:
    """The GFLOP/s of the multiply-add loop, float32's for the half types."""
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    return _native.cpu.fma_gflops(_native.DTYPES[computed_in], threads or torch.get_num_threads(), seconds)


def cpu_peaks(timer: CpuTimer, seconds: float) -> dict[str, float]:
    """The figures of the roofline, each measured once, for about ``seconds``."""

    def rate(call: Callable[[], object]) -> float:
        call()
        samples, start = [], time.perf_counter()
        while len(samples) < 3 or time.perf_counter() - start < seconds:
            samples.append(timer.seconds(call, 1))
        return 1 / lower_quartile(samples)

    return {
        "gemm_gflops": _gemm_gflops("cpu", torch.float32, rate),
        "memory_gbytes_per_s": _copy_rate("cpu", MEMORY_BYTES, rate),
        "cache_gbytes_per_s": _copy_rate("cpu", CACHE_BYTES, rate),
        "fma_gflops": 1 / lower_quartile([1 / fma_gflops(0.01) for _ in range(10)]),
        "fma_gflops_one_thread": 1 / lower_quartile([1 / fma_gflops(0.01, threads=1) for _ in range(10)]),
    }


def cuda_peaks(timer: CudaTimer, dtype: torch.dtype) -> dict[str, float]:
    """The same of a GPU, with ``dtype``'s matrix product; what fits into the level 2 cache is copied within it."""

    def comparison(call: Callable[[], object]):
        return timer.compare({"call": call}, Effort(repeats=5, seconds=0.2))

    def warm(call: Callable[[], object]) -> float:
        return 1 / comparison(call).lower_quartile("call")

    def cold(call: Callable[[], object]) -> float:
        return 1 / lower_quartile(comparison(call).flushed["call"])

    return {
        "gemm_gflops": _gemm_gflops("cuda", dtype, warm),
        "memory_gbytes_per_s": _copy_rate("cuda", MEMORY_BYTES, cold),
        "cache_gbytes_per_s": _copy_rate("cuda", CACHE_BYTES, warm),
    }


def _gemm_gflops(device: str, dtype: torch.dtype, rate: Callable) -> float:
    size = GEMM_SIZE[device]
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return 1e-9 * 2 * size**3 * rate(lambda: torch.mm(matrix, matrix))


def _copy_rate(device: str, total_bytes: dict[str, int], rate: Callable) -> float:
    """GB/s read plus written by a copy that touches ``total_bytes`` in all."""
    source, target = (torch.ones(total_bytes[device] // 8, device=device) for _ in range(2))
    return 1e-9 * total_bytes[device] * rate(lambda: target.copy_(source))
