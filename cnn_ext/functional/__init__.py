"""``torch.nn.functional``'s convolutions and poolings, computed by this package's kernels, and the convolution fused
with its ReLU and max pooling.

Signatures, defaults, results and exception types are torch's. Beyond torch, convolutions take ``activation``;
``padding`` may also be ((top, bottom), (left, right)), ``'same'`` at any stride (TensorFlow's and ONNX's SAME_UPPER,
which is torch's at stride 1), ``'same_lower'`` and, for convolutions, ``'full'``; pools may be padded by up to half the
dilated window; average pools take ``dilation``. docs/functions.md has the table.
"""

from cnn_ext.functional.conv import conv1d, conv2d, conv2d_relu_max_pool2d
from cnn_ext.functional.conv_transpose import conv_transpose1d, conv_transpose2d
from cnn_ext.functional.per_sample import conv2d_weight_per_sample
from cnn_ext.functional.pooling import avg_pool1d, avg_pool2d, max_pool1d, max_pool2d
from cnn_ext.functional.sized_pooling import adaptive_avg_pool2d, adaptive_max_pool2d, max_unpool2d

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "conv1d",
    "conv2d",
    "conv2d_relu_max_pool2d",
    "conv2d_weight_per_sample",
    "conv_transpose1d",
    "conv_transpose2d",
    "max_pool1d",
    "max_pool2d",
    "max_unpool2d",
]
