"""Convolution and pooling for PyTorch, computed by this package's own kernels: drop-in layers with the same bits on
every run.
"""

try:
    import torch  # noqa: F401  (first: the compiled module shares the OpenMP runtime that torch brings)
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("cnn_ext needs PyTorch >= 2.6: pip install torch") from None

from cnn_ext import functional
from cnn_ext.allocator import tune_malloc
from cnn_ext.inspection import build_info, explain, force_kernel, kernels, version
from cnn_ext.nn import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    Conv1d,
    Conv2d,
    ConvReLUPool2d,
    ConvTranspose1d,
    ConvTranspose2d,
    LazyConv1d,
    LazyConv2d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    MaxPool1d,
    MaxPool2d,
    MaxUnpool2d,
    conversion_report,
    convert,
    pack,
    revert,
)
from cnn_ext.override import override
from cnn_ext.policy import flags
from cnn_ext.signal import convolve, correlate, output_size

__version__ = version()

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "Conv1d",
    "Conv2d",
    "ConvReLUPool2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxUnpool2d",
    "__version__",
    "build_info",
    "conversion_report",
    "convert",
    "convolve",
    "correlate",
    "explain",
    "flags",
    "force_kernel",
    "functional",
    "kernels",
    "output_size",
    "override",
    "pack",
    "revert",
    "tune_malloc",
]
