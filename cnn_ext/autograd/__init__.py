"""The operators with gradients of every order."""

from cnn_ext.autograd.conv2d import conv2d, conv2d_backward_weight
from cnn_ext.autograd.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d
from cnn_ext.autograd.pooling import avg_pool2d, max_pool2d

__all__ = ["avg_pool2d", "conv2d", "conv2d_backward_weight", "conv2d_relu_max_pool2d", "max_pool2d"]
