"""Convolution and pooling for PyTorch, computed by this package's own kernels: drop-in layers with the same bits on
every run.
"""

from importlib import metadata

try:
    import torch  # noqa: F401  (first: the compiled module shares the OpenMP runtime that torch brings)
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("cnn_ext needs PyTorch >= 2.6: pip install torch") from None

from cnn_ext import functional
from cnn_ext.nn import AvgPool2d, Conv2d, MaxPool2d, convert, revert

try:
    __version__ = metadata.version("cnn_ext")
except metadata.PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["AvgPool2d", "Conv2d", "MaxPool2d", "__version__", "convert", "functional", "revert"]
