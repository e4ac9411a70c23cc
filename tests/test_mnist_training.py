"""Model and training: shapes, seeds, the order of the images, and the layers of this package beside torch's."""

import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cnn_ext
from cnn_ext.mnist import data, machine, progress, run
from cnn_ext.mnist.data import Dataset, Images
from cnn_ext.mnist.model import BACKENDS, lecture_cnn
from cnn_ext.mnist.train import Recipe, Tally, evaluate, train

MNIST = Path(__file__).parent.parent.parent / "shared" / "data"
CPU = torch.device("cpu")


def ignore(epoch, tally):
    pass


def part(dataset: Dataset, count: int) -> Dataset:
    """The first images of a data set."""
    few = (dataset.train[:count], dataset.validation[: count // 2], dataset.test[: count // 2])
    return Dataset(dataset.name, dataset.source, *few)


def losses(backend: str, dataset: Dataset, recipe: Recipe, fused: bool = False) -> list[float]:
    """The mean loss of the epoch so far, after every batch."""
    means = []
    model = run.new_model(backend, recipe.seed, CPU, fused)
    for _ in train(model, dataset, recipe, lambda epoch, tally: means.append(tally.means()[0])):
        pass
    return means


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend):
    model = lecture_cnn(backend)
    x = torch.ones(4, 1, 28, 28)
    shapes = {}
    for name, layer in model.named_children():
        x = layer(x)
        shapes[name] = tuple(x.shape)
    assert shapes["pool1"] == (4, 32, 14, 14)
    assert shapes["pool2"] == (4, 64, 7, 7)
    assert shapes["flatten"] == (4, 3136)
    assert shapes["fc2"] == (4, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_274_634


def test_backends_use_their_own_layers_and_the_same_weights():
    ours, theirs = (run.new_model(backend, 7, CPU) for backend in BACKENDS)
    assert type(ours.conv1) is cnn_ext.Conv2d and type(ours.pool1) is cnn_ext.MaxPool2d
    assert type(theirs.conv1) is nn.Conv2d and type(theirs.pool1) is nn.MaxPool2d
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    other = run.new_model("torch", 8, CPU)
    assert not torch.equal(theirs.conv1.weight, other.conv1.weight)


def test_the_fused_model_has_the_same_weights_under_the_same_names():
    plain, fused = (run.new_model("cnn_ext", 7, CPU, fused) for fused in (False, True))
    assert isinstance(fused.conv1, cnn_ext.ConvReLUPool2d) and isinstance(fused.conv2, cnn_ext.ConvReLUPool2d)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fused.parameters(), strict=True))


def test_epoch_visits_every_image_once_in_an_order_of_its_own():
    labels = torch.arange(10)
    images = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    dataset = Dataset("ten", "memory", *(Images(images, labels) for _ in range(3)))
    orders = []

    class Recorder(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1))

    model = Recorder(784, 10)
    batch = Images.batch
    try:
        Images.batch = lambda self, indices: orders.extend(indices.tolist()) or batch(self, indices)
        for _ in train(model, dataset, Recipe(epochs=2, batch_size=4), ignore):
            pass
    finally:
        Images.batch = batch
    first, second = orders[:10], orders[20:30]  # validation goes in order between them
    assert sorted(first) == sorted(second) == orders[10:20] == list(range(10))
    assert first != second


def test_histories_are_means_over_all_images():
    dataset = part(data.load_digits(), 100)
    model = run.new_model("torch", 1, CPU)
    loss, accuracy = evaluate(model, dataset.train)
    model.eval()
    images, labels = dataset.train.batch(torch.arange(100))
    with torch.no_grad():
        logits = model(images)
    terms = 100
    wanted = F.cross_entropy(logits, labels).item()
    assert abs(loss - wanted) <= torch.finfo(torch.float32).eps * terms * wanted
    assert accuracy == (logits.argmax(dim=1) == labels).sum().item() / 100


def test_same_seed_gives_the_same_bits():
    torch.set_num_threads(1)
    dataset, recipe = part(data.load_digits(), 64), Recipe(epochs=1, batch_size=32, seed=3)
    for fused in (False, True):
        assert losses("cnn_ext", dataset, recipe, fused) == losses("cnn_ext", dataset, recipe, fused)
    assert losses("cnn_ext", dataset, recipe) != losses("cnn_ext", dataset, Recipe(epochs=1, batch_size=32, seed=4))


@pytest.mark.parametrize("fused", [False, True])
def test_loss_curve_follows_torch(fused):
    """Same weights, images and dropout: what differs is rounding.

    Adam divides a gradient by its own size, so a rounding (eps * the terms of the largest sum, fc1's) may become as
    much of a step. Allowed is that much of the first loss for every step so far.
    """
    torch.set_num_threads(1)
    dataset, recipe = part(data.load_digits(), 256), Recipe(epochs=2, batch_size=64)
    ours, theirs = losses("cnn_ext", dataset, recipe, fused), losses("torch", dataset, recipe)
    rounding = torch.finfo(torch.float32).eps * 3136
    for step, (mine, yours) in enumerate(zip(ours, theirs, strict=True), 1):
        assert abs(mine - yours) <= rounding * step * abs(theirs[0]), f"step {step}: {mine} and {yours}"
    assert ours[-1] < ours[0]


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not at ../shared/data")
def test_real_mnist_is_learned():
    torch.set_num_threads(1)
    dataset = part(data.load("mnist", MNIST, pytest.fail), 1280)
    model = run.new_model("cnn_ext", 1, CPU)
    (history,) = train(model, dataset, Recipe(epochs=1), ignore)
    assert history.validation_accuracy[0] > 0.6


def test_threads_are_clamped(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    assert machine.set_threads(64) == torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000", "cpu.max": "400000 100000"}, 3),
        ("0::/../elsewhere", {"cpu.max": "100000 100000"}, 1),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("2:memory:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {}, None),
    ],
)
def test_quota_of_the_cgroups(tmp_path, membership, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.quota(f"{membership}\n", tmp_path) == cores


def test_clock():
    assert [progress.clock(seconds) for seconds in (0, 59.6, 3599, 3600, 36_061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "10:01:01",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    bar = progress.Progress(Recipe(epochs=2, batch_size=2), images=4)
    for seen in (2, 4):
        tally = Tally(CPU)
        tally.add(torch.tensor(0.5), torch.eye(10)[:seen], torch.arange(seen))
        bar.on_batch(1, tally)
    bar.close()
    shown = terminal.getvalue()
    assert "Epoch 1/2  50%" in shown and "Epoch 1/2 100%" in shown
    assert "loss 0.5000  accuracy 1.0000" in shown and "images/s" in shown and " left" in shown
