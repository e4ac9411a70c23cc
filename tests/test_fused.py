"""Convolution fused with its ReLU and max pooling: torch's three functions in values and gradients, what it saves."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnn_ext
import cnn_ext.functional as C
from cnn_ext import _native

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = [torch.contiguous_format, torch.channels_last]
POOLS = {
    "2x2": (2, None),
    "3x3 stride 2": (3, 2),
    "2x2 stride 1": (2, 1),
    "2x3 stride 3x1": ((2, 3), (3, 1)),
    "relu alone": (1, None),
}
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": (1, 2), "padding": 1},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1},
}


def operands(groups=1, format=torch.contiguous_format, dtype=torch.float64, whole=False, size=(9, 11)):
    """Input, weight and bias; ``whole`` numbers have sums without rounding, in which maxima tie."""
    sizes = [(2, 4, *size), (8, 4 // groups, 3, 2), (8,)]
    tensors = [torch.randn(size, dtype=torch.float64) for size in sizes]
    tensors = [(t.round() if whole else t).to(dtype) for t in tensors]
    return [t.requires_grad_() for t in (tensors[0].contiguous(memory_format=format), *tensors[1:])]


def unfused(functions, tensors, geometry, pool):
    """The three functions one after the other."""
    activated = torch.relu(functions.conv2d(*tensors, **geometry))
    return functions.max_pool2d(activated, *pool)


def fused(tensors, geometry, pool):
    return C.conv2d_relu_max_pool2d(*tensors, **geometry, pool_size=pool[0], pool_stride=pool[1])


def values_and_gradients(output, tensors, seed=3):
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad_output.to(output.dtype))]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_those_of_three_functions(geometry, pool, format):
    """In float64, and in float32 with whole numbers: then every sum is exact, ties are many, zeros too."""
    arguments = GEOMETRIES[geometry]
    for dtype, whole in ((torch.float64, False), (torch.float32, True)):
        tensors = operands(arguments.get("groups", 1), format, dtype, whole)
        got = values_and_gradients(fused(tensors, arguments, POOLS[pool]), tensors)
        doubles = [t.detach().double().requires_grad_() for t in tensors]
        wanted = values_and_gradients(unfused(F, doubles, arguments, POOLS[pool]), doubles)
        for ours, torchs in zip(got, wanted, strict=True):
            # At most 2 * 9 * 11 terms of a gradient, each of at most the largest magnitudes' product.
            tolerance = 0 if whole and ours is got[0] else torch.finfo(dtype).eps * 200 * torchs.abs().max().item()
            torch.testing.assert_close(ours.double(), torchs, rtol=0, atol=tolerance)
        assert [t.stride() for t in got[1:]] == [t.stride() for t in tensors]
        assert got[0].is_contiguous(memory_format=format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pool", POOLS)
def test_the_fused_call_is_the_unfused_one(pool, format):
    """In float32: the fused gradients see the same offsets, so they differ by the order of additions at most."""
    tensors = operands(1, format, torch.float32)
    got = values_and_gradients(fused(tensors, {"padding": 1}, POOLS[pool]), tensors)
    wanted = values_and_gradients(unfused(C, tensors, {"padding": 1}, POOLS[pool]), tensors)
    for ours, theirs in zip(got, wanted, strict=True):
        tolerance = torch.finfo(torch.float32).eps * 200 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value, dtype, pool):
    """A NaN is the maximum and passes its gradient; nothing passes where all is at or below zero."""
    tensors = operands(dtype=dtype, whole=True)
    with torch.no_grad():
        tensors[0][0, 0, 3, 4] = value
        tensors[0][1] = 0
        tensors[2][:4] = torch.tensor([0.0, -0.0, -1.0, 1.0])
    got = values_and_gradients(fused(tensors, {"padding": 1}, POOLS[pool]), tensors)
    others = [t.detach().requires_grad_() for t in tensors]
    wanted = values_and_gradients(unfused(C, others, {"padding": 1}, POOLS[pool]), others)
    for ours, theirs in zip(got, wanted, strict=True):
        finite = theirs.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=torch.finfo(dtype).eps * 200 * finite, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pool", ["2x2", "2x2 stride 1", "relu alone"])
@pytest.mark.parametrize("geometry", ["strided", "grouped"])
def test_gradients_of_first_and_second_order(geometry, pool, format):
    arguments = GEOMETRIES[geometry]
    inputs = operands(arguments.get("groups", 1), format, size=(5, 6))
    assert gradcheck(lambda *t: fused(t, arguments, POOLS[pool]), inputs, nondet_tol=0)
    assert gradgradcheck(lambda *t: fused(t, arguments, POOLS[pool]), inputs, nondet_tol=0)


def saved_bytes(call):
    """Bytes of the tensors kept for backward, each storage once, without those of the operands."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        output, tensors = call()
    for tensor in tensors:
        kept.pop(tensor.data_ptr(), None)
    return sum(kept.values()), output


