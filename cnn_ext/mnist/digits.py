"""What stands in for MNIST offline: the 1,797 real handwritten digits of scikit-learn, scaled from 8x8 to 28x28 pixels.

The file is read without importing scikit-learn, which would bring a second OpenMP runtime into the process.
"""

import importlib.util
import io
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from cnn_ext.mnist import idx
from cnn_ext.mnist.errors import InputError

COUNT = 1797
BRIGHTEST = 16  # the file's pixels are 0 to 16


def path() -> Path:
    """Where scikit-learn keeps the file; nothing is imported."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise InputError("digits: scikit-learn carries them and is not installed: pip install 'cnn_ext[mnist]'")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 28, 28] as uint8 and labels [1797], in the file's order."""
    try:
        table = np.loadtxt(io.BytesIO(idx.read_bytes(path)), delimiter=",", dtype=np.float32)
    except ValueError as error:
        raise InputError(f"{path}: not the table of digits expected: {error}") from error
    if table.shape != (COUNT, 65):
        raise InputError(f"{path}: not the table of digits expected: {table.shape} numbers, not ({COUNT}, 65)")
    small = torch.from_numpy(table[:, :64]).reshape(COUNT, 1, 8, 8) / BRIGHTEST
    images = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    return (images * 255).round().to(torch.uint8), torch.from_numpy(table[:, 64]).long()
