"""What one run of benchmarks was asked for."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks import peak
from benchmarks.harness import BenchmarkError, CpuTimer, CudaTimer, Effort

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Bench:
    device: str = "cpu"
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
        return peak.beside(self.device, self.timer)

    @property
    def unit_roundoff(self) -> float:
        """Of the arithmetic that float32 convolutions may use: on a GPU torch rounds their operands to TF32."""
        return 2.0**-24 if self.device == "cpu" else 2.0**-11

    def progress(self, line: str) -> None:
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{line:<78}", end=end, file=sys.stderr, flush=True)


def require_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: torch sees no GPU on this machine (torch.cuda.is_available() is false)")
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
