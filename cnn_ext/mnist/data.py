"""The data sets: MNIST where it can be had, else the digits of scikit-learn, split as the lecture splits them.

MNIST is read by this package's own reader also where torchvision is installed: it is needed anyway where torchvision
does not import, reads the same files in the same layout, checks every byte and names the file that is wrong.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cnn_ext.mnist import digits, download, files
from cnn_ext.mnist.errors import InputError

VALIDATION_IMAGES = 10_000  # of MNIST's 60,000: the first ones, as in the lecture
DIGITS_SPLIT = (140, 1297, 360)  # validation, training, test, in the file's order


@dataclass(frozen=True)
class Images:
    """Images [N, 1, 28, 28] as uint8 and labels [N] as int64, each one tensor, so that a batch is one index_select."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images as floats in [0, 1], as torchvision's ToTensor makes them, and labels."""
        return as_input(self.images.index_select(0, indices)), self.labels.index_select(0, indices)

    def __getitem__(self, rows: slice) -> "Images":
        return Images(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


def as_input(images: torch.Tensor) -> torch.Tensor:
    """What the model takes: bytes become floats in [0, 1]; on a GPU channels_last, as its matrix units like it.

    Of images with one channel both layouts are the same memory, and only the strides say which it is.
    """
    pixels = images.float().div_(255)
    if not images.is_cuda:
        return pixels
    count, channels, height, width = pixels.shape
    return pixels.view(count, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Dataset:
    """``name`` is "mnist" or "digits" and labels every artefact; ``source`` is the folder or file it came from."""

    name: str
    source: str
    train: Images
    validation: Images
    test: Images

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(self.name, self.source, self.train.to(device), self.validation.to(device), self.test.to(device))


def load(kind: str, data_dir: Path | None, warn: Callable[[str], None]) -> Dataset:
    """The data set ``kind``; "auto" is MNIST or, with one loud line where that cannot be had, the digits."""
    if kind == "digits":
        return load_digits()
    try:
        return load_mnist(data_dir)
    except download.DownloadError as error:
        message = f"MNIST is not in {', '.join(map(str, _roots(data_dir)))} and cannot be downloaded ({error})"
        if kind == "mnist":
            raise InputError(message) from error
        warn(f"WARNING: {message}. Going on with the 1,797 digits of scikit-learn INSTEAD OF MNIST.")
        return load_digits()


def load_mnist(data_dir: Path | None) -> Dataset:
    """MNIST from the first place that has it, else downloaded into the first place (or DownloadError)."""
    roots = _roots(data_dir)
    found = next(filter(None, map(files.find, roots)), None)
    if found is None:
        download.fetch(roots[0])
        found = files.find(roots[0])
    train, test = (_read_pair(found, part) for part in ("train", "test"))
    return Dataset(
        name="mnist",
        source=str(found["train_images"].parent),
        train=train[VALIDATION_IMAGES:],
        validation=train[:VALIDATION_IMAGES],
        test=test,
    )


def load_digits() -> Dataset:
    path = digits.path()
    images, labels = digits.read(path)
    validation, train, test = (
        Images(*pair) for pair in zip(images.split(DIGITS_SPLIT), labels.split(DIGITS_SPLIT), strict=True)
    )
    return Dataset("digits", str(path), train, validation, test)


def _roots(data_dir: Path | None) -> list[Path]:
    """Where MNIST is looked for, in this order."""
    environment = os.environ.get("CNN_EXT_DATA")
    return [*([data_dir] if data_dir else []), *([Path(environment)] if environment else []), Path("data")]


def _read_pair(found: dict[str, Path], part: str) -> Images:
    images, labels = (files.FILES[f"{part}_{what}"].read(found[f"{part}_{what}"]) for what in ("images", "labels"))
    return Images(images.unsqueeze(1), labels.long())