def test_forward_saves_a_byte_for_each_pooled_output():
    tensors = operands(dtype=torch.float32)
    ours, output = saved_bytes(lambda: (fused(tensors, {}, (2, None)), tensors))
    torchs, _ = saved_bytes(lambda: (unfused(F, tensors, {}, (2, None)), tensors))
    assert ours == output.numel()
    conv = 2 * 8 * 7 * 10
    assert torchs >= 4 * conv + 8 * output.numel()  # the ReLU's output and int64 indices


def test_the_activation_saves_its_output():
    tensors = operands(dtype=torch.float32)
    ours, output = saved_bytes(lambda: (C.conv2d(*tensors, activation="relu"), tensors))
    assert ours == output.nbytes


@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "no gradient required"])
def test_no_offsets_without_backward(why, monkeypatch):
    given = []
    kernel = _native.conv2d_relu_max_pool2d_forward
    monkeypatch.setattr(_native, "conv2d_relu_max_pool2d_forward", lambda *a: given.append(a[-1]) or kernel(*a))
    tensors = [t.requires_grad_(why != "no gradient required") for t in operands()]
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(why, torch.enable_grad)():
        fused(tensors, {}, (2, None))
    assert given == [None]


@pytest.mark.parametrize("wanted", range(3), ids=["input", "weight", "bias"])
def test_only_the_gradients_asked_for_are_computed(wanted, monkeypatch):
    names = ("backward_input", "backward_weight", "backward_bias")
    computed = []
    for name in names:
        kernel = getattr(_native, f"conv2d_relu_max_pool2d_{name}")
        monkeypatch.setattr(
            _native, f"conv2d_relu_max_pool2d_{name}", lambda *a, n=name, k=kernel: computed.append(n) or k(*a)
        )
    tensors = [t.requires_grad_(i == wanted) for i, t in enumerate(operands())]
    fused(tensors, {}, (2, None)).sum().backward()
    assert computed == [names[wanted]]


def test_an_empty_batch_an_image_and_a_large_window():
    input, weight, bias = operands()
    empty = C.conv2d_relu_max_pool2d(input[:0], weight, bias)
    assert empty.shape == (0, 8, 3, 5)
    grads = torch.autograd.grad(empty.sum(), (weight, bias))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    image = C.conv2d_relu_max_pool2d(input[0], weight, bias)
    assert torch.equal(image, C.conv2d_relu_max_pool2d(input[:1], weight, bias)[0])
    big = torch.randn(1, 4, 20, 20, dtype=torch.float64)  # more taps than a byte can number
    got = C.conv2d_relu_max_pool2d(big, weight, bias, pool_size=16, pool_stride=1)
    assert torch.equal(got, C.max_pool2d(torch.relu(C.conv2d(big, weight, bias)), 16, 1))


def test_errors_name_the_argument():
    input, weight, bias = operands()
    with pytest.raises(ValueError, match="'gelu'"):
        C.conv2d(input, weight, bias, activation="gelu")
    with pytest.raises(RuntimeError, match="pool_size"):
        C.conv2d_relu_max_pool2d(input, weight, bias, pool_size=(1, 2, 3))
    with pytest.raises(TypeError, match="pool_stride"):
        C.conv2d_relu_max_pool2d(input, weight, bias, pool_stride=1.5)
    with pytest.raises(RuntimeError, match="too small"):
        C.conv2d_relu_max_pool2d(input, weight, bias, pool_size=15)
    with pytest.raises(RuntimeError, match="pool_size"):
        torch.ops.cnn_ext.conv2d_relu_max_pool2d_forward(
            input.detach(), weight.detach(), None, [1, 1], [9, 9, 9, 9], [1, 1], 1, [16, 16], [1, 1], False
        )
    with pytest.raises(RuntimeError, match="Expected mask on cpu, but got mask on meta"):
        torch.ops.cnn_ext.conv2d_relu_max_pool2d_backward_bias(
            torch.randn(1, 4, 2, 2), torch.empty(1, 4, 2, 2, dtype=torch.uint8, device="meta"), [2, 2], [2, 2]
        )


def test_the_layer_is_a_conv2d_with_more_behind_it():
    torch.manual_seed(1)
    layer = cnn_ext.ConvReLUPool2d(4, 8, 3, padding=1, pool_size=3, pool_stride=2)
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, 3, padding=1)
    assert isinstance(layer, cnn_ext.Conv2d)
    assert list(layer.state_dict()) == list(conv.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), conv.parameters(), strict=True))
    assert repr(layer) == f"ConvReLUPool2d({conv.extra_repr()}, pool_size=3, pool_stride=2)"
    input = torch.randn(2, 4, 9, 9)
    wanted = F.max_pool2d(conv(input).relu(), 3, 2)
    tolerance = torch.finfo(torch.float32).eps * 37 * wanted.abs().max().item()
    torch.testing.assert_close(layer(input), wanted, rtol=0, atol=tolerance)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(input), layer(input))


@pytest.mark.parametrize("pool_size", [1, 2])
def test_torch_compile(pool_size):
    torch._dynamo.reset()
    layer = cnn_ext.ConvReLUPool2d(4, 8, 3, padding="same", pool_size=pool_size)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 4, 9, 9, requires_grad=True)
    tensors = [input, *layer.parameters()]
    got = values_and_gradients(compiled(input), tensors)
    wanted = values_and_gradients(layer(input), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
