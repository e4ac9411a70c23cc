"""The operators with gradients of every order."""

from cnn_ext.autograd.conv2d import conv2d, conv2d_backward_weight
from cnn_ext.autograd.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d
from cnn_ext.autograd.conv_transpose2d import conv_transpose2d
from cnn_ext.autograd.pooling import avg_pool2d, max_pool2d
from cnn_ext.autograd.sized_pooling import adaptive_avg_pool2d, adaptive_max_pool2d, max_unpool2d

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "conv2d",
    "conv2d_backward_weight",
    "conv2d_relu_max_pool2d",
    "conv_transpose2d",
    "max_pool2d",
    "max_unpool2d",
]
