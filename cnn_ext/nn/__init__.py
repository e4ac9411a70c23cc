"""Drop-in layers and the conversion of models."""

from cnn_ext.nn.conv import Conv2d
from cnn_ext.nn.convert import conversion_report, convert, revert
from cnn_ext.nn.fused import ConvReLUPool2d
from cnn_ext.nn.pooling import AvgPool2d, MaxPool2d

__all__ = ["AvgPool2d", "Conv2d", "ConvReLUPool2d", "MaxPool2d", "conversion_report", "convert", "revert"]
