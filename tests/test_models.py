"""The comparison of converted models: it calls equal what is equal, and a wrong layer different."""

import json

import pytest
import torch
from torch import nn

from benchmarks import models


def small_cnn() -> nn.Module:
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=4),
    ]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, models.CLASSES))


def test_a_converted_model_equals_its_original():
    row = models._compare("tests", "small_cnn", small_cnn, 16)
    assert row.converted == 4 and not row.functional and row.layers == 3
    assert row.tolerance == pytest.approx(torch.finfo(torch.float64).eps * 2 * 3 * 72**0.5)
    assert row.equal


def test_a_wrong_layer_differs(monkeypatch):
    computed = models.cnn_ext.AvgPool2d.forward
    monkeypatch.setattr(models.cnn_ext.AvgPool2d, "forward", lambda self, x: computed(self, x) * (1 + 1e-10))
    assert not models._compare("tests", "small_cnn", small_cnn, 16).equal


class VanishingCnn(nn.Module):
    """Deep, with a residual branch that starts as zeros: with a new model's weights the logits hide all of it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))))
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))
        nn.init.zeros_(self.branch[1].weight)
        self.pool, self.head = nn.AvgPool2d(8), nn.Linear(3, models.CLASSES)
        nn.init.zeros_(self.head.weight)

    def forward(self, images):
        features = self.stem(images)
        return self.head(self.pool(features + self.branch(features)).flatten(1))


@pytest.mark.parametrize("wrong", range(13))
def test_a_layer_of_a_deep_model_is_seen(wrong, monkeypatch):
    convolutions = []
    computed = models.cnn_ext.Conv2d.forward

    def forward(self, x):
        if self not in convolutions:
            convolutions.append(self)
        return computed(self, x) * (1 + 1e-11 * (self is convolutions[min(wrong, len(convolutions) - 1)]))

    monkeypatch.setattr(models.cnn_ext.Conv2d, "forward", forward)
    row = models._compare("tests", "vanishing", VanishingCnn, 32)
    assert row.converted == 14 and not row.equal
    monkeypatch.undo()
    assert models._compare("tests", "vanishing", VanishingCnn, 32).equal


def test_the_page_counts_what_is_equal():
    rows = [models._compare("tests", "small_cnn", small_cnn, 16)]
    document = {"command": "c", "date": "2000-01-01 00:00 UTC", "versions": {"torch": "0"}}
    document["rows"] = [models.asdict(row) | {"equal": row.equal} for row in rows]
    text = models.page(document)
    assert "1 of 1 architectures" in text and "`small_cnn`" in text and "differs" not in text


def test_a_run_that_is_resumed_keeps_what_there_is(tmp_path, monkeypatch):
    measured = []

    def architectures(only):
        return [("timm", name, small_cnn, 16) for name in ("a", "b") if only(name)]

    def compare(library, name, build, size):
        measured.append(name)
        return compared(library, name, build, size)

    compared = models._compare
    monkeypatch.setattr(models, "_architectures", architectures)
    monkeypatch.setattr(models, "_compare", compare)
    monkeypatch.setattr(models, "DOCUMENT", tmp_path / "models.md")
    assert models.measure(tmp_path, "b", resume=False) == 0
    assert models.measure(tmp_path, "", resume=True) == 0
    assert measured == ["b", "a"]
    rows = json.loads((tmp_path / "models_cpu.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["a", "b"] and all(row["date"] for row in rows)
    assert "2 of 2 architectures" in (tmp_path / "models.md").read_text()
    with pytest.raises(models.BenchmarkError, match="further"):
        models.measure(tmp_path, "", resume=True)
