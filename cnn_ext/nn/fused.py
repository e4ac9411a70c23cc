"""The convolution layer that applies its ReLU and max pooling itself."""

from cnn_ext import functional
from cnn_ext.nn.conv import Conv2d


class ConvReLUPool2d(Conv2d):
    """``MaxPool2d(pool_size, pool_stride)`` of ``ReLU()`` of ``Conv2d(...)``, without the tensors in between.

    Same parameters, initialisation and ``state_dict`` as :class:`torch.nn.Conv2d`. ``pool_stride`` is ``pool_size`` if
    omitted; with ``pool_size=1`` it is the convolution and its ReLU.
    """

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
        pool_size=2,
        pool_stride=None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.pool_size = pool_size
        self.pool_stride = pool_size if pool_stride is None else pool_stride

    def _compute(self, *arguments, **keywords):
        return functional.conv2d_relu_max_pool2d(*arguments, self.pool_size, self.pool_stride, **keywords)

    def extra_repr(self):
        return f"{super().extra_repr()}, pool_size={self.pool_size}, pool_stride={self.pool_stride}"
