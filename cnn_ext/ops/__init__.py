"""The raw operators, ``torch.ops.cnn_ext.*``, with fake kernels for torch.compile.

They carry no gradients: those are one floor up, in ``cnn_ext.autograd``.
"""

from cnn_ext.ops.conv2d import conv2d_backward_bias, conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from cnn_ext.ops.conv2d_relu_max_pool2d import (
    conv2d_relu_max_pool2d_backward_bias,
    conv2d_relu_max_pool2d_backward_input,
    conv2d_relu_max_pool2d_backward_weight,
    conv2d_relu_max_pool2d_forward,
)
from cnn_ext.ops.conv_transpose2d import conv_transpose2d_forward
from cnn_ext.ops.pooling import (
    avg_pool2d_backward,
    avg_pool2d_forward,
    max_pool2d_backward,
    max_pool2d_forward,
    max_pool2d_gather,
)
from cnn_ext.ops.sized_pooling import (
    adaptive_avg_pool2d_backward,
    adaptive_avg_pool2d_forward,
    adaptive_max_pool2d_forward,
    max_unpool2d_forward,
    max_unpool2d_gather,
    max_unpool2d_scatter,
)

__all__ = [
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool2d_forward",
    "adaptive_max_pool2d_forward",
    "avg_pool2d_backward",
    "avg_pool2d_forward",
    "conv2d_backward_bias",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "conv2d_forward",
    "conv2d_relu_max_pool2d_backward_bias",
    "conv2d_relu_max_pool2d_backward_input",
    "conv2d_relu_max_pool2d_backward_weight",
    "conv2d_relu_max_pool2d_forward",
    "conv_transpose2d_forward",
    "max_pool2d_backward",
    "max_pool2d_forward",
    "max_pool2d_gather",
    "max_unpool2d_forward",
    "max_unpool2d_gather",
    "max_unpool2d_scatter",
]
