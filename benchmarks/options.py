"""What one run of benchmarks was asked for."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks import peak
from benchmarks.harness import BenchmarkError, CpuTimer, CudaTimer, Effort

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Bench:
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    only: str | None = None
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    effort: Effort = field(default_factory=Effort)
    data_dir: str | None = None
    winograd: bool = False  # whether convolutions may use it: conv2d then measures the layers that do

    @cached_property
    def timer(self) -> CpuTimer | CudaTimer:
        return CpuTimer() if self.device == "cpu" else CudaTimer()

    @cached_property
    def peak(self) -> Callable[[], float]:
        return peak.beside(self.device, self.timer, self.dtype)

    @property
    def unit_roundoff(self) -> float:
        """Of the arithmetic, which is float32's for the half types; on a GPU torch rounds its operands to TF32."""
        if self.dtype == torch.float64:
            return 2.0**-53
        return 2.0**-24 if self.device == "cpu" else 2.0**-11

    @property
    def result_roundoff(self) -> float:
        """Of the result, once, where it is narrower than the arithmetic."""
        return torch.finfo(self.dtype).eps if self.dtype.itemsize == 2 else 0.0

    def progress(self, line: str) -> None:
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{line:<78}", end=end, file=sys.stderr, flush=True)


def require_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: torch sees no GPU on this machine (torch.cuda.is_available() is false)")
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
