"""The lecture's training loop, with its four histories.

Numbers are counted in tensors on the device and fetched only to be shown, so the loop never waits for them.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from cnn_ext.mnist.data import Dataset, Images
from cnn_ext.mnist.steps import CapturedStep, Step
from cnn_ext.mnist.tally import Tally

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Recipe:
    """What decides the numbers, besides the data and the backend; the defaults are the lecture's."""

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.001
    weight_decay: float = 0.0
    seed: int = 1


@dataclass
class History:
    """One entry per epoch. Those of training are taken while the weights move and dropout is on (the lecture's)."""

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    validation_seconds: list[float] = field(default_factory=list)


OnBatch = Callable[[int, Tally], None]


def _train_epoch(
    step: Callable[[torch.Tensor], None],
    tally: Tally,
    batches: tuple[torch.Tensor, ...],
    epoch: int,
    on_batch: OnBatch,
):
    tally.reset()
    for indices in batches:
        step(indices)
        on_batch(epoch, tally)
    return tally.means()


@torch.no_grad()
def evaluate(model: nn.Module, data: Images) -> tuple[float, float]:
    """Mean loss and accuracy over ``data``."""
    model.eval()
    tally = Tally(data.labels.device)
    for indices in torch.arange(len(data), device=data.labels.device).split(EVALUATION_BATCH):
        images, labels = data.batch(indices)
        logits = model(images)
        tally.add(F.cross_entropy(logits, labels), logits, labels)
    return tally.means()


def train(
    model: nn.Module, dataset: Dataset, recipe: Recipe, on_batch: OnBatch, *, compiled: bool = False
) -> Iterator[History]:
    """Trains epoch by epoch and gives the history after each; ``compiled``: with the model compiled by torch.compile.

    The order of the images comes from a generator of its own, on the CPU: it is the same for every backend and device.
    On a GPU the steps are captured in CUDA graphs.
    """
    device = dataset.train.labels.device
    on_gpu = device.type == "cuda"
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True, capturable=on_gpu
    )
    tally = Tally(device)
    step = Step(model, optimizer, dataset.train, tally, compiled=compiled)
    step = CapturedStep(step) if on_gpu else step
    torch.manual_seed(recipe.seed)
    history = History()
    for epoch in range(1, recipe.epochs + 1):
        batches = torch.randperm(len(dataset.train), generator=order).to(device).split(recipe.batch_size)
        started = time.perf_counter()
        model.train()
        loss, accuracy = _train_epoch(step, tally, batches, epoch, on_batch)
        trained = time.perf_counter()
        validation_loss, validation_accuracy = evaluate(model, dataset.validation)
        history.train_loss.append(loss)
        history.train_accuracy.append(accuracy)
        history.validation_loss.append(validation_loss)
        history.validation_accuracy.append(validation_accuracy)
        history.train_seconds.append(trained - started)
        history.validation_seconds.append(time.perf_counter() - trained)
        yield history
