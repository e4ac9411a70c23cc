"""The convolution layers: torch's, except for who computes."""

import torch

from cnn_ext import functional
from cnn_ext._arguments import CONV_WORDS, is_per_side
from cnn_ext.nn.scripting import Unscriptable
from cnn_ext.ops.packing import Packing

_EXTENDED_WORDS = tuple(word for word in CONV_WORDS if word not in ("valid", "same"))


class _Conv(Unscriptable):
    """What the layers over one axis and two share; stands before torch's class among their bases."""

    packing = None  # or a Packing, of a layer that keeps its packed weight
    followers: tuple[type, ...] = ()  # the classes of the layers that a Sequential may compute with this one

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
        arguments = (input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        packing = self.packing_for(input)
        if packing is None:
            return self._compute(*arguments, padding_mode=self.padding_mode)
        return self._compute(*arguments, padding_mode=self.padding_mode, packing=packing)

    def packing_for(self, input) -> Packing | None:
        """Where this call may keep its packed weight, if it may; a call in training mode drops what is kept."""
        if self.packing is None or torch.compiler.is_compiling():
            return None
        if self.training:
            self.packing.clear()
        is_plain = type(input) is torch.Tensor and not torch._C._are_functorch_transforms_active()
        return self.packing if is_plain and not self.training and not torch.is_grad_enabled() else None


class Conv1d(_Conv, torch.nn.Conv1d):
    """:class:`torch.nn.Conv1d` computed by this package: same constructor, initialisation, ``repr`` and ``state_dict``.

    ``padding`` takes every form of :func:`cnn_ext.functional.conv1d` too; forms that torch does not know need
    ``padding_mode='zeros'``.
    """

    def _compute(self, *arguments, **keywords):
        return functional.conv1d(*arguments, **keywords)


class Conv2d(_Conv, torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` computed by this package: same constructor, initialisation, ``repr`` and ``state_dict``.

    ``padding`` takes every form of :func:`cnn_ext.functional.conv2d` too; forms that torch does not know need
    ``padding_mode='zeros'``.
    """

    def _compute(self, *arguments, **keywords):
        return functional.conv2d(*arguments, **keywords)


class _ConvTranspose(Unscriptable):
    """What the transposed layers over one axis and two share; stands before torch's class among their bases."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
        padding_mode="zeros",
        device=None,
        dtype=None,
    ):
        extended = isinstance(padding, str) or is_per_side(padding)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if extended else padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        if extended:
            self.padding = padding

    def forward(self, input, output_size=None):
        output_padding = self.output_padding
        if output_size is not None:
            if isinstance(self.padding, str) or is_per_side(self.padding):
                raise ValueError(f"output_size needs a padding of ints, but got padding={self.padding!r}")
            axes = len(self.kernel_size)
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, axes, self.dilation
            )
        return self._compute(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` computed by this package: same constructor, initialisation, ``repr`` and
    ``state_dict``. ``padding`` takes every form of :func:`cnn_ext.functional.conv_transpose1d`.
    """

    def _compute(self, *arguments):
        return functional.conv_transpose1d(*arguments)


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` computed by this package: same constructor, initialisation, ``repr`` and
    ``state_dict``. ``padding`` takes every form of :func:`cnn_ext.functional.conv_transpose2d`.
    """

    def _compute(self, *arguments):
        return functional.conv_transpose2d(*arguments)


class LazyConv1d(torch.nn.LazyConv1d, Conv1d):
    """:class:`torch.nn.LazyConv1d` that becomes this package's :class:`Conv1d` at its first input."""

    cls_to_become = Conv1d


class LazyConv2d(torch.nn.LazyConv2d, Conv2d):
    """:class:`torch.nn.LazyConv2d` that becomes this package's :class:`Conv2d` at its first input."""

    cls_to_become = Conv2d


class LazyConvTranspose1d(torch.nn.LazyConvTranspose1d, ConvTranspose1d):
    """:class:`torch.nn.LazyConvTranspose1d` that becomes this package's :class:`ConvTranspose1d`."""

    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(torch.nn.LazyConvTranspose2d, ConvTranspose2d):
    """:class:`torch.nn.LazyConvTranspose2d` that becomes this package's :class:`ConvTranspose2d`."""

    cls_to_become = ConvTranspose2d


def _is_extended(padding, stride) -> bool:
    """Whether torch's constructor would refuse or misread this padding."""
    if isinstance(padding, str):
        return padding in _EXTENDED_WORDS or (padding == "same" and stride not in (1, (1,), (1, 1), [1], [1, 1]))
    return is_per_side(padding)
