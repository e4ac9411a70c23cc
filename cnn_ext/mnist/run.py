"""A training run from data to artefacts."""

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from cnn_ext.mnist import artefacts, checkpoint, machine, plots
from cnn_ext.mnist import model as model_module
from cnn_ext.mnist.data import Dataset, Images, as_input
from cnn_ext.mnist.progress import Progress
from cnn_ext.mnist.train import History, Recipe, evaluate, train


@torch.no_grad()
def probabilities(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Class-membership probabilities [N, 10] of uint8 images [N, 1, 28, 28]."""
    model.eval()
    return torch.softmax(model(as_input(images)), dim=1)


def new_model(backend: str, seed: int, device: torch.device, fused: bool = False) -> nn.Sequential:
    """The lecture's CNN with the weights of ``seed``: drawn on the CPU, the same for every backend and device.

    On a GPU they are channels_last, as its images are.
    """
    torch.manual_seed(seed)
    model = model_module.lecture_cnn(backend, fused).to(device)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


@dataclasses.dataclass
class Run:
    """One training run: what it is made of and where its artefacts go."""

    dataset: Dataset
    recipe: Recipe
    backend: str
    fused: bool
    device: torch.device
    out: Path
    command: str  # this and the arguments are recorded in history.json
    arguments: dict
    compiled: bool = False
    saved: int = 0  # the last epoch whose artefacts are in place

    def execute(self, echo: Callable[[str], None]) -> None:
        """Trains, prints the lecture's lines, and leaves the artefacts after every epoch."""
        dataset = self.dataset.to(self.device)
        model = new_model(self.backend, self.recipe.seed, self.device, self.fused)
        progress = Progress(self.recipe, len(dataset.train))
        try:
            for history in train(model, dataset, self.recipe, progress.on_batch, compiled=self.compiled):
                progress.close()
                self._save(model, dataset.test, history)
                echo(
                    f"Epoch {len(history.train_loss)} accuracy: {history.train_accuracy[-1]:.4f} "
                    f"val_accuracy: {history.validation_accuracy[-1]:.4f}"
                )
        finally:
            progress.close()
        loss, accuracy = evaluate(model, dataset.test)
        artefacts.write(self.out, {"history.json": self._history(history, test_loss=loss, test_accuracy=accuracy)})
        if self.device.type == "cuda":
            seconds = sum(history.train_seconds)
            rate = len(dataset.train) * len(history.train_seconds) / seconds
            echo(f"Training took {seconds:.2f} s: {rate:,.0f} images/s")
        echo(f"Test accuracy: {accuracy:.4f}")

    def _save(self, model: nn.Module, test: Images, history: History) -> None:
        epoch = len(history.train_loss)
        shown = test[: plots.SHOWN]
        title = f"{self.dataset.name}: {model_module.NAME}, layers of {self.backend}, seed {self.recipe.seed}"
        contents = {
            "history.json": self._history(history),
            "curves.png": plots.curves(history, title),
            "predictions.png": plots.predictions(
                shown, probabilities(model, shown.images), f"{title}: test digits after epoch {epoch}"
            ),
            checkpoint.FILE_NAME: checkpoint.to_bytes(model, self.dataset.name, epoch),
        }
        artefacts.write(self.out, contents)
        self.saved = epoch

    def _history(self, history: History, test_loss: float | None = None, test_accuracy: float | None = None) -> bytes:
        record = {
            "model": model_module.NAME,
            "backend": self.backend,
            "fused": self.fused,
            "dataset": self.dataset.name,
            "images": {part: len(getattr(self.dataset, part)) for part in ("train", "validation", "test")},
            "device": str(self.device),
            "device_name": machine.device_name(self.device),
            "threads": torch.get_num_threads(),
            "command": self.command,
            "arguments": self.arguments,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": machine.versions(),
            **dataclasses.asdict(history),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
        }
        return (json.dumps(record, indent=2) + "\n").encode()
