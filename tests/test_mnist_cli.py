"""The command line end to end on the digits: what a run leaves behind, what reads it, and what bad input gets."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from PIL import Image

from cnn_ext import policy
from cnn_ext.mnist import artefacts, cli, data, images, model, plots
from cnn_ext.mnist.errors import InputError

ARTEFACTS = ["checkpoint", "curves.png", "history.json", "predictions.png"]
FAST = ["--backend", "torch", "--threads", "1"]  # what is tested here does not depend on the layers
HISTORIES = ["train_loss", "validation_loss", "train_accuracy", "validation_accuracy"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of one epoch on the digits."""
    out = tmp_path_factory.mktemp("trained")
    assert cli.main(["train", "--dataset", "digits", "--epochs", "1", "--out", str(out), *FAST]) == 0
    return out


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, output and errors of a command."""
    status = cli.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def refused(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("cnn-ext: ") and err.count("\n") == 1
    return err


def test_training_leaves_all_artefacts(trained):
    assert sorted(os.listdir(trained)) == ARTEFACTS
    for name in ("curves.png", "predictions.png"):
        with Image.open(trained / name) as picture:
            picture.load()
            assert picture.width >= 1000
    history = json.loads((trained / "history.json").read_text())
    assert all(len(history[name]) == 1 for name in [*HISTORIES, "train_seconds", "validation_seconds"])
    assert history["dataset"] == "digits" and history["model"] == "lecture-cnn" and history["backend"] == "torch"
    assert history["fused"] is False  # torch has no such layers
    assert history["images"] == {"train": 1297, "validation": 140, "test": 360}
    assert history["arguments"]["batch_size"] == 64 and history["arguments"]["seed"] == 1
    assert history["versions"]["torch"] == torch.__version__
    assert 0.5 < history["test_accuracy"] <= 1


def test_lines_of_a_run(tmp_path, capsys):
    status, out, err = run(
        capsys, "train", "--dataset", "digits", "--epochs", 2, "--batch-size", 432, "--out", tmp_path, *FAST
    )
    assert status == 0
    history = json.loads((tmp_path / "history.json").read_text())
    epochs = zip(history["train_accuracy"], history["validation_accuracy"], strict=True)
    lines = [f"Epoch {n} accuracy: {a:.4f} val_accuracy: {b:.4f}" for n, (a, b) in enumerate(epochs, 1)]
    assert out.splitlines() == [*lines, f"Test accuracy: {history['test_accuracy']:.4f}"]
    for epoch, line in enumerate(err.splitlines(), 1):
        assert line.startswith(f"Epoch {epoch}/2  1297/1297 images  loss ") and line.endswith(" left")
        assert " accuracy " in line and " images/s " in line


def test_evaluate_reads_the_checkpoint(trained, capsys):
    status, out, _ = run(capsys, "evaluate", "--checkpoint", trained / "checkpoint", *FAST)
    history = json.loads((trained / "history.json").read_text())
    assert status == 0
    assert out.splitlines()[0] == "Test images: 360 of digits"
    assert out.splitlines()[-1] == f"Test accuracy: {history['test_accuracy']:.4f}"


@pytest.mark.parametrize(("switches", "fused"), [((), True), (("--no-fused",), False)])
def test_a_fused_models_checkpoint_serves_every_backend(switches, fused, tmp_path, capsys):
    few = ("--dataset", "digits", "--epochs", 1, "--batch-size", 432, "--threads", 1)
    assert run(capsys, "train", *few, *switches, "--out", tmp_path)[0] == 0
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["fused"] is fused
    for backend in model.BACKENDS:
        status, out, _ = run(capsys, "evaluate", "--checkpoint", tmp_path / "checkpoint", "--backend", backend)
        assert status == 0
        # A rounding may turn the answer for an image whose two best classes are equally likely: one, to be generous.
        assert abs(float(out.split()[-1]) - history["test_accuracy"]) < 1.5 / 360


def test_torch_has_no_fused_layers(tmp_path, capsys):
    assert "--fused" in refused(capsys, "train", "--dataset", "digits", "--fused", "--out", tmp_path, *FAST)


def test_winograd_is_allowed_for_one_training(tmp_path, capsys):
    few = ("--dataset", "digits", "--epochs", 1, "--batch-size", 432, "--threads", 1, "--out", tmp_path)
    losses = {}
    for switch in ("--fused", "--winograd"):
        assert run(capsys, "train", *few, switch)[0] == 0
        losses[switch] = json.loads((tmp_path / "history.json").read_text())["train_loss"]
    assert losses["--fused"] != losses["--winograd"]
    assert not policy.allowed.winograd
    assert "--winograd" in refused(capsys, "train", "--dataset", "digits", "--winograd", *FAST)


def test_the_model_may_be_compiled(tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    few = ("--dataset", "digits", "--epochs", 1, "--batch-size", 432, "--out", tmp_path, *FAST)
    assert run(capsys, "train", *few, "--compile")[0] == 0
    assert len(compiled) == 1
    assert json.loads((tmp_path / "history.json").read_text())["arguments"]["compiled"] is True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("switches", [(), ("--compile",)])
def test_training_on_a_gpu(switches, tmp_path, capsys):
    arguments = ("--dataset", "digits", "--epochs", 5, "--device", "cuda", "--out", tmp_path)
    status, out, _ = run(capsys, "train", *arguments, *switches)
    assert status == 0
    assert out.splitlines()[-2].startswith("Training took ") and out.splitlines()[-2].endswith(" images/s")
    assert sorted(os.listdir(tmp_path)) == ARTEFACTS
    for device in ("cpu", "cuda"):
        status, out, _ = run(capsys, "evaluate", "--checkpoint", tmp_path / "checkpoint", "--device", device)
        assert status == 0 and float(out.split()[-1]) > 0.8


def test_predict_reads_any_image(trained, tmp_path, capsys):
    digit = data.load_digits().train.images[0, 0].numpy()
    Image.fromarray(digit).save(tmp_path / "digit.png")
    Image.fromarray(255 - digit).convert("RGB").resize((280, 280)).save(tmp_path / "ink-on-paper.bmp")
    paths = [tmp_path / "digit.png", tmp_path / "ink-on-paper.bmp"]
    status, out, _ = run(capsys, "predict", *paths, "--checkpoint", trained / "checkpoint", *FAST)
    assert status == 0
    classes = []
    for path, line in zip(paths, out.splitlines(), strict=True):
        answer, *probabilities = line.removeprefix(f"{path}: ").replace(": ", ":").split()
        values = [float(text.partition(":")[2]) for text in probabilities]
        assert len(values) == 10 and abs(sum(values) - 1) < 10 * 0.5e-4
        assert int(answer) == max(range(10), key=values.__getitem__)
        classes.append(answer)
    assert classes[0] == classes[1]


def test_images_become_white_on_black(tmp_path):
    digit = data.load_digits().train.images[0]
    Image.fromarray(digit[0].numpy()).save(tmp_path / "same.png")
    assert torch.equal(images.read(tmp_path / "same.png"), digit)
    Image.fromarray(255 - digit[0].numpy()).save(tmp_path / "inverted.png")
    assert torch.equal(images.read(tmp_path / "inverted.png"), digit)
    transparent = numpy.zeros((40, 20, 4), dtype=numpy.uint8)
    transparent[10:30, 8:12, 3] = 255  # an opaque black stroke
    Image.fromarray(transparent).save(tmp_path / "stroke.png")
    stroke = images.read(tmp_path / "stroke.png")[0]
    assert stroke.shape == (28, 28)
    assert stroke[14, 14] > 200 and stroke[0].max() == 0 and stroke[:, 0].max() == 0


def test_wide_pixels_become_bytes(tmp_path):
    pixels = numpy.zeros((28, 28), dtype=numpy.uint16)
    pixels[5:20, 14] = 40_000
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert images.read(tmp_path / "wide.png").max() == 255


def checkpoint_of(path: Path, tensors: dict, **metadata: str) -> Path:
    path.write_bytes(safetensors.torch.save(tensors, metadata or None))
    return path


def test_wrong_checkpoints_are_refused(trained, tmp_path, capsys):
    weights = model.lecture_cnn("torch").state_dict()
    ours = {"model": "lecture-cnn", "dataset": "digits"}
    cases = {
        checkpoint_of(tmp_path / "unnamed", weights): "another model",
        checkpoint_of(tmp_path / "other", weights, model="resnet", dataset="digits"): "another model",
        checkpoint_of(tmp_path / "no-data", weights, model="lecture-cnn"): "what it was trained on",
        checkpoint_of(tmp_path / "missing", {"fc2.bias": weights["fc2.bias"]}, **ours): "another model",
        checkpoint_of(tmp_path / "more", weights | {"fc3.bias": torch.ones(1)}, **ours): "another model: fc3.bias",
        checkpoint_of(tmp_path / "shape", weights | {"fc2.bias": torch.ones(9)}, **ours): "another model: fc2.bias",
        checkpoint_of(
            tmp_path / "dtype", weights | {"fc2.bias": torch.ones(10).double()}, **ours
        ): "another model: fc2",
    }
    half = tmp_path / "half"
    half.write_bytes((trained / "checkpoint").read_bytes()[:5000])
    cases |= {half: "not a checkpoint", tmp_path / "nowhere": "no such checkpoint", tmp_path: "no such checkpoint"}
    for path, complaint in cases.items():
        line = refused(capsys, "evaluate", "--checkpoint", path, *FAST)
        assert str(path) in line and complaint in line


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice",)


def test_checkpoint_is_never_unpickled(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pickled").write_bytes(pickle.dumps(Malice()))
    torch.save({"weights": Malice()}, "zipped")
    for name in ("pickled", "zipped"):
        assert "not a checkpoint" in refused(capsys, "predict", name, "--checkpoint", name, *FAST)
    assert not Path("malice").exists()


def test_wrong_images_are_refused(trained, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    for name, complaint in (("text.png", "cannot be read as an image"), ("missing.png", "no such image file")):
        line = refused(capsys, "predict", tmp_path / name, "--checkpoint", trained / "checkpoint", *FAST)
        assert str(tmp_path / name) in line and complaint in line


def test_unwritable_out_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    line = refused(capsys, "train", "--dataset", "digits", "--out", tmp_path / "file", *FAST)
    assert f"{tmp_path / 'file'}: cannot be written to" in line
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu_is_refused(tmp_path, capsys):
    line = refused(capsys, "train", "--dataset", "digits", "--device", "cuda", "--out", tmp_path)
    assert "--device cuda" in line and "no CUDA GPU" in line


def test_damaged_mnist_is_refused_and_nothing_overwritten(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CNN_EXT_DATA", raising=False)
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    for name in names:
        (tmp_path / name).write_bytes(b"\x00\x00\x08\x03")
    before = {name: (trained / name).read_bytes() for name in ARTEFACTS}
    line = refused(capsys, "train", "--data-dir", tmp_path, "--out", trained, *FAST)
    assert str(tmp_path / "train-images-idx3-ubyte") in line and "truncated" in line
    assert {name: (trained / name).read_bytes() for name in ARTEFACTS} == before
    assert sorted(os.listdir(trained)) == ARTEFACTS


def test_unknown_option_and_value_are_refused(capsys):
    for arguments in (["train", "--epochs", "0"], ["train", "--lr", "-1"], ["train", "--speed", "9"], ["dance"]):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert f"'{arguments[1] if len(arguments) > 1 else arguments[0]}'" in err or "--speed" in err


def test_missing_extra_is_named(capsys, monkeypatch):
    def run_without(name):
        def run(arguments):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(cli, "_run", run)

    run_without("safetensors.torch")
    assert "safetensors.torch is not installed: pip install 'cnn_ext[mnist]'" in refused(capsys, "info")
    run_without("torch")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


def test_bench_outside_of_a_clone(tmp_path, capsys, monkeypatch):
    from cnn_ext.mnist import commands

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "site-packages" / "cnn_ext" / "mnist" / "commands.py"))
    assert "no benchmarks folder" in refused(capsys, "bench", "conv2d")


def test_bench_passes_arguments_and_status_on(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # or another one in sys.path goes first
    (tmp_path / "benchmarks" / "__main__.py").write_text("import sys; sys.exit(len(sys.argv))")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "mnist", "--device", "cpu"]) == 4


def test_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    artefacts.write(tmp_path, {"one": b"old", "two": b"old"})
    (tmp_path / ".two.tmp").mkdir()  # so the second file cannot be written
    with pytest.raises((InputError, OSError)):
        artefacts.write(tmp_path, {"one": b"new", "two": b"new"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == b"old"


def test_interrupt_waits_until_all_files_are_in_place(tmp_path, monkeypatch):
    replace = os.replace

    def replace_interrupted(source, target):
        signal.raise_signal(signal.SIGINT)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_interrupted)
    with pytest.raises(KeyboardInterrupt):
        artefacts.write(tmp_path, {"one": b"new", "two": b"new"})
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_interrupt_keeps_the_last_complete_epoch(tmp_path):
    """As a user does it: SIGINT to the process, once the first epoch's line is out."""
    command = [
        sys.executable,
        "-m",
        "cnn_ext",
        "train",
        "--dataset",
        "digits",
        "--epochs",
        "500",
        "--out",
        str(tmp_path),
        *FAST,
    ]
    ignored = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits an ignored signal
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert process.stdout.readline().startswith("Epoch 1 accuracy: ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"cnn-ext: stopped by Ctrl-C; {tmp_path} holds epoch ")
    assert sorted(os.listdir(tmp_path)) == ARTEFACTS
    assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "checkpoint"), *FAST]) == 0


def test_wrong_predictions_show_the_true_class(monkeypatch):
    titles = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set_title", lambda axes, text, **style: titles.append((text, style["color"]))
    )
    shown = data.load_digits().test[: plots.SHOWN]
    certain = torch.eye(10)[shown.labels]
    certain[0] = torch.eye(10)[(shown.labels[0] + 1) % 10]
    plots.predictions(shown, certain, "title")
    right, wrong = int(shown.labels[0]), int(shown.labels[0] + 1) % 10
    assert titles[0] == (f"{wrong}  (100%), is {right}", plots.WRONG)
    assert titles[1] == (f"{int(shown.labels[1])}  (100%)", "black")
