"""Drop-in layers and the conversion of models."""

from cnn_ext.nn.conv import (
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    LazyConv1d,
    LazyConv2d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
)
from cnn_ext.nn.convert import conversion_report, convert, revert
from cnn_ext.nn.fused import ConvReLUPool2d
from cnn_ext.nn.packing import pack
from cnn_ext.nn.pooling import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxUnpool2d,
)

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
    "conversion_report",
    "convert",
    "pack",
    "revert",
]
