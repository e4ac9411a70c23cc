"""The convolution layers: torch's, except for who computes."""

import torch

from cnn_ext import functional
from cnn_ext._arguments import CONV_WORDS, is_per_side

_EXTENDED_WORDS = tuple(word for word in CONV_WORDS if word not in ("valid", "same"))


class _Conv:
    """What the layers over one axis and two share; stands before torch's class among their bases."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
    ):
        extended = _is_extended(padding, stride)
        if extended and padding_mode != "zeros":
            raise ValueError(f"padding={padding!r} needs padding_mode='zeros', but got padding_mode={padding_mode!r}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if extended else padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if extended:
            self.padding = padding

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._compute(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv1d(_Conv, torch.nn.Conv1d):
    """:class:`torch.nn.Conv1d` computed by this package: same constructor, initialisation, ``repr`` and ``state_dict``.

    ``padding`` takes every form of :func:`cnn_ext.functional.conv1d` too; forms that torch does not know need
    ``padding_mode='zeros'``.
    """

    def _compute(self, *arguments):
        return functional.conv1d(*arguments)


class Conv2d(_Conv, torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` computed by this package: same constructor, initialisation, ``repr`` and ``state_dict``.

    ``padding`` takes every form of :func:`cnn_ext.functional.conv2d` too; forms that torch does not know need
    ``padding_mode='zeros'``.
    """

    def _compute(self, *arguments):
        return functional.conv2d(*arguments)


class LazyConv1d(torch.nn.LazyConv1d, Conv1d):
    """:class:`torch.nn.LazyConv1d` that becomes this package's :class:`Conv1d` at its first input."""

    cls_to_become = Conv1d


class LazyConv2d(torch.nn.LazyConv2d, Conv2d):
    """:class:`torch.nn.LazyConv2d` that becomes this package's :class:`Conv2d` at its first input."""

    cls_to_become = Conv2d


def _is_extended(padding, stride) -> bool:
    """Whether torch's constructor would refuse or misread this padding."""
    if isinstance(padding, str):
        return padding in _EXTENDED_WORDS or (padding == "same" and stride not in (1, (1,), (1, 1), [1], [1, 1]))
    return is_per_side(padding)
