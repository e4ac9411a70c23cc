"""Comparisons with a contender that takes long: bounded, and said so."""

import time

import torch

from benchmarks import conv2d, harness
from benchmarks.cases import conv2d_cases
from benchmarks.harness import CpuTimer, Effort, compare
from benchmarks.options import Bench


class SlowTimer:
    """A minute for calls that say "slow"; remembers the order."""

    def __init__(self) -> None:
        self.order = []

    def seconds(self, call, calls: int) -> float:
        self.order.append(call())
        return 60.0 if self.order[-1] == "slow" else 0.01


def test_a_slow_contender_is_called_once():
    timer = SlowTimer()
    result = compare({"slow": lambda: "slow", "fast": lambda: "fast"}, timer, lambda: 1.0, Effort(3, 0.3))
    assert timer.order.count("slow") == 1
    assert result.seconds["slow"] == [60.0] and len(result.seconds["fast"]) >= 3
    assert result.lower_quartile("slow") == 60.0


def test_after_a_long_sample_the_next_contender_is_called_once_untimed():
    untimed, timed = [], []

    class Timer:
        def seconds(self, call, calls: int) -> float:
            timed.append(call())
            del untimed[-1]
            return {"long": 0.05, "fast": 0.002}[timed[-1]]

    def contender(name: str):
        return lambda: untimed.append(name) or name

    compare({"long": contender("long"), "fast": contender("fast")}, Timer(), lambda: 1.0, Effort(1, 0.1))
    rounds = timed.count("long") - 2  # without the first call and the one that says how many make a sample
    assert untimed.count("fast") == rounds and untimed.count("long") == 0


def test_long_calls_are_compared_in_a_few_rounds_for_a_limited_time(monkeypatch):
    def rounds() -> int:
        longer_than_a_window = {"a": lambda: time.sleep(0.1), "b": lambda: time.sleep(0.1)}
        return len(compare(longer_than_a_window, CpuTimer(), lambda: 1.0, Effort(15, 0.01)).seconds["a"])

    monkeypatch.setattr(harness, "FOREIGN_SHARE", 1.0)
    assert rounds() == harness.LEAST_ROUNDS
    monkeypatch.setattr(harness, "LEAST_ROUNDS_SECONDS", 0.1)
    assert rounds() == 1


def test_where_torch_is_slow_a_layer_is_measured_on_fewer_samples():
    case = conv2d_cases("vgg_conv4_1")[0]
    for dtype, direction, batch in (
        (torch.float16, "backward_weight", 1),
        (torch.float16, "forward", case.batch),
        (torch.bfloat16, "backward_weight", case.batch),
    ):
        bench = Bench(dtype=dtype)
        measured, tensors = conv2d._measured(case, direction, conv2d.random_tensors(case, bench), bench)
        assert measured.batch == batch and tensors.in_layout("nchw").input.shape == measured.input_size
