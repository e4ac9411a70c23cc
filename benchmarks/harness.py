"""The protocol: contenders alternate in one process, rounds under foreign load are rejected, lower quartiles count.

The times are a CPU's; ``cuda_timer.py`` has those of a GPU."""

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch

SAMPLE_SECONDS = 0.002  # a sample repeats its call until it lasts about this long: clock and loop are then nothing
WINDOW_SECONDS = 0.15  # rounds are judged for foreign load together, in windows long against ticks of 10 ms
FOREIGN_SHARE = 0.10  # of all cores: more than this for others, and a window is rejected
SLOW_SECONDS = 1.0  # a call that takes longer, and longer than the comparison may, counts once, the first time
LONG_SECONDS = 0.02  # after a longer sample the next contender is called once untimed: its threads slept
LEAST_ROUNDS = 3  # one round is one moment of the machine: a comparison of long calls goes on for so many, ...
LEAST_ROUNDS_SECONDS = 10.0  # ... on a CPU unless it took so long
PATIENCE = 3  # a comparison under foreign load may take this many times its budget

Call = Callable[[], object]


class BenchmarkError(Exception):
    """A result that must not be timed, or a machine that cannot time it; one line for the user."""


@dataclass(frozen=True)
class Effort:
    """How long one comparison goes on: until ``repeats`` rounds were accepted, or a few and ``seconds`` are over."""

    repeats: int = 15
    seconds: float = 0.8

    def times(self, factor: int) -> "Effort":
        return Effort(self.repeats * factor, self.seconds * factor)


class CpuTimer:
    device = "cpu"

    def seconds(self, call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


class ForeignLoad:
    """The share of all cores that others had since this was made: busy time of the machine less this process's own.

    A child's time is its parent's own from the moment that it has ended.
    """

    def __init__(self) -> None:
        self._wall, self._own, self._busy = time.perf_counter(), _own_seconds(), _busy_seconds()

    def share(self) -> float:
        wall = time.perf_counter() - self._wall
        own = _own_seconds() - self._own
        foreign = _busy_seconds() - self._busy - own
        return max(0.0, foreign) / (wall * os.cpu_count())


def _own_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _busy_seconds() -> float:
    """Seconds that all cores together spent on anything since the start, those that the hypervisor took included."""
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) for x in stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass
class Comparison:
    """What the contenders took, sample by sample, and the peak rates that were measured between them.

    ``flushed``: on a GPU, the same after the level 2 cache was overwritten.
    """

    seconds: dict[Hashable, list[float]]
    peak_gflops: list[float] = field(default_factory=list)
    accepted: int = 0
    rejected: int = 0
    flushed: dict[Hashable, list[float]] = field(default_factory=dict)

    def lower_quartile(self, name: Hashable) -> float:
        return lower_quartile(self.seconds[name])

    def against_torch(self, layout: str, layouts: Iterable[str]) -> dict[str, float]:
        """The fields of a row: cnn_ext in ``layout`` against torch in the same one and in its best of ``layouts``."""
        fields = _against_torch(self.seconds, layout, layouts)
        if self.flushed:
            flushed = _against_torch(self.flushed, layout, layouts)
            fields |= {f"flushed_{name}": value for name, value in flushed.items()}
        return fields

    def peak(self) -> float:
        """The lower quartile of the time is the upper one of a rate."""
        return 1 / lower_quartile([1 / rate for rate in self.peak_gflops])

    def quality(self) -> dict[str, int]:
        return {"rounds_accepted": self.accepted, "rounds_rejected": self.rejected}


def _against_torch(seconds: dict[Hashable, list[float]], layout: str, layouts: Iterable[str]) -> dict[str, float]:
    own, same = (lower_quartile(seconds[backend, layout]) for backend in ("cnn_ext", "torch"))
    best = min(lower_quartile(seconds["torch", other]) for other in layouts)
    return {
        "ms": 1e3 * own,
        "torch_ms": 1e3 * same,
        "torch_best_ms": 1e3 * best,
        "speed_vs_torch": same / own,
        "speed_vs_best": best / own,
    }


def lower_quartile(samples: list[float]) -> float:
    return samples[0] if len(samples) == 1 else statistics.quantiles(samples, n=4, method="inclusive")[0]


def compare(contenders: dict[Hashable, Call], timer: CpuTimer, peak: Callable[[], float], effort: Effort) -> Comparison:
    """Times the contenders in turn, with the peak beside them, round after round.

    If not one window was quiet, the samples taken under load are kept, and ``accepted`` is 0: the reader is told. Of a
    slow contender there is one sample, its first call.
    """
    first = {name: timer.seconds(call, 1) for name, call in contenders.items()}  # warms up: memory, threads, caches
    slow = {name: [seconds] for name, seconds in first.items() if seconds > max(SLOW_SECONDS, effort.seconds)}
    contenders = {name: call for name, call in contenders.items() if name not in slow}
    calls = {name: _calls_per_sample(call, timer) for name, call in contenders.items()}
    quiet, loaded = Comparison({name: [] for name in contenders}), Comparison({name: [] for name in contenders})
    start = time.perf_counter()
    while quiet.accepted < effort.repeats:
        if _is_over(quiet, time.perf_counter() - start, effort):
            break
        window, share = _window(contenders, calls, timer, peak)
        _merge(quiet if share <= FOREIGN_SHARE else loaded, window)
    result = quiet if quiet.accepted else loaded
    result.accepted, result.rejected = quiet.accepted, loaded.accepted
    result.seconds |= slow
    return result


def _is_over(quiet: Comparison, elapsed: float, effort: Effort) -> bool:
    if quiet.accepted == 0:
        return elapsed > effort.seconds * PATIENCE
    limit = effort.seconds if quiet.accepted >= LEAST_ROUNDS else max(effort.seconds, LEAST_ROUNDS_SECONDS)
    return elapsed > limit


def _calls_per_sample(call: Call, timer: CpuTimer) -> int:
    return max(1, min(1000, round(SAMPLE_SECONDS / timer.seconds(call, 1))))


def _window(contenders, calls, timer, peak) -> tuple[Comparison, float]:
    window = Comparison({name: [] for name in contenders})
    load, start, last_lasted = ForeignLoad(), time.perf_counter(), 0.0
    while time.perf_counter() - start < WINDOW_SECONDS:
        for name, call in contenders.items():
            if last_lasted > LONG_SECONDS:
                call()
            seconds = timer.seconds(call, calls[name])
            last_lasted = calls[name] * seconds
            window.seconds[name].append(seconds)
        window.peak_gflops.append(peak())
        window.accepted += 1
    return window, load.share()


def _merge(into: Comparison, window: Comparison) -> None:
    for name, samples in window.seconds.items():
        into.seconds[name] += samples
    into.peak_gflops += window.peak_gflops
    into.accepted += window.accepted


def check_close(what: str, ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> float:
    """The largest absolute error against a float64 reference; BenchmarkError where it is above the tolerance or NaN."""
    if ours.shape != reference.shape:
        raise BenchmarkError(f"{what}: shape {tuple(ours.shape)}, torch has {tuple(reference.shape)}")
    error = float((ours.detach().double() - reference).abs().max())
    if not error <= tolerance:
        raise BenchmarkError(f"{what}: differs from torch in float64 by {error:.3g}, allowed are {tolerance:.3g}")
    return error
