"""What bad input to the functions over one axis gets: an exception of torch's type with torch's text."""

import pytest
import torch

from tests.support.errors import assert_raises_as_torch

X, W, B = torch.randn(2, 3, 8), torch.randn(4, 3, 3), torch.randn(4)

CONV1D = {
    "rank 1": (X[0, 0], W),
    "rank 4": (X[None], W),
    "bias of rank 2": (X, W, B[None]),
    "bias too long": (X, W, torch.randn(5)),
    "dtypes of input and weight": (X, W.double()),
    "dtypes of input and bias": (X, W, B.double()),
    "zero stride": (X, W, None, 0),
    "two strides": (X, W, None, (1, 1)),
    "no stride": (X, W, None, []),
    "negative padding": (X, W, None, 1, -1),
    "two paddings": (X, W, None, 1, (1, 2)),
    "padding in capitals": (X, W, None, 1, "SAME"),
    "zero dilation": (X, W, None, 1, 0, 0),
    "two dilations": (X, W, None, 1, 0, (1, 2)),
    "no groups": (X, W, None, 1, 0, 1, 0),
    "groups and input channels": (X, W, None, 1, 0, 1, 2),
    "groups and output channels": (X, torch.randn(4, 1, 3), None, 1, 0, 1, 3),
    "input channels": (torch.randn(2, 5, 8), W),
    "input channels without batch": (torch.randn(5, 8), W),
    "kernel larger than input": (X[:, :, :2], W),
    "dilated kernel larger than input": (X, W, None, 1, 0, 5),
    "no output channels": (X, torch.randn(0, 3, 3)),
    "nothing in an empty batch": (X[:0, :, :0], W),
    "huge integer": (X, W, None, 2**63),
    "float stride": (X, W, None, 1.0),
    "list": ([1], W),
}
POOL1D = {
    "rank 1": (X[0, 0], 2),
    "rank 4": (X[None], 2),
    "bool": (X.bool(), 2),
    "int32": (X.int(), 2),
    "negative kernel": (X, -1),
    "two kernel sizes": (X, (1, 2)),
    "no kernel size": (X, []),
    "zero stride": (X, 2, 0),
    "negative stride": (X, 2, -1),
    "two strides": (X, 2, (1, 2)),
    "negative padding": (X, 2, 2, -1),
    "padding over half the kernel": (X, 3, 2, 2),
    "two paddings": (X, 2, 2, (1, 1)),
    "no padding": (X, 2, 2, []),
    "kernel larger than input": (X, 9),
    "no channels": (X[:, :0], 2),
    "nothing along the axis": (X[:, :, :0], 2),
    "integer beyond int64": (X, 2**63),
    "float kernel": (X, 2.0),
    "bool kernel": (X, True),
    "list": ([1], 2),
}
MAX_POOL1D = {
    "zero kernel": (X, 0),
    "zero dilation": (X, 2, 2, 0, 0),
    "two dilations": (X, 2, 2, 0, (1, 2)),
    "padding over half the dilated kernel": (X, 3, 1, 3, 2),
    "ceil_mode of 2": (X, 2, 2, 0, 1, 2),
}
AVG_POOL1D = {"huge kernel": (X, 2**31), "ceil_mode of 2": (X, 2, 2, 0, 2)}
CALLS = [
    *(("conv1d", name, arguments) for name, arguments in CONV1D.items()),
    *(("max_pool1d", name, arguments) for name, arguments in {**POOL1D, **MAX_POOL1D}.items()),
    *(("avg_pool1d", name, arguments) for name, arguments in {**POOL1D, **AVG_POOL1D}.items()),
]
OWN_WORDS = {
    "bool": "not implemented for 'Bool'",
    "int32": "not implemented for 'Int'",
    # torch counts the added axis, this package does not
    ("avg_pool1d", "no channels"): "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input",
    ("avg_pool1d", "nothing along the axis"): "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size",
}


@pytest.mark.parametrize(("op", "name", "arguments"), CALLS, ids=[f"{op}: {name}" for op, name, _ in CALLS])
def test_errors_are_torchs(op, name, arguments):
    assert_raises_as_torch(op, arguments, OWN_WORDS.get((op, name), OWN_WORDS.get(name)))
