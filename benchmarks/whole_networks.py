"""Whole networks, as they come and converted: inference on one image, and forward and backward of a batch.

What a user sees, with all that is not convolution or pooling: normalisation, activations, linear layers, all of them
torch's own.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import cnn_ext
from benchmarks.harness import BenchmarkError, Call, Comparison
from benchmarks.networks import CLASSES, NETWORKS
from benchmarks.options import LAYOUTS, Bench, with_winograd

EXTENT = 224
INFERENCE_BATCH, TRAINING_BATCH = 1, 8
EFFORT_FACTOR = 20  # a call takes tens to thousands of milliseconds

# Of the logits, relative to the largest: float32's rounding through the depth of these networks, with a wide margin.
LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Contender:
    """A way to run a network: how the model is prepared, its layout, and whether Winograd's algorithm is allowed."""

    name: str
    prepare: Callable[[nn.Module], nn.Module]
    layout: str = "nchw"
    winograd: bool = False


def _fused(model: nn.Module) -> nn.Module:
    return cnn_ext.convert(model, fuse=True)


def _packed(model: nn.Module) -> nn.Module:
    return cnn_ext.pack(_fused(model))


TORCH = tuple(Contender(f"torch {layout}", lambda model: model, layout) for layout in LAYOUTS)
CONVERTED = tuple(Contender(f"cnn_ext {layout}", cnn_ext.convert, layout) for layout in LAYOUTS)
TASKS = {
    "inference": (
        *TORCH,
        *CONVERTED,
        Contender("cnn_ext fused packed nchw", _packed),
        Contender("cnn_ext fused packed winograd nchw", _packed, winograd=True),
    ),
    "training": (
        *TORCH,
        *CONVERTED,
        Contender("cnn_ext fused nchw", _fused),
        Contender("cnn_ext fused winograd nchw", _fused, winograd=True),
    ),
}


def run(bench: Bench) -> list[dict]:
    if bench.device != "cpu":
        raise BenchmarkError("networks: measured on a CPU alone")
    networks = {name: build for name, build in NETWORKS.items() if re.search(bench.only or "", name)}
    if not networks:
        raise BenchmarkError(f"--only: none of {', '.join(NETWORKS)} matches {bench.only!r}")
    rows = []
    for network, build in networks.items():
        torch.manual_seed(1)
        original = _with_a_signal(build())
        for task, contenders in TASKS.items():
            bench.progress(f"networks: {network}, {task}")
            rows += bench.rows_of(lambda: _rows_of(network, original, task, contenders, bench))  # noqa: B023 - at once
    return rows


def _with_a_signal(model: nn.Module) -> nn.Module:
    """With the weights of He et al. 2015, which keep the signal's size, and without biases: else the logits of an
    untrained network are its last bias, and equal whatever the layers compute."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def _rows_of(
    network: str, original: nn.Module, task: str, contenders: tuple[Contender, ...], bench: Bench
) -> list[dict]:
    images = torch.randn(INFERENCE_BATCH if task == "inference" else TRAINING_BATCH, 3, EXTENT, EXTENT)
    calls: dict[str, Call] = {}
    with torch.no_grad():
        wanted = original.eval()(images)
    for contender in contenders:
        memory_format = LAYOUTS[contender.layout]
        model = contender.prepare(copy.deepcopy(original)).to(memory_format=memory_format)
        laid_out = images.contiguous(memory_format=memory_format)
        with cnn_ext.flags(winograd=contender.winograd):
            _check_logits(f"{network}, {contender.name}", model, laid_out, wanted)
        call = _inference(model, laid_out) if task == "inference" else _training(model, laid_out)
        calls[contender.name] = with_winograd(call) if contender.winograd else call
    times = bench.compare(calls, EFFORT_FACTOR)
    return [_row(f"{network} {task}", name, len(images), times) for name in calls]


def _check_logits(what: str, model: nn.Module, images: torch.Tensor, wanted: torch.Tensor) -> None:
    with torch.no_grad():
        error = (model.eval()(images) - wanted).abs().max() / wanted.abs().max()
    if not error <= LOGITS_TOLERANCE:
        raise BenchmarkError(f"{what}: a logit differs from torch's by {error:.3g} of the largest")


def _inference(model: nn.Module, images: torch.Tensor) -> Call:
    model.eval()

    def infer() -> None:
        with torch.inference_mode():
            model(images)

    return infer


def _training(model: nn.Module, images: torch.Tensor) -> Call:
    """Forward and backward, without an optimiser's step; the gradients are added to those that are there."""
    labels = torch.randint(CLASSES, (len(images),))
    model.train()

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()

    return step


def _row(name: str, backend: str, batch: int, times: Comparison) -> dict:
    own = times.lower_quartile(backend)
    return {
        "name": name,
        "backend": backend,
        "batch_size": batch,
        "ms": 1e3 * own,
        "time_vs_torch": own / times.lower_quartile("torch nchw"),
        "peak_gflops": times.peak(),
        **times.quality(),
    }
