"""adaptive_avg_pool2d, adaptive_max_pool2d and max_unpool2d against torch: values, indices, gradients, errors."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnn_ext
import cnn_ext.functional as C
from cnn_ext import _native
from tests.support.errors import assert_raises_as_torch, raised

pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = [torch.contiguous_format, torch.channels_last]


def close(got, wanted, terms):
    """Within eps * terms * the largest magnitude."""
    tolerance = torch.finfo(wanted.dtype).eps * terms * max(1.0, wanted.abs().max().item() if wanted.numel() else 0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def results(function, input):
    """The output, its gradient and the gradient of that."""
    output = function(input)
    (grad,) = torch.autograd.grad(output.pow(3).sum(), input, create_graph=True)
    return [output, grad, *torch.autograd.grad(grad.square().sum(), input)]


SIZES = list(itertools.product([(5, 6), (7, 9), (1, 4), (20, 33)], [1, 2, 3, (2, None), (7, 5), (None, 6), (9, 40)]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "output_size"), SIZES, ids=str)
def test_values_and_gradients_are_torchs(size, output_size, dtype, format):
    input = torch.randn(2, 5, *size, dtype=dtype).contiguous(memory_format=format).requires_grad_()
    for name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        functions = [functools.partial(getattr(module, name), output_size=output_size) for module in (C, F)]
        ours, torchs = (results(function, input) for function in functions)
        for got, wanted in zip(ours, torchs, strict=True):
            close(got, wanted, terms=4 * size[0] * size[1])
        assert ours[0].stride() == torchs[0].stride() and ours[1].stride() == input.stride()
    (output, indices), wanted = (m.adaptive_max_pool2d(input, output_size, return_indices=True) for m in (C, F))
    assert torch.equal(output, wanted[0]) and torch.equal(indices, wanted[1])
    assert not indices.requires_grad


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("output_size", [2, 3, (3, 17)])
def test_ties_nans_and_infinities(output_size, format):
    input = torch.randn(2, 3, 9, 34).round().contiguous(memory_format=format)
    input[0, 0, 2, 3] = input[0, 0, 3, 3] = input[0, 0, 3, 20] = torch.nan
    input[0, 1] = -torch.inf
    input[1, 1] = 0.0
    input[1, 1, ::2] = -0.0
    ours, torchs = (m.adaptive_max_pool2d(input, output_size, True) for m in (C, F))
    assert torch.equal(ours[1], torchs[1])
    assert torch.equal(ours[0].nan_to_num(7.0), torchs[0].nan_to_num(7.0))


def test_gradients_of_both_orders():
    input = (torch.randperm(60).double() / 8).reshape(1, 2, 5, 6).requires_grad_()
    indices = F.max_pool2d(torch.randn(1, 2, 10, 12), 2, return_indices=True)[1]
    functions = [
        lambda x: C.adaptive_avg_pool2d(x, (3, 4)),
        lambda x: C.adaptive_max_pool2d(x, (3, 4)),
        lambda x: C.max_unpool2d(x, indices, 2),
    ]
    for function in functions:
        assert gradcheck(function, input, nondet_tol=0)
        assert gradgradcheck(function, input, nondet_tol=0)


def test_dividing_sizes_are_ordinary_poolings(monkeypatch):
    calls = []
    for name in ("avg_pool2d_forward", "max_pool2d_forward", "adaptive_avg_pool2d_forward"):
        kernel = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda *a, n=name, k=kernel: calls.append(n) or k(*a))
    input = torch.randn(1, 2, 8, 6)
    C.adaptive_avg_pool2d(input, 1)
    C.adaptive_max_pool2d(input, (4, 3))
    C.adaptive_avg_pool2d(input, (4, 4))
    assert calls == ["avg_pool2d_forward", "max_pool2d_forward", "adaptive_avg_pool2d_forward"]


def saved_by(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        call()
    return saved


@pytest.mark.parametrize("output_size", [2, 3])
def test_without_channels(output_size):
    input = torch.randn(2, 0, 4, 4, requires_grad=True)
    output = C.adaptive_avg_pool2d(input, output_size)
    assert output.shape == F.adaptive_avg_pool2d(input, output_size).shape
    assert torch.autograd.grad(output.sum(), input)[0].shape == input.shape


def test_what_is_kept():
    input = torch.randn(1, 2, 8, 6, requires_grad=True)
    assert saved_by(lambda: C.adaptive_avg_pool2d(input, 3)) == []
    assert saved_by(lambda: C.adaptive_max_pool2d(input, 4)) == [torch.int64]
    assert saved_by(lambda: C.adaptive_max_pool2d(input, 2)) == [torch.uint8]
    assert saved_by(lambda: C.adaptive_max_pool2d(input.detach(), 4)) == []


@pytest.mark.parametrize("name", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_batches_and_views(name):
    ours, torchs = getattr(C, name), getattr(F, name)
    input = torch.randn(2, 3, 7, 8, requires_grad=True)
    for output_size in ((7, 2), 3):
        whole = ours(input, output_size)
        assert torch.equal(ours(input[0], output_size), whole[0])
        assert torch.equal(ours(input[1:], output_size), whole[1:])
        assert ours(input[:0], output_size).shape == torchs(input[:0], output_size).shape
        expanded = input[:1, :1].expand_as(input)
        assert torch.equal(ours(expanded, output_size), ours(expanded.contiguous(), output_size))
        grads = torch.autograd.grad(ours(input[:0], output_size).sum(), input)
        assert not grads[0].any()
        expanded_grad = torch.autograd.grad(ours(input, output_size).sum(), input)[0]
        close(expanded_grad, torch.autograd.grad(torchs(input, output_size).sum(), input)[0], terms=60)
    assert ours(input, 0).shape == (2, 3, 0, 0)
    assert not torch.autograd.grad(ours(input, (0, 3)).sum(), input)[0].any()


UNPOOLS = [(2, None, 0, None), (3, 2, 1, None), ((3, 2), (2, 3), (1, 0), (9, 10)), (2, None, 0, (2, 3, 9, 10))]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("arguments", UNPOOLS, ids=str)
def test_max_unpool2d_is_torchs(arguments, format):
    kernel_size, stride, padding, output_size = arguments
    input = torch.randn(2, 3, 9, 10, dtype=torch.float64).contiguous(memory_format=format)
    values, indices = C.max_pool2d(input, kernel_size, stride, padding, return_indices=True)
    output_size = output_size or input.shape
    values.requires_grad_()
    if stride is None:
        for got, wanted in zip(
            results(lambda v: C.max_unpool2d(v, indices, *arguments[:3], output_size), values),
            results(lambda v: F.max_unpool2d(v, indices, *arguments[:3], output_size), values),
            strict=True,
        ):
            close(got, wanted, terms=4)
    ours, torchs = (m.max_unpool2d(values, indices, *arguments[:3], output_size) for m in (C, F))
    assert torch.equal(ours, torchs) and ours.stride() == torchs.stride()
    assert torch.equal(C.max_unpool2d(values[0], indices[0], *arguments[:3], output_size[-2:]), ours[0])
    assert C.max_unpool2d(values[:0], indices[:0], *arguments[:3], output_size[-2:]).shape == (0, 3, *ours.shape[2:])


def test_values_that_meet():
    input = torch.tensor([[[[1.0, 2.0, 3.0]]]], requires_grad=True)
    indices = torch.tensor([[[[4, 0, 4]]]])
    output = C.max_unpool2d(input, indices, (2, 1), output_size=(2, 3))
    assert output.flatten().tolist() == [2.0, 0.0, 0.0, 0.0, 3.0, 0.0]  # the last one stays
    (grad,) = torch.autograd.grad(output, input, torch.arange(6.0).reshape(1, 1, 2, 3), create_graph=False)
    assert grad.flatten().tolist() == [4.0, 0.0, 4.0]  # and each gets what arrives there, as in torch


LAYERS = [
    ("AdaptiveAvgPool2d", ((2, None),), {}),
    ("AdaptiveAvgPool2d", (3,), {}),
    ("AdaptiveMaxPool2d", (4,), dict(return_indices=True)),
    ("AdaptiveMaxPool2d", ((None, 2),), {}),
]


@pytest.mark.parametrize(("name", "positional", "arguments"), LAYERS, ids=str)
def test_adaptive_layers_are_drop_ins(name, positional, arguments):
    ours, torchs = getattr(cnn_ext, name)(*positional, **arguments), getattr(nn, name)(*positional, **arguments)
    assert isinstance(ours, getattr(nn, name)) and repr(ours) == repr(torchs)
    input = torch.randn(2, 3, 7, 9)
    got, wanted = ours(input), torchs(input)
    if arguments:
        assert torch.equal(got[1], wanted[1])
        got, wanted = got[0], wanted[0]
    close(got, wanted, terms=63)
    assert type(cnn_ext.convert(torchs)) is getattr(cnn_ext, name)
    assert type(cnn_ext.revert(torchs)) is getattr(nn, name)


def test_max_unpool2d_layer_is_a_drop_in():
    ours, torchs = (m.MaxUnpool2d(3, stride=2, padding=1) for m in (cnn_ext, nn))
    assert isinstance(ours, nn.MaxUnpool2d) and repr(ours) == repr(torchs)
    values, indices = cnn_ext.MaxPool2d(3, 2, 1, return_indices=True)(torch.randn(2, 3, 9, 9))
    assert torch.equal(ours(values, indices), torchs(values, indices))
    assert torch.equal(ours(values, indices, output_size=(9, 10)), torchs(values, indices, output_size=(9, 10)))
    assert type(cnn_ext.convert(torchs)) is cnn_ext.MaxUnpool2d


X = torch.randn(2, 3, 5, 6)
ADAPTIVE = {
    "one size": (X, (3,)),
    "no size": (X, []),
    "three sizes": (X, (1, 2, 3)),
    "negative size": (X, -1),
    "one negative size": (X, (2, -1)),
    "rank 1": (X[0, 0, 0], 2),
    "rank 2": (X[0, 0], 2),
    "rank 2 and a pair": (X[0, 0], (2, 2)),
    "rank 5": (X[None], 2),
    "no rows": (X[:, :, :0], 2),
    "no columns without batch": (X[0, :, :, :0], 2),
    "bool": (X.bool(), 2),
    "int32": (X.int(), 2),
    "complex": (X.cfloat(), 2),
    "integer beyond int64": (X, 2**63),
    "bool size": (X, True),
}
VALUES, INDICES = F.max_pool2d(X[:, :, :4], 2, return_indices=True)
UNPOOL = {
    "indices of another size": (VALUES, INDICES[0], 2),
    "indices of fewer images": (VALUES, INDICES[:1], 2),
    "int32 indices": (VALUES, INDICES.int(), 2),
    "float indices": (VALUES, INDICES.float(), 2),
    "rank 2": (VALUES[0, 0], INDICES[0, 0], 2),
    "one size": (VALUES, INDICES, 2, None, 0, [5]),
    "size too large": (VALUES, INDICES, 2, None, 0, (9, 9)),
    "size too small": (VALUES, INDICES, 2, None, 0, (2, 6)),
    "negative size": (VALUES, INDICES, 2, 2, 5),
    "bool": (VALUES.bool(), INDICES, 2),
    "int64": (VALUES.long(), INDICES, 2),
    "no channels": (VALUES[:, :0], INDICES[:, :0], 2),
    "no rows": (VALUES[:, :, :0], INDICES[:, :, :0], 2),
}
CALLS = [
    *(("adaptive_avg_pool2d", name, arguments) for name, arguments in ADAPTIVE.items()),
    *(("adaptive_max_pool2d", name, arguments) for name, arguments in ADAPTIVE.items()),
    ("adaptive_max_pool2d", "no channels", (X[:, :0], 2)),
    *(("max_unpool2d", name, arguments) for name, arguments in UNPOOL.items()),
]


@pytest.mark.parametrize(("op", "name", "arguments"), CALLS, ids=[f"{op}: {name}" for op, name, _ in CALLS])
def test_errors_are_torchs(op, name, arguments):
    assert_raises_as_torch(op, arguments)


@pytest.mark.parametrize("index", [24, 1000, -1, -(2**40)])
def test_an_index_outside_is_refused(index):
    indices = INDICES.clone()
    indices[1, 2, 1, 1] = index
    for function in (C.max_unpool2d, F.max_unpool2d):
        error = raised(function, (VALUES, indices, 2))
        assert type(error) is RuntimeError and str(error).startswith("Found an invalid max index: ")
        assert "(output volumes are of size 4x6)" in str(error)


OWN = {
    "no tensor, an AttributeError in torch": (C.adaptive_avg_pool2d, ([1], 2), TypeError, "must be Tensor"),
    "no size, which has no len() in torch": (C.adaptive_max_pool2d, (X, None), TypeError, "'output_size'"),
    "float size": (C.adaptive_avg_pool2d, (X, 2.0), TypeError, "'output_size'"),
    "size that overflows": (C.adaptive_avg_pool2d, (X, 2**62), RuntimeError, "overflowed"),
    "return_indices of 2": (C.adaptive_max_pool2d, (X, 2, 2), TypeError, "'return_indices' must be bool"),
    "three kernel sizes, an IndexError in torch": (
        C.max_unpool2d,
        (VALUES, INDICES, (2, 3, 4)),
        RuntimeError,
        "kernel_size",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_own_refusals(name):
    function, arguments, error, words = OWN[name]
    ours = raised(function, arguments)
    assert type(ours) is error and words in str(ours), repr(ours)
