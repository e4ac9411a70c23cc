"""The pooling layers: torch's, except for who computes. ``padding`` takes every form of the functions."""

import torch

from cnn_ext import functional
from cnn_ext._arguments import is_per_side
from cnn_ext.nn.scripting import Unscriptable


class MaxPool1d(Unscriptable, torch.nn.MaxPool1d):
    """:class:`torch.nn.MaxPool1d` computed by this package."""

    def forward(self, input):
        return functional.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class AvgPool1d(Unscriptable, torch.nn.AvgPool1d):
    """:class:`torch.nn.AvgPool1d` computed by this package."""

    def __init__(self, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True):
        extended = isinstance(padding, str) or is_per_side(padding)
        super().__init__(kernel_size, stride, 0 if extended else padding, ceil_mode, count_include_pad)
        if extended:
            self.padding = padding

    def forward(self, input):
        return functional.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class MaxPool2d(Unscriptable, torch.nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` computed by this package."""

    def forward(self, input):
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class AvgPool2d(Unscriptable, torch.nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` computed by this package."""

    def forward(self, input):
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(Unscriptable, torch.nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` computed by this package."""

    def forward(self, input):
        return functional.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(Unscriptable, torch.nn.AdaptiveMaxPool2d):
    """:class:`torch.nn.AdaptiveMaxPool2d` computed by this package."""

    def forward(self, input):
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class MaxUnpool2d(Unscriptable, torch.nn.MaxUnpool2d):
    """:class:`torch.nn.MaxUnpool2d` computed by this package."""

    def forward(self, input, indices, output_size=None):
        return functional.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)
