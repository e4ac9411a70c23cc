"""The lecture's CNN: a training step of both backends in turn, and an epoch against the lecture's script; on a GPU, the
time to 99 % test accuracy."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import cnn_ext
from benchmarks.harness import FOREIGN_SHARE, BenchmarkError, Call, Comparison, ForeignLoad, lower_quartile
from benchmarks.options import LAYOUTS, Bench, tf32, with_winograd
from cnn_ext.mnist.data import Dataset, load_mnist
from cnn_ext.mnist.model import lecture_cnn
from cnn_ext.mnist.run import new_model
from cnn_ext.mnist.train import History, Recipe, evaluate, train

BATCH_SIZE = 64
WANTED_ACCURACY = 0.99  # of the test images
STEP_EFFORT_FACTOR = 10  # a step is the figure that matters most: it gets as much time as this many rows

# How far the loss of the first step may differ: float32 rounding through 3136 terms of a layer, four layers.
LOSS_TOLERANCE = 4 * 3136 * 2.0**-24


def run(bench: Bench) -> list[dict]:
    bench.progress("mnist: one training step")
    rows = step_rows(bench)
    directory = find_data(bench.data_dir)
    if directory is None:
        bench.progress("mnist: no MNIST found (--data-dir, $CNN_EXT_DATA), whole trainings are left out")
        return rows
    return rows + (epoch_rows(directory, bench) if bench.device == "cpu" else accuracy_rows(directory, bench))


def step_rows(bench: Bench) -> list[dict]:
    """A whole step: forward, loss, backward, fused Adam."""
    torch.manual_seed(1)
    original = lecture_cnn("torch").to(bench.device)
    images = torch.rand(BATCH_SIZE, 1, 28, 28).to(bench.device)
    labels = torch.randint(10, (BATCH_SIZE,)).to(bench.device)
    with tf32(False):
        _check_loss(original, images, labels)

    def step_of(model: nn.Module, layout: str) -> Call:
        memory_format = LAYOUTS[layout]
        laid_out = images.contiguous(memory_format=memory_format)  # one channel: the same memory and strides
        if bench.device == "cuda":  # as cnn-ext train has them there, so that the first layer's output follows
            laid_out = torch.empty_like(images, memory_format=memory_format).copy_(images)
        return _step(model.to(memory_format=memory_format), laid_out, labels)

    contenders = {f"torch {layout}": step_of(copy.deepcopy(original), layout) for layout in LAYOUTS}
    contenders["cnn_ext nchw"] = step_of(cnn_ext.convert(copy.deepcopy(original)), "nchw")
    contenders["cnn_ext fused nchw"] = step_of(cnn_ext.convert(copy.deepcopy(original), fuse=True), "nchw")
    if bench.device == "cpu":
        contenders["cnn_ext fused winograd nchw"] = with_winograd(contenders["cnn_ext fused nchw"])
    else:
        contenders["cnn_ext channels_last"] = step_of(cnn_ext.convert(copy.deepcopy(original)), "channels_last")
    times = bench.compare(contenders, STEP_EFFORT_FACTOR)
    return [_step_row(name, times) for name in contenders]


def _step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Call:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=True, capturable=images.is_cuda)
    model.train()

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _check_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    losses = []
    for candidate in (model, *(cnn_ext.convert(copy.deepcopy(model), fuse=fuse) for fuse in (False, True))):
        with torch.no_grad():
            losses.append(F.cross_entropy(candidate.eval()(images), labels).item())
    for loss in losses[1:]:
        if abs(losses[0] - loss) > LOSS_TOLERANCE:
            raise BenchmarkError(f"mnist: the first loss is {loss}, torch has {losses[0]}")


def _step_row(name: str, times: Comparison) -> dict:
    """On a GPU the time is the captured step's, and beside it stands that of a step launched kernel by kernel."""
    own = times.lower_quartile(name)
    launched = {"launched_ms": 1e3 * lower_quartile(times.flushed[name])} if times.flushed else {}
    return {
        "name": "training step",
        "backend": name,
        "batch_size": BATCH_SIZE,
        "ms": 1e3 * own,
        "time_vs_torch": own / times.lower_quartile("torch nchw"),
        "peak_gflops": times.peak(),
        **launched,
        **times.quality(),
    }


