"""The lecture's deep CNN, with this package's layers or torch's."""

from collections import OrderedDict

from torch import nn

import cnn_ext

NAME = "lecture-cnn"
BACKENDS = ("cnn_ext", "torch")


def layer_classes(backend: str) -> tuple[type[nn.Conv2d], type[nn.MaxPool2d]]:
    """The convolution and the max pooling layer of a backend."""
    if backend == "torch":
        return nn.Conv2d, nn.MaxPool2d
    return cnn_ext.Conv2d, cnn_ext.MaxPool2d


def lecture_cnn(backend: str = "cnn_ext", fused: bool = False) -> nn.Sequential:
    """[N, 1, 28, 28] to the logits of ten classes. Both backends draw the same weights from torch's generator.

    ``fused``: each convolution computes its ReLU and pool too (cnn_ext only); parameters and their names stay.
    """
    conv2d, max_pool2d = layer_classes(backend)
    model = nn.Sequential(
        OrderedDict(
            conv1=conv2d(in_channels=1, out_channels=32, kernel_size=5, padding=2),
            relu1=nn.ReLU(),
            pool1=max_pool2d(kernel_size=2),
            conv2=conv2d(in_channels=32, out_channels=64, kernel_size=5, padding=2),
            relu2=nn.ReLU(),
            pool2=max_pool2d(kernel_size=2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(3136, 1024),
            relu3=nn.ReLU(),
            dropout=nn.Dropout(p=0.5),
            fc2=nn.Linear(1024, 10),
        )
    )
    return cnn_ext.convert(model, fuse=True) if fused else model
