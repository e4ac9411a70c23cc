"""What bad input gets: an exception of torch's type whose message holds torch's text, and names what was got.

``EXTRA`` lists the calls that only this package refuses, or refuses in its own words, with the reason.
"""

import pytest
import torch

import cnn_ext.functional as C
from tests.support.errors import assert_raises_as_torch, raised

X, W, B = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
HUGE = 2**62

CONV2D = {
    "rank 2": (X[0, 0], W),
    "rank 5": (X[None], W),
    "bias of rank 2": (X, W, B[None]),
    "bias too long": (X, W, torch.randn(5)),
    "dtypes of input and weight": (X, W.double()),
    "dtypes of input and integer weight": (X, W.long()),
    "dtypes of input and bias": (X, W, B.double()),
    "zero stride": (X, W, None, 0),
    "negative stride": (X, W, None, (1, -1)),
    "three strides": (X, W, None, (1, 1, 1)),
    "no stride": (X, W, None, []),
    "negative padding": (X, W, None, 1, -1),
    "three paddings": (X, W, None, 1, (1, 2, 3)),
    "padding in capitals": (X, W, None, 1, "SAME"),
    "zero dilation": (X, W, None, 1, 0, 0),
    "three dilations": (X, W, None, 1, 0, (1, 2, 3)),
    "no groups": (X, W, None, 1, 0, 1, 0),
    "negative groups": (X, W, None, 1, 0, 1, -1),
    "groups and input channels": (X, W, None, 1, 0, 1, 2),
    "groups and output channels": (X, torch.randn(4, 1, 3, 3), None, 1, 0, 1, 3),
    "input channels": (torch.randn(2, 5, 8, 8), W),
    "input channels without batch": (torch.randn(1, 5, 8, 8), W),
    "kernel larger than input": (X[:, :, :2, :2], W),
    "dilated kernel larger than input": (X, W, None, 1, 0, (4, 5)),
    "no output channels": (X, torch.randn(0, 3, 3, 3)),
    "no rows": (X[:, :, :0], W, None, 1, 3),
    "no rows in an empty batch": (X[:0, :, :0], W),
    "bool": (X.bool(), W.bool()),
    "huge integer": (X, W, None, 2**63),
    "float stride": (X, W, None, 1.0),
    "float padding": (X, W, None, 1, 1.5),
    "bool padding": (X, W, None, 1, True),
    "float groups": (X, W, None, 1, 0, 1, 1.0),
    "list": ([1], W),
    "no weight": (X, None),
    "numpy": (X.numpy(), W),
}
POOL2D = {
    "rank 5": (X[None], 2),
    "bool": (X.bool(), 2),
    "complex": (X.cfloat(), 2),
    "zero kernel": (X, 0),
    "negative kernel": (X, -1),
    "three kernel sizes": (X, (1, 2, 3)),
    "no kernel size": (X, []),
    "zero stride": (X, 2, 0),
    "negative stride": (X, 2, -1),
    "three strides": (X, 2, (1, 2, 3)),
    "negative padding": (X, 2, 2, -1),
    "padding over half the kernel": (X, 2, 2, 2),
    "padding over half the larger kernel": (X, 3, 2, 2),
    "three paddings": (X, 2, 2, (1, 1, 1)),
    "no padding": (X, 2, 2, []),
    "kernel larger than input": (X, 9),
    "no channels": (X[:, :0], 2),
    "no rows": (X[:, :, :0], 2),
    "no channels in an empty batch": (X[:0, :0], 2),
    "huge kernel": (X, HUGE),
    "huge stride": (X, 2, HUGE),
    "kernel of 2**31": (X, 2**31),
    "integer beyond int64": (X, 2**63),
    "float kernel": (X, 2.0),
    "bool kernel": (X, True),
    "list": ([1], 2),
}
MAX_POOL2D = {
    "rank 2": (X[0, 0], 2),
    "zero dilation": (X, 2, 2, 0, 0),
    "negative dilation": (X, 2, 2, 0, -1),
    "three dilations": (X, 2, 2, 0, (1, 2, 3)),
    "padding over half the dilated kernel": (X, 3, 1, 3, 2),
    "huge dilation": (X, 3, 1, 0, HUGE),
    "ceil_mode of 2": (X, 2, 2, 0, 1, 2),
}
AVG_POOL2D = {
    "int32": (X.int(), 2),
    "divisor of zero": (X, 2, None, 0, False, True, 0),
    "divisor of 1.5": (X, 2, None, 0, False, True, 1.5),
    "ceil_mode of 2": (X, 2, 2, 0, 2),
}
CALLS = [
    *(("conv2d", name, arguments) for name, arguments in CONV2D.items()),
    *(("max_pool2d", name, arguments) for name, arguments in {**POOL2D, **MAX_POOL2D}.items()),
    *(("avg_pool2d", name, arguments) for name, arguments in {**POOL2D, **AVG_POOL2D}.items()),
]
OWN_WORDS = {
    "zero kernel": "stride should not be zero",
    "bool": "not implemented for 'Bool'",
}


