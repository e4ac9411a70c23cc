"""The commands of ``cnn-ext``."""

import shlex
import subprocess
import sys
from pathlib import Path

import click

import cnn_ext
from cnn_ext.info import main as print_info
from cnn_ext.mnist import artefacts, checkpoint, data, images, machine, run
from cnn_ext.mnist import model as model_module
from cnn_ext.mnist.errors import InputError, StoppedError
from cnn_ext.mnist.train import Recipe, evaluate

DEFAULT_OUT = Path("runs/mnist")
A_PATH = click.Path(path_type=Path)


def _warn(message: str) -> None:
    click.secho(message, err=True, fg="red", bold=True)


def _options(*options):
    """Several decorators as one; the first named is the first in the help."""

    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


machine_options = _options(
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: a GPU if any."),
    click.option("--threads", type=click.IntRange(min=1), help="At most, and by default, the cores at hand."),
    click.option("--backend", type=click.Choice(model_module.BACKENDS), default="cnn_ext", help="Whose layers to use."),
)
data_options = _options(
    click.option("--data-dir", type=A_PATH, help="Where MNIST is; then $CNN_EXT_DATA and ./data are searched."),
    click.option(
        "--dataset", type=click.Choice(["auto", "mnist", "digits"]), default="auto", help="auto: MNIST, else digits."
    ),
)
checkpoint_option = click.option(
    "--checkpoint", "checkpoint_path", type=A_PATH, default=DEFAULT_OUT / checkpoint.FILE_NAME, help="What train left."
)


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
def cli() -> None:
    """The lecture's CNN on handwritten digits, with the layers of cnn_ext."""


@cli.command()
@click.option("--epochs", type=click.IntRange(min=1), default=Recipe.epochs)
@click.option("--batch-size", type=click.IntRange(min=1), default=Recipe.batch_size)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=Recipe.lr, help="Adam's learning rate.")
@click.option("--weight-decay", type=click.FloatRange(min=0), default=Recipe.weight_decay)
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=Recipe.seed)
@machine_options
@click.option(
    "--fused/--no-fused",
    default=None,
    show_default="fused, where the layers are cnn_ext's",
    help="Each convolution with its ReLU and pool in one, or layer by layer.",
)
@click.option("--winograd", is_flag=True, help="Let convolutions trade accuracy for speed (cnn_ext.flags).")
@click.option("--compile", "compiled", is_flag=True, help="Compile the model with torch.compile.")
@data_options
@click.option("--out", type=A_PATH, default=DEFAULT_OUT, help="Folder for history, pictures and checkpoint.")
def train(
    epochs, batch_size, lr, weight_decay, seed, device, threads, backend, fused, winograd, compiled, data_dir, dataset,
    out,
) -> None:  # fmt: skip
    """Train; after every epoch --out holds everything of that epoch."""
    arguments = {name: _plain(value) for name, value in click.get_current_context().params.items()}
    if fused and backend == "torch":
        raise InputError("--fused: torch has no fused layers; take --backend cnn_ext or --no-fused")
    if winograd and backend == "torch":
        raise InputError("--winograd: torch's layers have no such switch; take --backend cnn_ext")
    fused = backend == "cnn_ext" if fused is None else fused
    cnn_ext.tune_malloc()
    place = machine.device(device, backend)
    machine.set_threads(threads)
    machine.allow_tf32()
    artefacts.prepare(out)
    recipe = Recipe(epochs, batch_size, lr, weight_decay, seed)
    command = shlex.join(["cnn-ext", *sys.argv[1:]])
    loaded = data.load(dataset, data_dir, _warn)
    training = run.Run(loaded, recipe, backend, fused, place, out, command, arguments, compiled)
    try:
        with cnn_ext.flags(winograd=winograd):
            training.execute(click.echo)
    except KeyboardInterrupt:
        saved = f"{out} holds epoch {training.saved}" if training.saved else f"nothing was saved in {out}"
        raise StoppedError(f"stopped by Ctrl-C; {saved}") from None


def _plain(value):
    return str(value) if isinstance(value, Path) else value


@cli.command("evaluate")
@checkpoint_option
@machine_options
@data_options
def evaluate_command(checkpoint_path, device, threads, backend, data_dir, dataset) -> None:
    """Measure a checkpoint on the test images; with --dataset auto, on those of the data set that it was trained on."""
    model, place, trained_on = _load(checkpoint_path, device, threads, backend)
    loaded = data.load(trained_on if dataset == "auto" else dataset, data_dir, _warn)
    loss, accuracy = evaluate(model, loaded.test.to(place))
    click.echo(f"Test images: {len(loaded.test)} of {loaded.name}")
    click.echo(f"Test loss: {loss:.4f}")
    click.echo(f"Test accuracy: {accuracy:.4f}")


@cli.command()
@click.argument("image_paths", metavar="IMAGE...", nargs=-1, required=True, type=A_PATH)
@checkpoint_option
@machine_options
def predict(image_paths, checkpoint_path, device, threads, backend) -> None:
    """Print the class of each image and the probabilities of all ten.

    An image of any size and format becomes greyscale and 28x28; dark ink on bright paper is inverted, as MNIST is
    white on black.
    """
    model, place, _ = _load(checkpoint_path, device, threads, backend)
    batch = data.torch.stack([images.read(path) for path in image_paths]).to(place)
    for path, row in zip(image_paths, run.probabilities(model, batch).tolist(), strict=True):
        ranked = "  ".join(f"{digit}: {probability:.4f}" for digit, probability in enumerate(row))
        click.echo(f"{path}: {max(range(10), key=row.__getitem__)}    {ranked}")


def _load(path, device, threads, backend):
    place = machine.device(device, backend)
    machine.set_threads(threads)
    model = model_module.lecture_cnn(backend)
    trained_on = checkpoint.load(path, model)
    return model.to(place), place, trained_on


@cli.command()
def info() -> int:
    """What this installation is made of, with a self-test of a second: the same as python -m cnn_ext.info."""
    return print_info()


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments) -> int:
    """Run python -m benchmarks with the same ARGUMENTS, in a clone of the repository."""
    clones = (Path.cwd(), Path(__file__).resolve().parents[2])
    clone = next((root for root in clones if (root / "benchmarks" / "__main__.py").is_file()), None)
    if clone is None:
        raise InputError("bench: there is no benchmarks folder here; run it in a clone of the repository")
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments], cwd=clone)
