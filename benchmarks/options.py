"""What one run of benchmarks was asked for."""

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

import cnn_ext
from benchmarks import harness, peak
from benchmarks.cuda_timer import CudaTimer
from benchmarks.harness import BenchmarkError, Call, Comparison, CpuTimer, Effort

EFFORTS = {"cpu": Effort(), "cuda": Effort(repeats=7, seconds=0.1)}
DEFAULT_DTYPES = {"cpu": ["float32"], "cuda": ["float32", "bfloat16"]}
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
    layers: str = "conv2d"  # which list of convolutions: shapes/<layers>.csv
    winograd: bool = False  # whether convolutions may use it: conv2d then measures the layers that do

    failures: list[str] = field(default_factory=list)  # of rows that are left out: wrong results, refused calls

    @cached_property
    def timer(self) -> CpuTimer | CudaTimer:
        return CpuTimer() if self.device == "cpu" else CudaTimer()

    @cached_property
    def peaks(self) -> dict[str, float]:
        """What the machine does at most, measured once."""
        if self.device == "cpu":
            return peak.cpu_peaks(self.timer, self.effort.seconds)
        return peak.cuda_peaks(self.timer, self.dtype)

    def compare(self, contenders: dict[Hashable, Call], factor: int = 1) -> Comparison:
        """Times the contenders in turn, with ``factor`` times the effort; a CPU's peak is measured between them."""
        effort = self.effort.times(factor)
        if self.device == "cpu":
            return harness.compare(
                contenders, self.timer, lambda: peak.fma_gflops(peak.BESIDE_SECONDS, dtype=self.dtype), effort
            )
        result = self.timer.compare(contenders, effort)
        result.peak_gflops = [self.peaks["gemm_gflops"]]
        return result

    def random(self, size: tuple[int, ...], seed: int) -> torch.Tensor:
        """Normally distributed, made on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, generator=generator, device=self.device).to(self.dtype)

    def rows_of(self, measure: Callable[[], list[dict]]) -> list[dict]:
        """The rows of one comparison; none, and a failure noted, where a result is wrong or a call is refused."""
        try:
            return measure()
        except (BenchmarkError, NotImplementedError) as error:
            self.failures.append(str(error))
            return []

    @property
    def unit_roundoff(self) -> float:
        """Of the arithmetic, which is float32's for the half types; on a GPU float32 operands are rounded to TF32."""
        if self.dtype == torch.float64:
            return 2.0**-53
        return 2.0**-11 if self.device == "cuda" and self.dtype == torch.float32 else 2.0**-24

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
        _allow_tf32(True)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, float32 products on a GPU may, or may not, round their operands to TF32: of both contenders."""
    before = torch.backends.cudnn.allow_tf32
    _allow_tf32(allowed)
    try:
        yield
    finally:
        _allow_tf32(before)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def with_winograd(call: Call) -> Call:
    """The call with Winograd's algorithm allowed."""

    def allowed() -> None:
        with cnn_ext.flags(winograd=True):
            call()

    return allowed