@pytest.mark.parametrize(("op", "name", "arguments"), CALLS, ids=[f"{op}: {name}" for op, name, _ in CALLS])
def test_errors_are_torchs(op, name, arguments):
    assert_raises_as_torch(op, arguments, OWN_WORDS.get(name))


def mixed(dtype):
    return X.to(dtype), W.to(dtype)


# name: (function, arguments, exception, words of the message)
EXTRA = {
    "integer convolution, which torch computes": (C.conv2d, mixed(torch.int64), NotImplementedError, "'Long'"),
    "complex convolution": (C.conv2d, mixed(torch.complex64), NotImplementedError, "'ComplexFloat'"),
    "integer pooling": (C.max_pool2d, (X.int(), 2), NotImplementedError, "\"max_pool2d\" not implemented for 'Int'"),
    "eight bits": (C.avg_pool2d, (X.to(torch.float8_e4m3fn), 2), NotImplementedError, "Float8_e4m3fn"),
    "weight of rank 3, where torch complains of the stride": (C.conv2d, (X, W[0]), RuntimeError, "4D weight"),
    "kernel of no rows, where torch names a primitive": (
        C.conv2d,
        (X, torch.randn(4, 3, 0, 3)),
        RuntimeError,
        "kernel size should be greater than zero",
    ),
    "devices, which torch lets pass for meta": (C.conv2d, (X, W.to("meta")), RuntimeError, "should be the same"),
    "bias on another device": (C.conv2d, (X, W, B.to("meta")), RuntimeError, "bias type"),
    "sizes that overflow": (C.conv2d, (X, W, None, 1, 2**40), RuntimeError, "overflowed"),
    "padding that overflows": (C.conv2d, (X, W, None, 1, HUGE), RuntimeError, "overflowed"),
    "dilation that overflows": (C.conv2d, (X, W, None, 1, 0, HUGE), RuntimeError, "can't be greater than"),
    "sides of padding": (C.conv2d, (X, W, None, 1, ((1, 2, 3), (0, 0))), RuntimeError, "padding"),
    "'full' padding of a pool": (C.max_pool2d, (X, 2, 1, "full"), RuntimeError, "Invalid padding string"),
    "average of rank 2, an IndexError in torch": (C.avg_pool2d, (X[0, 0], 2), RuntimeError, "3D or 4D"),
}


@pytest.mark.parametrize("name", EXTRA)
def test_own_refusals(name):
    function, arguments, error, words = EXTRA[name]
    ours = raised(function, arguments)
    assert type(ours) is error and words in str(ours), repr(ours)


def test_huge_strides_are_fine_where_one_window_fits():
    assert torch.equal(C.conv2d(X, W, stride=HUGE), C.conv2d(X, W)[:, :, :1, :1])


def test_grad_output_of_another_problem():
    output = torch.randn(2, 4, 5, 5)
    with pytest.raises(RuntimeError, match="Expected grad_output of size"):
        torch.ops.cnn_ext.conv2d_backward_input(output, W, [2, 3, 8, 8], [1, 1], [0, 0, 0, 0], [1, 1], 1)


def test_offsets_of_another_kind():
    window = ([2, 2], [2, 2], [0, 0, 0, 0], [1, 1], False)
    output = torch.randn(2, 3, 4, 4)
    for offsets in (torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.zeros(2, 3, 4, 3, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="Expected offsets of"):
            torch.ops.cnn_ext.max_pool2d_backward(output, offsets, [2, 3, 8, 8], *window)
