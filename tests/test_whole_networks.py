"""The benchmark of whole networks: its contenders, its picture, and the networks themselves. No time is asserted."""

import pytest
from torch import nn

from benchmarks import machine, networks, plots, whole_networks
from benchmarks.harness import BenchmarkError, Effort
from benchmarks.options import Bench

WHERE = {"device": "cpu", "allocator": "nofault"}


def small_network() -> nn.Module:
    """Like those of whole_networks, of one chain that is fused."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, networks.CLASSES))


def test_whole_networks_are_compared_with_both_layouts_of_torch(monkeypatch):
    monkeypatch.setattr(whole_networks, "EXTENT", 32)
    monkeypatch.setattr(whole_networks, "NETWORKS", {"small": small_network})
    rows = whole_networks.run(Bench(effort=Effort(1, 0.001)))
    for task, batch in (("inference", 1), ("training", 8)):
        names = [row["backend"] for row in rows if row["name"] == f"small {task}" and row["batch_size"] == batch]
        assert names[:4] == ["torch nchw", "torch channels_last", "cnn_ext nchw", "cnn_ext channels_last"]
        assert len(names) == 6 and sum("winograd" in name for name in names) == 1
    figure = plots.times_of_models({"benchmark": "networks", "rows": rows, **machine.describe("cpu"), **WHERE})
    assert len(figure.axes) == 2
    with pytest.raises(BenchmarkError, match="none of small matches 'large'"):
        whole_networks.run(Bench(only="large"))


def test_mobilenet_v2_has_the_parameters_of_its_paper():
    parameters = sum(parameter.numel() for parameter in networks.mobilenet_v2().parameters())
    assert parameters == 3_504_872  # torchvision's; the paper's table says 3.4 million
