"""conv1d, max_pool1d and avg_pool1d against torch: values, gradients of both orders, layouts, views, paddings."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnn_ext
import cnn_ext.functional as C

pytestmark = pytest.mark.usefixtures("one_thread")


def close(got, wanted, terms):
    """Within eps * terms * the largest magnitude."""
    tolerance = torch.finfo(wanted.dtype).eps * terms * max(1.0, wanted.abs().max().item() if wanted.numel() else 0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def operands(groups=1, kernel=3, length=11, batch=2, dtype=torch.float64):
    sizes = [(batch, 4, length), (6, 4 // groups, kernel), (6,)]
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def results(function, tensors, **arguments):
    """The output, its gradients and the gradients of their squares."""
    output = function(*tensors, **arguments)
    grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
    return [output, *grads, *second]


CONVOLUTIONS = [
    dict(zip(("stride", "padding", "dilation", "groups"), values, strict=True))
    for values in itertools.product([1, (2,)], [0, 2], [1, 2], [1, 2])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=lambda a: "-".join(map(str, a.values())))
def test_conv1d(arguments, kernel, dtype):
    tensors = operands(arguments["groups"], kernel, dtype=dtype)
    for got, wanted in zip(
        results(C.conv1d, tensors, **arguments), results(F.conv1d, tensors, **arguments), strict=True
    ):
        close(got, wanted, terms=300)  # second gradients pass through three sums of up to 88 terms
    assert C.conv1d(*tensors, **arguments).is_contiguous()


def test_gradients_of_both_orders():
    tensors = operands(groups=2, length=6)
    assert gradcheck(lambda *t: C.conv1d(*t, stride=2, padding=1, groups=2), tensors, nondet_tol=0)
    assert gradgradcheck(lambda *t: C.conv1d(*t, stride=2, padding=1, groups=2), tensors, nondet_tol=0)
    input = (torch.randperm(24).double() / 8).reshape(2, 2, 6).requires_grad_()
    for pool in (lambda x: C.max_pool1d(x, 3, 2, 1), lambda x: C.avg_pool1d(x, 3, 2, 1, True, False)):
        assert gradcheck(pool, input, nondet_tol=0)
        assert gradgradcheck(pool, input, nondet_tol=0)


@pytest.mark.parametrize("word", ["same", "same_lower", "full", "valid"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_padding_words_and_sides(word, stride):
    input, weight, bias = operands()
    total = max((-(-11 // stride) - 1) * stride + 3 - 11, 0)
    before, after = {
        "same": (total // 2, total - total // 2),
        "same_lower": (total - total // 2, total // 2),
        "full": (2, 2),
        "valid": (0, 0),
    }[word]
    wanted = F.conv1d(F.pad(input, (before, after)), weight, bias, stride)
    close(C.conv1d(input, weight, bias, stride, word), wanted, terms=12)
    assert torch.equal(
        C.conv1d(input, weight, bias, stride, ((before, after),)), C.conv1d(input, weight, bias, stride, word)
    )
    if word != "full":
        padded = F.pad(input, (before, after), value=-torch.inf)
        assert torch.equal(C.max_pool1d(input, 3, stride, word), F.max_pool1d(padded, 3, stride))
        assert torch.equal(C.avg_pool1d(input, 3, stride, word), C.avg_pool1d(input, 3, stride, ((before, after),)))


def test_activation():
    input, weight, bias = operands()
    assert torch.equal(C.conv1d(input, weight, bias, activation="relu"), C.conv1d(input, weight, bias).relu())
    with pytest.raises(ValueError, match=r"conv1d\(\) expected activation"):
        C.conv1d(input, weight, activation="tanh")


POOLS = list(itertools.product([2, 3, (5,)], [None, 1, 2, []], [0, 1], [False, True]))


@pytest.mark.parametrize("window", POOLS, ids=str)
def test_pools(window):
    kernel_size, stride, padding, ceil_mode = window
    input = torch.randn(2, 3, 12, dtype=torch.float64).round(decimals=1).requires_grad_()
    with torch.no_grad():
        input[0, 0, 3] = input[0, 0, 4] = torch.nan
        input[0, 1] = -torch.inf
    for dilation in (1, 2):
        arguments = (kernel_size, stride, padding, dilation, ceil_mode, True)
        for got, wanted in zip(C.max_pool1d(input, *arguments), F.max_pool1d(input, *arguments), strict=True):
            assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0)) and got.dtype == wanted.dtype
    finite = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    for include in (False, True):
        arguments = dict(kernel_size=kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode)
        arguments["count_include_pad"] = include
        pairs = zip(
            results(C.avg_pool1d, [finite], **arguments), results(F.avg_pool1d, [finite], **arguments), strict=True
        )
        for got, wanted in pairs:
            close(got, wanted, terms=60)


@pytest.mark.parametrize("pool", ["max_pool1d", "avg_pool1d"])
def test_views_and_batches(pool):
    ours, torchs = getattr(C, pool), getattr(F, pool)
    permuted = torch.randn(2, 8, 3, requires_grad=True).transpose(1, 2)
    assert torch.equal(ours(permuted, 2), torchs(permuted, 2))
    assert ours(permuted, 2).stride() == torchs(permuted, 2).stride()
    assert torch.equal(ours(permuted[0], 2), ours(permuted, 2)[0])
    assert ours(permuted[:0], 2).shape == (0, 3, 4)
    expanded = torch.randn(1, 1, 8).expand(2, 3, 8)
    assert torch.equal(ours(expanded, 3, 2, 1), ours(expanded.contiguous(), 3, 2, 1))


def test_conv1d_of_views_and_batches():
    input, weight, bias = (t.detach() for t in operands())
    permuted = input.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(C.conv1d(permuted, weight, bias), C.conv1d(input, weight, bias))
    assert C.conv1d(permuted, weight).is_contiguous()
    assert torch.equal(C.conv1d(input[0], weight, bias), C.conv1d(input, weight, bias)[0])
    assert torch.equal(C.conv1d(input[..., ::2], weight), C.conv1d(input[..., ::2].contiguous(), weight))
    assert torch.equal(C.conv1d(input, weight.flip(2).flip(2).expand_as(weight)), C.conv1d(input, weight))
    leaves = [t.requires_grad_() for t in (input[:0].clone(), weight, bias)]
    grads = torch.autograd.grad(C.conv1d(*leaves).sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves] and not any(g.any() for g in grads)
    none = C.conv1d(torch.empty(2, 0, 5), torch.empty(6, 0, 3), torch.arange(6.0))
    assert torch.equal(none, torch.arange(6.0).view(1, -1, 1).expand(2, 6, 3))


LAYERS = [
    ("Conv1d", (4, 6, 3), dict(stride=2, padding=1)),
    ("Conv1d", (4, 6, 3), dict(padding="same", dilation=2, groups=2, bias=False)),
    ("Conv1d", (4, 6, 3), dict(padding=2, padding_mode="circular")),
    ("Conv1d", (4, 6, 3), dict(padding=1, padding_mode="reflect", dtype=torch.float64)),
    ("MaxPool1d", (3,), dict(stride=2, padding=1, ceil_mode=True)),
    ("MaxPool1d", (2,), dict(dilation=2, return_indices=True)),
    ("AvgPool1d", (3,), dict(stride=2, padding=1, count_include_pad=False)),
    ("AvgPool1d", (2,), dict(ceil_mode=True)),
]


@pytest.mark.parametrize(("name", "positional", "arguments"), LAYERS, ids=str)
def test_layers_are_drop_ins(name, positional, arguments):
    torch.manual_seed(1)
    ours = getattr(cnn_ext, name)(*positional, **arguments)
    torch.manual_seed(1)
    torchs = getattr(nn, name)(*positional, **arguments)
    assert isinstance(ours, getattr(nn, name)) and repr(ours) == repr(torchs)
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    input = torch.randn(2, 4, 11, dtype=arguments.get("dtype", torch.float32))
    got, wanted = ours(input), torchs(input)
    if arguments.get("return_indices"):
        assert torch.equal(got[1], wanted[1])
        got, wanted = got[0], wanted[0]
    close(got, wanted, terms=13)
    converted = cnn_ext.convert(torchs)
    assert converted is torchs and type(torchs) is getattr(cnn_ext, name)
    again = torchs(input)
    assert torch.equal(again[0] if arguments.get("return_indices") else again, got)
    assert type(cnn_ext.revert(torchs)) is getattr(nn, name)


@pytest.mark.parametrize(
    "layer",
    [
        cnn_ext.Conv1d(1, 1, 3, padding="full"),
        cnn_ext.Conv1d(1, 1, 3, padding=((1, 0),)),
        cnn_ext.Conv1d(1, 1, 3, stride=2, padding="same"),
        cnn_ext.MaxPool1d(3, padding="same"),
        cnn_ext.AvgPool1d(3, padding="same_lower"),
        cnn_ext.AvgPool1d(3, padding=((1, 0),)),
    ],
    ids=str,
)
def test_extended_paddings_of_layers(layer):
    assert layer(torch.randn(2, 1, 9)).dim() == 3
    with pytest.raises(ValueError, match="padding"):
        cnn_ext.revert(layer)
