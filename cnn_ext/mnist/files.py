"""The four files of MNIST: their names, sums and places on disk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from cnn_ext.mnist import idx
from cnn_ext.mnist.errors import InputError


@dataclass(frozen=True)
class MnistFile:
    """One of the four files. ``md5`` is of the raw file, ``gz_md5`` of the compressed file that the mirrors serve."""

    name: str
    axes: int
    md5: str
    gz_md5: str

    def read(self, path: Path) -> torch.Tensor:
        """The tensor in ``path``, raw or .gz: its form checked first, which tells more, then every byte by its sum."""
        content = idx.read_bytes(path)
        tensor = idx.parse(content, path, self.axes)
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != self.md5:
            raise InputError(f"{path}: corrupted: the MD5 sum of its content is {found}, not {self.md5}")
        return tensor


FILES = {
    "train_images": MnistFile(
        "train-images-idx3-ubyte", 3, "6bbc9ace898e44ae57da46a324031adb", "f68b3c2dcbeaaa9fbdd348bbdeb94873"
    ),
    "train_labels": MnistFile(
        "train-labels-idx1-ubyte", 1, "a25bea736e30d166cdddb491f175f624", "d53e105ee54ea40749a09fcbcd1e9432"
    ),
    "test_images": MnistFile(
        "t10k-images-idx3-ubyte", 3, "2646ac647ad5339dbf082846283269ea", "9fb629c4189551a2d022fa330f9573f3"
    ),
    "test_labels": MnistFile(
        "t10k-labels-idx1-ubyte", 1, "27ae3e4e09519cfbb04c329615203637", "ec29112dd5afa0611ce80d1b7f02629c"
    ),
}


def find(root: Path) -> dict[str, Path] | None:
    """The four files under ``root``, flat or in MNIST/raw, each raw or .gz; None unless one folder has them all."""
    for folder in (root, root / "MNIST" / "raw", root / "raw"):
        paths = {key: _first_existing(folder / file.name, folder / f"{file.name}.gz") for key, file in FILES.items()}
        if all(paths.values()):
            return paths
    return None


def _first_existing(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)
