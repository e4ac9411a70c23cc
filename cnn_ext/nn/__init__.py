"""Drop-in layers and the conversion of models."""

from cnn_ext.nn.conv import Conv1d, Conv2d, LazyConv1d, LazyConv2d
from cnn_ext.nn.convert import conversion_report, convert, revert
from cnn_ext.nn.fused import ConvReLUPool2d
from cnn_ext.nn.pooling import AvgPool1d, AvgPool2d, MaxPool1d, MaxPool2d

__all__ = [
    "AvgPool1d",
    "AvgPool2d",
    "Conv1d",
    "Conv2d",
    "ConvReLUPool2d",
    "LazyConv1d",
    "LazyConv2d",
    "MaxPool1d",
    "MaxPool2d",
    "conversion_report",
    "convert",
    "revert",
]
