"""Transposed convolutions: the shared cases against the truth, everything else against torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnn_ext
import cnn_ext.functional as C
from cnn_ext import _native
from tests.support import reference, rows
from tests.support.cases import conv2d_cases
from tests.support.errors import assert_raises_as_torch, raised
from tests.support.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = [torch.contiguous_format, torch.channels_last]


def close(got, wanted, terms):
    """Within eps * terms * the largest magnitude."""
    tolerance = torch.finfo(wanted.dtype).eps * terms * max(1.0, wanted.abs().max().item() if wanted.numel() else 0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def with_bias(truth, bias):
    """The truth of a transposed convolution: backward_input's plus the bias."""
    value = truth.value + bias.double().view(1, -1, 1, 1)
    magnitude = truth.magnitude + bias.double().abs().view(1, -1, 1, 1)
    return reference.Truth(value, magnitude, truth.roundings + (truth.roundings > 0))


ROWS_WITH_BIAS = [
    row
    for row in rows.rows(op="conv2d", direction="backward_input")
    if any(f"_{algorithm}_" in row.name for algorithm in ("naive", "direct", "pixels", "implicit_gemm"))
]


@pytest.mark.parametrize("row", ROWS_WITH_BIAS, ids=str)
def test_rows_add_the_bias(row):
    ran = 0
    for case, dtype in zip(conv2d_cases(), itertools.cycle(rows.DTYPES), strict=False):
        for layout in rows.POOL2D_LAYOUTS:
            shape = rows.conv2d_shape(case, dtype, layout, layout)
            if case.multiplications > 500_000 or not rows.accepts(row, shape):
                continue
            t = case.tensors(dtype)
            bias = torch.linspace(-2, 2, case.in_channels, dtype=dtype)
            operands = [rows.dense(tensor, layout, 1, row.device) for tensor in (t.grad_output, t.weight, bias)]
            output = rows.empty(case.input_size, dtype, layout, 1, row.device)
            with rows.forced(row):
                _native.conv_transpose2d_forward(shape, *operands, output)
            truth = with_bias(reference.conv2d_backward_input(case, t.grad_output, t.weight), bias)
            assert_close(output.cpu(), truth, f"{case}, {dtype}, {layout}")
            ran += 1
    assert ran > 10


def test_a_forced_row_without_bias_refuses_it():
    input, weight, bias = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 1, 1), torch.randn(8)
    row = next(row.name for row in rows.rows(op="conv2d", direction="backward_input") if "_pointwise_" in row.name)
    with cnn_ext.force_kernel(row):
        C.conv_transpose2d(input, weight)
        with pytest.raises(ValueError, match="adds no bias"):
            C.conv_transpose2d(input, weight, bias)


GEOMETRIES = [
    dict(zip(("stride", "padding", "output_padding", "dilation", "groups"), values, strict=True))
    for values in [
        (1, 0, 0, 1, 1),
        (2, 1, 1, 1, 1),
        ((2, 3), (1, 0), (1, 2), 1, 2),
        (1, (0, 2), 0, (1, 2), 2),
        (2, 3, (0, 2), 3, 1),
        (1, 0, 2, 3, 1),
        (3, 2, 1, 2, 4),
    ]
]


