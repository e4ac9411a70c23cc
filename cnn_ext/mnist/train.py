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


class Tally:
    """Sums of loss and correct answers over the images seen, kept on the device."""

    def __init__(self, device: torch.device):
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.correct = torch.zeros((), device=device, dtype=torch.int64)
        self.images = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.loss_sum += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(dim=1) == labels).sum()
        self.images += len(labels)

    def means(self) -> tuple[float, float]:
        """Loss and accuracy; waits for the device."""
        return self.loss_sum.item() / self.images, self.correct.item() / self.images


OnBatch = Callable[[int, Tally], None]


def _train_epoch(
    model: nn.Module, optimizer, data: Images, batches: tuple[torch.Tensor, ...], epoch: int, on_batch: OnBatch
):
    model.train()
    tally = Tally(data.labels.device)
    for indices in batches:
        images, labels = data.batch(indices)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tally.add(loss, logits, labels)
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


def train(model: nn.Module, dataset: Dataset, recipe: Recipe, on_batch: OnBatch) -> Iterator[History]:
    """Trains epoch by epoch and gives the history after each.

    The order of the images comes from a generator of its own, on the CPU: it is the same for every backend and device.
    """
    device = dataset.train.labels.device
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    torch.manual_seed(recipe.seed)
    history = History()
    for epoch in range(1, recipe.epochs + 1):
        batches = torch.randperm(len(dataset.train), generator=order).to(device).split(recipe.batch_size)
        started = time.perf_counter()
        loss, accuracy = _train_epoch(model, optimizer, dataset.train, batches, epoch, on_batch)
        trained = time.perf_counter()
        validation_loss, validation_accuracy = evaluate(model, dataset.validation)
        history.train_loss.append(loss)
        history.train_accuracy.append(accuracy)
        history.validation_loss.append(validation_loss)
        history.validation_accuracy.append(validation_accuracy)
        history.train_seconds.append(trained - started)
        history.validation_seconds.append(time.perf_counter() - trained)
        yield history
