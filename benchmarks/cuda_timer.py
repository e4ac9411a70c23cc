"""How calls are timed on a GPU, both ways by events: replayed from a graph with warm caches, and one by one after the
level 2 cache was overwritten.

The processor has to stay ahead of the GPU, or the events measure its launches: the replay before a timed one, and the
overwriting before a timed call, keep the GPU busy until the rest is queued.
"""

import itertools
import time
from collections.abc import Hashable

import torch

from benchmarks.harness import LEAST_ROUNDS, Call, Comparison, Effort

CAPTURED_CALLS = 10  # in one graph, fewer where they last long
CAPTURED_SECONDS = 1e-3
REPLAYS = 2  # timed in a row, after one that warms the caches up
FLUSHED_CALLS = 3
FLUSHED_CACHES = 16  # so many times the size of the level 2 cache is overwritten: longer than a call takes to queue


class CudaTimer:
    """Times calls on a stream of its own; graphs share one pool of memory, which lives as long as this."""

    def __init__(self) -> None:
        cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._overwritten = torch.empty(FLUSHED_CACHES * cache_bytes, dtype=torch.uint8, device="cuda")
        self._stream = torch.cuda.Stream()
        self._keeper = torch.cuda.CUDAGraph()  # the pool is freed with its last graph
        with torch.cuda.stream(self._stream):
            _capture(self._keeper, lambda: torch.zeros(1, device="cuda"), 1)

    def compare(self, contenders: dict[Hashable, Call], effort: Effort) -> Comparison:
        """Times the contenders in turn, both ways, until ``effort`` is spent."""
        result = Comparison({name: [] for name in contenders}, flushed={name: [] for name in contenders})
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            replays = {name: _Replay(call, self._first(call), self._keeper.pool()) for name, call in contenders.items()}
            start = time.perf_counter()
            while result.accepted < effort.repeats:
                if result.accepted >= LEAST_ROUNDS and time.perf_counter() - start > effort.seconds:
                    break
                for name, call in contenders.items():
                    result.seconds[name] += replays[name].seconds()
                    result.flushed[name] += self.flushed(call)
                result.accepted += 1
            for replay in replays.values():
                replay.graph.reset()
        torch.cuda.synchronize()
        return result

    def _first(self, call: Call) -> float:
        """Seconds of a call after the first, in which libraries search, load and allocate."""
        call()
        torch.cuda.synchronize()
        return min(self.flushed(call))

    def flushed(self, call: Call) -> list[float]:
        """Seconds of each of a few calls, every one of which finds nothing in the level 2 cache."""
        pairs = []
        for _ in range(FLUSHED_CALLS):
            self._overwritten.zero_()
            start = _recorded()
            call()
            pairs.append((start, _recorded()))
        pairs[-1][1].synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]


class _Replay:
    """Calls in a graph."""

    def __init__(self, call: Call, seconds: float, pool) -> None:
        self.calls = max(1, min(CAPTURED_CALLS, round(CAPTURED_SECONDS / seconds)))
        self.graph = torch.cuda.CUDAGraph()
        _capture(self.graph, call, self.calls, pool)

    def seconds(self) -> list[float]:
        """Seconds of a call, from each of a few replays."""
        self.graph.replay()
        events = [_recorded()]
        for _ in range(REPLAYS):
            self.graph.replay()
            events.append(_recorded())
        events[-1].synchronize()
        return [1e-3 * a.elapsed_time(b) / self.calls for a, b in itertools.pairwise(events)]


def _recorded() -> torch.cuda.Event:
    """An event on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _capture(graph: torch.cuda.CUDAGraph, call: Call, calls: int, pool=None) -> None:
    """What ``torch.cuda.graph`` does, without giving all cached memory back, which takes longer than the calls."""
    torch.cuda.synchronize()
    graph.capture_begin(**({} if pool is None else {"pool": pool}))
    try:
        for _ in range(calls):
            call()
    finally:
        graph.capture_end()