def accuracy_rows(directory: Path, bench: Bench) -> list[dict]:
    """What ``cnn-ext train`` takes, by the lecture's recipe, until the test images say that it is good enough: training
    alone, with the first steps and the capture, without the evaluation after each epoch."""
    rows = []
    dataset = load_mnist(directory).to(torch.device(bench.device))
    for backend in ("torch", "cnn_ext"):
        bench.progress(f"mnist: {backend} until {WANTED_ACCURACY:.0%} test accuracy")
        history, accuracy = _train_until_accurate(backend, dataset)
        if accuracy < WANTED_ACCURACY:
            bench.failures.append(f"mnist: {backend} had a test accuracy of {accuracy:.4f} after its last epoch")
            continue
        milliseconds, epochs = 1e3 * sum(history.train_seconds), len(history.train_seconds)
        rows.append(
            {
                "name": f"training to {WANTED_ACCURACY:.0%} test accuracy",
                "backend": f"{backend} layers, {epochs} epochs",
                "batch_size": Recipe.batch_size,
                "ms": milliseconds,
                "time_vs_torch": milliseconds / (rows[0]["ms"] if rows else milliseconds),
                "test_accuracy": accuracy,
                "epoch_ms": [1e3 * seconds for seconds in history.train_seconds],
                "images_per_s": len(dataset.train) / min(history.train_seconds),
            }
        )
    return rows


def _train_until_accurate(backend: str, dataset: Dataset) -> tuple[History, float]:
    """The history, and the accuracy on the test images after its last epoch."""
    recipe = Recipe()
    model = new_model(backend, recipe.seed, dataset.train.labels.device, fused=backend == "cnn_ext")
    for history in train(model, dataset, recipe, lambda epoch, tally: None):  # noqa: B007 - what the loop left counts
        accuracy = evaluate(model, dataset.test)[1]
        if accuracy >= WANTED_ACCURACY:
            break
    return history, accuracy


def find_data(data_dir: str | None) -> Path | None:
    """The folder that holds MNIST/raw: --data-dir, else $CNN_EXT_DATA, else ./data or ../shared/data."""
    named = data_dir or os.environ.get("CNN_EXT_DATA")
    for place in [named] if named else ["data", "../shared/data"]:
        if (Path(place) / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
            return Path(place).resolve()
    return None


def epoch_rows(directory: Path, bench: Bench) -> list[dict]:
    """Training and validation of one epoch, each in a process of its own, one after the other."""
    common = ["--data-dir", str(directory), "--device", bench.device]
    commands = {
        "the lecture's script": ["-m", "benchmarks.lecture_script", *common],
        "cnn-ext train": ["-m", "cnn_ext", "train", "--epochs", "1", "--dataset", "mnist", *common],
        "cnn-ext train --winograd": [
            "-m",
            "cnn_ext",
            "train",
            "--winograd",
            "--epochs",
            "1",
            "--dataset",
            "mnist",
            *common,
        ],
    }
    rows = []
    for name, command in commands.items():
        bench.progress(f"mnist: one epoch of {name}")
        load = ForeignLoad()
        seconds = epoch_seconds(command)
        quiet = load.share() <= FOREIGN_SHARE
        rows.append({"name": "epoch", "backend": name, "batch_size": BATCH_SIZE, "ms": 1e3 * seconds})
        rows[-1]["time_vs_torch"] = rows[-1]["ms"] / rows[0]["ms"]
        rows[-1] |= {"rounds_accepted": int(quiet), "rounds_rejected": int(not quiet)}
    return rows


def epoch_seconds(command: list[str]) -> float:
    """What the first epoch took, by the history.json that the command leaves in --out."""
    with tempfile.TemporaryDirectory() as out:
        arguments = [sys.executable, *command, "--out", out]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BenchmarkError(f"mnist: {' '.join(command[:3])} ended with status {done.returncode}: {last_line}")
        history = json.loads((Path(out) / "history.json").read_text())
    return history["train_seconds"][0] + history["validation_seconds"][0]
