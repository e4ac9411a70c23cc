"""Model and training: shapes, seeds, the order of the images, and the layers of this package beside torch's."""

import functools
import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cnn_ext
from cnn_ext.mnist import data, machine, progress, run, steps
from cnn_ext.mnist.data import Dataset, Images
from cnn_ext.mnist.model import BACKENDS, lecture_cnn
from cnn_ext.mnist.tally import Tally
from cnn_ext.mnist.train import Recipe, evaluate, train

MNIST = Path(__file__).parent.parent.parent / "shared" / "data"
CPU = torch.device("cpu")


def ignore(epoch, tally):
    pass


def part(dataset: Dataset, count: int) -> Dataset:
    """The first images of a data set."""
    few = (dataset.train[:count], dataset.validation[: count // 2], dataset.test[: count // 2])
    return Dataset(dataset.name, dataset.source, *few)


def losses(
    backend: str, dataset: Dataset, recipe: Recipe, fused: bool = False, *, compiled: bool = False
) -> list[float]:
    """The mean loss of the epoch so far, after every batch."""
    means = []
    model = run.new_model(backend, recipe.seed, dataset.train.labels.device, fused)
    for _ in train(model, dataset, recipe, lambda epoch, tally: means.append(tally.means()[0]), compiled=compiled):
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
    notes = {row.name: row.note for row in cnn_ext.conversion_report(fused)}
    assert notes["conv1"] == "fused with relu1, pool1" and notes["conv2"] == "fused with relu2, pool2"
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


def test_a_compiled_model_learns_the_same(monkeypatch):
    """aot_eager runs the traced operators, in the same order as eager mode."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    dataset, recipe = part(data.load_digits(), 96), Recipe(epochs=2, batch_size=64)
    eager, compiled = (losses("cnn_ext", dataset, recipe, compiled=compiled) for compiled in (False, True))
    assert compiled == pytest.approx(eager, rel=torch.finfo(torch.float32).eps * 3136)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_steps_learn_the_same(backend, fused, monkeypatch):
    """As launched ones, but for the kernels that libraries choose: two batches of 64 and one of 32 in an epoch."""
    if fused and backend == "torch":
        pytest.skip("torch has no fused layers")
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    dataset, recipe = part(data.load_digits(), 160).to(torch.device("cuda")), Recipe(epochs=6, batch_size=64)
    captured = losses(backend, dataset, recipe, fused)
    monkeypatch.setattr("cnn_ext.mnist.train.CapturedStep", lambda step: step)
    launched = losses(backend, dataset, recipe, fused)
    assert len(captured) == len(launched) == 18
    tf32 = 2.0**-11 * 3136**0.5  # an operand's rounding, through the largest sum
    for step, (mine, theirs) in enumerate(zip(captured, launched, strict=True), 1):
        assert abs(mine - theirs) <= tf32 * step * launched[0]
    assert captured[-1] < captured[0]


@needs_gpu
def test_a_captured_step_neither_waits_nor_allocates():
    dataset = part(data.load_digits(), 64).to(torch.device("cuda"))
    model = run.new_model("cnn_ext", 1, torch.device("cuda"), fused=True).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=True)
    tally = Tally(torch.device("cuda"))
    step = steps.CapturedStep(steps.Step(model, optimizer, dataset.train, tally))
    batch = torch.arange(64, device="cuda")
    for _ in range(steps.WARM_UP + 1):
        step(batch)
    before = model.fc2.weight.detach().clone()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)
        assert torch.cuda.memory_allocated() == allocated
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(model.fc2.weight, before)
    assert tally.images == 64 * (steps.WARM_UP + 2)
    assert tally.means()[0] > 0


@needs_gpu
def test_dropout_differs_from_replay_to_replay():
    dataset = part(data.load_digits(), 64).to(torch.device("cuda"))
    model = run.new_model("cnn_ext", 1, torch.device("cuda")).train()
    tally = Tally(torch.device("cuda"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True, capturable=True)
    step = steps.CapturedStep(steps.Step(model, optimizer, dataset.train, tally))
    found = set()
    for _ in range(steps.WARM_UP + 4):
        tally.reset()
        step(torch.arange(64, device="cuda"))
        found.add(tally.means()[0])
    assert len(found) == steps.WARM_UP + 4


@needs_gpu
def test_a_gpu_gets_channels_last():
    dataset = part(data.load_digits(), 8).to(torch.device("cuda"))
    images, _ = dataset.train.batch(torch.arange(8, device="cuda"))
    assert images.stride() == (784, 1, 28, 1)
    model = run.new_model("cnn_ext", 1, torch.device("cuda"))
    assert model.conv1(images).is_contiguous(memory_format=torch.channels_last)


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