def operands(groups=1, kernel=(3, 2), dtype=torch.float64, format=torch.contiguous_format, size=(5, 6)):
    sizes = [(2, 4, *size), (4, 8 // groups, *kernel), (8,)]
    input, weight, bias = (torch.randn(size, dtype=dtype) for size in sizes)
    return [t.requires_grad_() for t in (input.contiguous(memory_format=format), weight, bias)]


def results(function, tensors, **arguments):
    """The output, its gradients and the gradients of their squares."""
    output = function(*tensors, **arguments)
    grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
    return [output, *grads, *second]


def name_of(geometry):
    return "-".join(map(str, geometry.values()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=name_of)
def test_values_and_gradients_are_torchs(geometry, dtype, format):
    tensors = operands(geometry["groups"], dtype=dtype, format=format)
    ours, torchs = (results(f, tensors, **geometry) for f in (C.conv_transpose2d, F.conv_transpose2d))
    for got, wanted in zip(ours, torchs, strict=True):
        close(got, wanted, terms=600)  # second gradients pass through three sums of up to 200 terms
    assert ours[0].stride() == torchs[0].stride()
    weight = tensors[1].detach().contiguous(memory_format=torch.channels_last)
    strides = [f(tensors[0], weight, **geometry).stride() for f in (C.conv_transpose2d, F.conv_transpose2d)]
    assert strides[0] == strides[1]


@pytest.mark.parametrize("geometry", GEOMETRIES[1:5], ids=name_of)
def test_one_axis(geometry):
    geometry = {name: value if isinstance(value, int) else value[1:] for name, value in geometry.items()}
    tensors = operands(geometry["groups"])
    tensors = [*(t.detach()[:, :, 1].requires_grad_() for t in tensors[:2]), tensors[2]]
    ours, torchs = (results(f, tensors, **geometry) for f in (C.conv_transpose1d, F.conv_transpose1d))
    for got, wanted in zip(ours, torchs, strict=True):
        close(got, wanted, terms=300)
    assert torch.equal(C.conv_transpose1d(tensors[0][0], *tensors[1:], **geometry), ours[0][0])


@pytest.mark.parametrize("geometry", GEOMETRIES[1:4], ids=name_of)
def test_gradients_of_both_orders(geometry):
    tensors = operands(geometry["groups"], size=(2, 3))
    assert gradcheck(lambda *t: C.conv_transpose2d(*t, **geometry), tensors, nondet_tol=0)
    assert gradgradcheck(lambda *t: C.conv_transpose2d(*t, **geometry), tensors, nondet_tol=0)


SUBSETS = [subset for subset in itertools.product([False, True], repeat=3) if any(subset)]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(n for n, on in zip("xwb", s, strict=True) if on))
def test_only_what_is_asked_for_is_saved_and_computed(subset, monkeypatch):
    tensors = [t.detach().requires_grad_(on) for t, on in zip(operands(), subset, strict=True)]
    saved, computed = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        output = C.conv_transpose2d(*tensors)
    wanted = ([tensors[0]] if subset[1] else []) + ([tensors[1]] if subset[0] else [])
    assert saved == [t.data_ptr() for t in wanted]
    directions = ("forward", "backward_weight", "backward_bias")
    for direction in directions:
        kernel = getattr(_native, f"conv2d_{direction}")
        monkeypatch.setattr(
            _native, f"conv2d_{direction}", lambda *a, d=direction, k=kernel: computed.append(d) or k(*a)
        )
    output.sum().backward()
    assert computed == [direction for direction, on in zip(directions, subset, strict=True) if on]
    assert [t.grad is not None for t in tensors] == list(subset)


def test_views_and_batches():
    input, weight, bias = (t.detach() for t in operands())
    wanted = C.conv_transpose2d(input, weight, bias, 2, 1)
    assert torch.equal(C.conv_transpose2d(input[0], weight, bias, 2, 1), wanted[0])
    stepped = input.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(C.conv_transpose2d(stepped, weight, bias, 2, 1), wanted)
    expanded = input[:1].expand_as(input)
    assert torch.equal(C.conv_transpose2d(expanded, weight, bias)[1], C.conv_transpose2d(input[:1], weight, bias)[0])
    zeros = torch.zeros_like(bias)
    assert torch.equal(C.conv_transpose2d(input, weight), C.conv_transpose2d(input, weight, zeros))
    leaves = [t.clone().requires_grad_() for t in (input[:0], weight, bias)]
    grads = torch.autograd.grad(C.conv_transpose2d(*leaves).sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves] and not any(g.any() for g in grads)


def test_slices_of_a_batch_have_its_bits():
    input, weight, bias = (t.detach() for t in operands(dtype=torch.float32))
    whole = C.conv_transpose2d(input, weight, bias, 2, 1, 1)
    assert torch.equal(whole[1:], C.conv_transpose2d(input[1:], weight, bias, 2, 1, 1))


def test_what_is_left_out_never_multiplies():
    input, weight, _ = (t.detach() for t in operands(kernel=(3, 3)))
    weight[0, 0, 0, 0] = torch.inf
    output = C.conv_transpose2d(input, weight, stride=2, padding=1, output_padding=1)
    assert not output.isnan().any()
    assert output[:, 1:].isfinite().all() and output[0, 0, 1, 1].isinf()


@pytest.mark.parametrize("word", ["same", "same_lower"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (4, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)], ids=str)
def test_same_padding_is_the_adjoint_of_conv2ds(stride, kernel, dilation, word):
    input, weight, _ = (t.detach() for t in operands(kernel=kernel))
    strides = (stride, stride) if isinstance(stride, int) else stride
    output = C.conv_transpose2d(input, weight, stride=stride, padding=word, dilation=dilation)
    assert output.shape[2:] == tuple(n * s for n, s in zip(input.shape[2:], strides, strict=True))
    large = torch.randn_like(output, requires_grad=True)
    small = C.conv2d(large, weight, stride=stride, padding=word, dilation=dilation)
    (adjoint,) = torch.autograd.grad(small, large, input)
    close(output, adjoint, terms=90)


def test_sides_are_left_out():
    input, weight, bias = (t.detach() for t in operands())
    whole = C.conv_transpose2d(input, weight, bias, 2)
    got = C.conv_transpose2d(input, weight, bias, 2, ((1, 0), (0, 2)))
    close(got, whole[:, :, 1:, :-2], terms=14)
    assert torch.equal(C.conv_transpose2d(input, weight, bias, 2, "valid"), whole)


LAYERS = [
    ("ConvTranspose2d", (4, 6, 3), dict(stride=2, padding=1, output_padding=1)),
    ("ConvTranspose2d", (4, 6, (3, 2)), dict(groups=2, bias=False, dilation=(1, 2), dtype=torch.float64)),
    ("ConvTranspose1d", (4, 6, 3), dict(stride=2, padding=1)),
]


@pytest.mark.parametrize(("name", "positional", "arguments"), LAYERS, ids=str)
def test_layers_are_drop_ins(name, positional, arguments):
    torch.manual_seed(1)
    ours = getattr(cnn_ext, name)(*positional, **arguments)
    torch.manual_seed(1)
    torchs = getattr(nn, name)(*positional, **arguments)
    assert isinstance(ours, getattr(nn, name)) and repr(ours) == repr(torchs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters(), strict=True))
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    axes = 1 if "1d" in name else 2
    input = torch.randn((2, 4, 5, 6)[: 2 + axes], dtype=arguments.get("dtype", torch.float32))
    close(ours(input), torchs(input), terms=40)
    size = torchs(input).shape
    for output_size in (size, size[2:]):
        close(ours(input, output_size=output_size), torchs(input, output_size=output_size), terms=40)
    with pytest.raises(ValueError, match="requested an output size"):
        ours(input, output_size=[99] * axes)
    with pytest.raises(ValueError, match="padding mode"):
        getattr(cnn_ext, name)(4, 4, 3, padding_mode="reflect")
    assert type(cnn_ext.convert(torchs)) is getattr(cnn_ext, name)
    assert torch.equal(torchs(input), ours(input))
    assert type(cnn_ext.revert(torchs)) is getattr(nn, name)


@pytest.mark.parametrize("padding", ["same", ((1, 0), (0, 1))], ids=str)
def test_extended_paddings_of_layers(padding):
    layer = cnn_ext.ConvTranspose2d(4, 6, 3, stride=2, padding=padding)
    assert f"padding={padding}" in repr(layer)
    input = torch.randn(2, 4, 5, 6)
    assert torch.equal(layer(input), C.conv_transpose2d(input, layer.weight, layer.bias, 2, padding))
    with pytest.raises(ValueError, match="output_size needs"):
        layer(input, output_size=(10, 12))
    with pytest.raises(ValueError, match="padding"):
        cnn_ext.revert(layer)


X, W, B = torch.randn(2, 3, 5, 6), torch.randn(3, 4, 3, 3), torch.randn(4)
ERRORS = {
    "rank 2": (X[0, 0], W),
    "rank 5": (X[None], W),
    "bias of rank 2": (X, W, B[None]),
    "bias too long": (X, W, torch.randn(5)),
    "dtypes of input and weight": (X, W.double()),
    "dtypes of input and bias": (X, W, B.double()),
    "zero stride": (X, W, None, 0),
    "three strides": (X, W, None, (1, 1, 1)),
    "negative padding": (X, W, None, 1, -1),
    "three paddings": (X, W, None, 1, (1, 2, 3)),
    "negative output padding": (X, W, None, 1, 0, -1),
    "output padding of 1": (X, W, None, 1, 0, 1),
    "output padding of the stride": (X, W, None, 2, 0, (0, 2)),
    "three output paddings": (X, W, None, 1, 0, (1, 2, 3)),
    "no groups": (X, W, None, 1, 0, 0, 0),
    "groups and input channels": (X, W, None, 1, 0, 0, 2),
    "input channels": (torch.randn(2, 5, 5, 6), W),
    "input channels without batch": (torch.randn(5, 5, 6), W),
    "three dilations": (X, W, None, 1, 0, 0, 1, (1, 2, 3)),
    "no rows": (X[:, :, :0], W),
    "no input channels": (X[:, :0], W[:0]),
    "huge integer": (X, W, None, 2**63),
    "float stride": (X, W, None, 1.0),
    "bool output padding": (X, W, None, 1, 0, True),
    "list": ([1], W),
}
OVER_ONE_AXIS = ("bias too long", "output padding of 1", "three dilations", "zero stride", "no groups", "rank 2")


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_torchs(name):
    assert_raises_as_torch("conv_transpose2d", ERRORS[name])


@pytest.mark.parametrize("name", OVER_ONE_AXIS)
def test_errors_over_one_axis_are_torchs(name):
    is_wide = [isinstance(argument, torch.Tensor) and argument.dim() > 1 for argument in ERRORS[name]]
    narrow = [a[..., 0] if wide else a for a, wide in zip(ERRORS[name], is_wide, strict=True)]
    assert_raises_as_torch("conv_transpose1d", narrow)


# name: (arguments, exception, words of the message)
OWN = {
    "zero dilation, where torch names a primitive": (
        (X, W, None, 1, 0, 0, 1, 0),
        RuntimeError,
        "non-positive dilation",
    ),
    "nothing is left, where torch names a tag": ((X, W, None, 1, 4), RuntimeError, "Output size is too small"),
    "kernel of no rows": ((X, W[:, :, :0]), RuntimeError, "kernel size should be greater than zero"),
    "unknown word": ((X, W, None, 1, "full"), RuntimeError, "Invalid padding string"),
    "bool": ((X.bool(), W.bool()), NotImplementedError, "'Bool'"),
    "sides": ((X, W, None, 1, ((1, -1), (0, 0))), RuntimeError, "negative padding"),
}


@pytest.mark.parametrize("name", OWN)
def test_own_refusals(name):
    arguments, error, words = OWN[name]
    ours = raised(C.conv_transpose2d, arguments)
    assert type(ours) is error and words in str(ours), repr(ours)
