"""padding_mode reflect, replicate and circular, without a padded copy: rows against the truth, functions and layers
against torch on a padded input.
"""

import functools
import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cnn_ext
import cnn_ext.functional as C
from cnn_ext import _native
from cnn_ext.ops.padding import fold, pad
from tests.support.cases import conv2d_cases, shared_tensors
from tests.support.reference import Truth
from tests.support.rows import conv2d_shape, dense, empty, forced, rows
from tests.support.tolerances import violation

conv2d_operators = importlib.import_module("cnn_ext.ops.conv2d")
pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ("reflect", "replicate", "circular")
FORMATS = [torch.contiguous_format, torch.channels_last]


def padded(mode, case, input):
    top, bottom, left, right = case.padding
    return F.pad(input, (left, right, top, bottom), mode=mode)


def suits(case, mode):
    """Whether the mode can fill the padding of a case, and whether that is worth a test."""
    most_h, most_w = max(case.padding[:2]), max(case.padding[2:])
    room = 1 if mode == "reflect" else 0
    return (
        case.batch * case.in_channels * case.out_channels > 0
        and max(most_h, most_w) > 0
        and min(case.padding) >= 0
        and most_h <= case.in_h - room
        and most_w <= case.in_w - room
        and case.multiplications < 300_000
    )


CASES = [(case, mode) for case, mode in zip(conv2d_cases(), itertools.cycle(MODES), strict=False) if suits(case, mode)]
DIRECTIONS = ("forward", "backward_input", "backward_weight")
ROWS = [row for direction in DIRECTIONS for row in rows(op="conv2d", direction=direction) if row.device == "cpu"]


def operands_of(case, dtype):
    data = shared_tensors(case, dtype)
    return data.input, data.weight, data.grad_output


@functools.cache
def truth_of(direction, case, mode, dtype):
    """By torch in float64, on the padded input; its magnitude by the absolute values."""

    def compute(*tensors):
        input, weight, grad_output = (t.detach().requires_grad_() for t in tensors)
        output = F.conv2d(padded(mode, case, input), weight, None, case.stride, 0, case.dilation, case.groups)
        if direction == "forward":
            return output.detach()
        return torch.autograd.grad(output, input if direction == "backward_input" else weight, grad_output)[0]

    doubles = [t.double() for t in operands_of(case, dtype)]
    taps = case.kernel_h * case.kernel_w
    terms = {
        "forward": case.in_channels // case.groups * taps,
        "backward_input": case.out_channels // case.groups * taps + 9,  # and the copies of an element
        "backward_weight": case.batch * case.out_h * case.out_w,
    }
    return Truth(compute(*doubles), compute(*(t.abs() for t in doubles)), terms[direction])


def accepts(row, case, mode, dtype, layouts):
    shape = conv2d_shape(case, dtype, *layouts, padding_mode=mode)
    with forced(row):
        try:
            _native.cpu.choose_conv2d(getattr(_native.Conv2dDirection, row.direction), shape, 1)
        except ValueError:
            return False
    return True


def run(row, case, mode, dtype, layouts, shift):
    """What a row makes of the case with a padding mode."""
    layout, weight_layout = layouts
    shape = conv2d_shape(case, dtype, layout, weight_layout, padding_mode=mode)
    input, weight, grad_output = operands_of(case, dtype)
    sizes = {"forward": case.output_size, "backward_input": case.input_size, "backward_weight": case.weight_size}
    result_layout = weight_layout if row.direction == "backward_weight" else layout
    result = empty(sizes[row.direction], dtype, result_layout, shift)
    placed = {
        "forward": (dense(input, layout, shift), dense(weight, weight_layout, shift), None),
        "backward_input": (dense(grad_output, layout, shift), dense(weight, weight_layout, shift)),
        "backward_weight": (dense(grad_output, layout, shift), dense(input, layout, shift)),
    }[row.direction]
    with forced(row):
        getattr(_native, f"conv2d_{row.direction}")(shape, *placed, result)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows(row, dtype):
    problems, ran = [], 0
    for (case, mode), layouts in itertools.product(CASES, [("nchw", "nchw"), ("nhwc", "nhwc")]):
        if not accepts(row, case, mode, dtype, layouts):
            continue
        ran += 1
        result = run(row, case, mode, dtype, layouts, shift=0)
        found = violation(result, truth_of(row.direction, case, mode, dtype))
        problems += [f"{case.name}, {mode}, {layouts[0]}: {found}"] if found else []
        if not torch.equal(run(row, case, mode, dtype, layouts, shift=1), result):
            problems.append(f"{case.name}, {mode}, {layouts[0]}: other bits at other addresses")
        torch.set_num_threads(3)
        if not torch.equal(run(row, case, mode, dtype, layouts, shift=0), result):
            problems.append(f"{case.name}, {mode}, {layouts[0]}: other bits on three threads")
        torch.set_num_threads(1)
    assert not problems, "\n".join(problems)
    takes = {
        "forward": ("_naive_", "_direct_", "_pixels_", *(["_short_sums_"] if dtype == torch.float32 else [])),
        "backward_input": ("_naive_", "_folded_"),
        "backward_weight": ("_naive_", "_taps_", "_padded_"),
    }[row.direction]
    assert (ran > 0) == any(name in row.name for name in takes), row.name


GEOMETRIES = [
    dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    for stride, padding, dilation, groups in [
        (1, 1, 1, 1),
        ((2, 1), (2, 1), 1, 2),
        (1, ((0, 2), (1, 0)), (2, 1), 1),
        (3, (3, 2), 1, 4),
        (1, "same", 1, 1),
    ]
]


def operands(groups=1, dtype=torch.float64, format=torch.contiguous_format, size=(6, 5)):
    sizes = [(2, 4, *size), (8, 4 // groups, 3, 2), (8,)]
    input, weight, bias = (torch.randn(size, dtype=dtype) for size in sizes)
    return [t.requires_grad_() for t in (input.contiguous(memory_format=format), weight, bias)]


def on_a_padded_input(mode, input, weight, bias, padding, **geometry):
    if padding == "same":
        padding = ((1, 1), (0, 1))
    elif not isinstance(padding, tuple) or not isinstance(padding[0], tuple):
        pair = (padding, padding) if isinstance(padding, int) else padding
        padding = tuple((p, p) for p in pair)
    return F.conv2d(F.pad(input, (*padding[1], *padding[0]), mode=mode), weight, bias, **geometry)


def results(function, tensors):
    """The output, its gradients and the gradients of their squares."""
    output = function(*tensors)
    grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
    return [output, *grads, *second]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(map(str, g.values())))
def test_values_and_gradients_are_those_of_a_padded_input(geometry, mode, format):
    tensors = operands(geometry["groups"], format=format)
    ours = results(lambda *t: C.conv2d(*t, **geometry, padding_mode=mode), tensors)
    wanted = results(lambda *t: on_a_padded_input(mode, *t, **geometry), tensors)
    for got, torchs in zip(ours, wanted, strict=True):
        tolerance = torch.finfo(torch.float64).eps * 2000 * torchs.abs().max().item()  # sums of sums of sums
        torch.testing.assert_close(got, torchs, rtol=0, atol=tolerance)
    assert ours[1].stride() == tensors[0].stride()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_both_orders(mode):
    tensors = operands(groups=2, size=(3, 4))
    function = lambda *t: C.conv2d(*t, stride=(2, 1), padding=(2, 1), groups=2, padding_mode=mode)  # noqa: E731
    assert gradcheck(function, tensors, nondet_tol=0)
    assert gradgradcheck(function, tensors, nondet_tol=0)


@pytest.mark.parametrize("mode", MODES)
def test_one_axis_and_what_is_fused(mode):
    input, weight, bias = (t.detach() for t in operands())
    wanted = F.conv1d(F.pad(input[:, :, 0], (2, 2), mode=mode), weight[:, :, 0], bias)
    torch.testing.assert_close(C.conv1d(input[:, :, 0], weight[:, :, 0], bias, padding=2, padding_mode=mode), wanted)
    plain = C.conv2d(input, weight, bias, padding=1, padding_mode=mode)
    assert torch.equal(C.conv2d(input, weight, bias, padding=1, padding_mode=mode, activation="relu"), plain.relu())
    pooled = C.conv2d_relu_max_pool2d(input, weight, bias, padding=1, padding_mode=mode)
    assert torch.equal(pooled, C.max_pool2d(plain.relu(), 2))
    assert torch.equal(C.conv2d(input[0], weight, bias, padding=1, padding_mode=mode), plain[0])
    assert torch.equal(C.conv2d(input[1:], weight, bias, padding=1, padding_mode=mode), plain[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_half_types(mode, dtype):
    tensors = [t.detach().to(dtype).requires_grad_() for t in operands()]
    output = C.conv2d(*tensors, padding=1, padding_mode=mode)
    grad = torch.randn_like(output)
    doubles = [t.detach().double() for t in tensors]

    def exact(tensors, grad):
        tensors = [t.requires_grad_() for t in tensors]
        wanted = on_a_padded_input(mode, *tensors, padding=1)
        return wanted, *torch.autograd.grad(wanted, tensors, grad)

    for got, wanted, terms in zip(
        (output, *torch.autograd.grad(output, tensors, grad)),
        exact(doubles, grad.double()),
        exact([t.detach().abs() for t in doubles], grad.double().abs()),
        strict=True,
    ):  # float32 sums, rounded once
        assert got.dtype == dtype
        assert torch.all((got.double() - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 2**-20 * terms)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_copied_into_a_padded_input(mode):
    """The layer runs one kernel forward, on the input itself."""
    layer, input = cnn_ext.Conv2d(4, 8, 3, padding=1, padding_mode=mode), torch.randn(1, 4, 8, 8)
    with torch.profiler.profile() as profile:
        layer(input)
    names = {event.name for event in profile.events()}
    assert "cnn_ext::conv2d_forward" in names
    assert not [name for name in names if "pad" in name or "copy" in name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d"])
def test_layers_are_torchs(name, mode):
    ours = getattr(cnn_ext, name)(4, 6, 3, padding=2, padding_mode=mode, stride=2)
    torchs = getattr(nn, name)(4, 6, 3, padding=2, padding_mode=mode, stride=2)
    torchs.load_state_dict(ours.state_dict())
    input = torch.randn((2, 4, 7, 8)[: 3 if name == "Conv1d" else 4], requires_grad=True)
    got, wanted = ours(input), torchs(input)
    torch.testing.assert_close(
        got, wanted, rtol=0, atol=37 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
    )
    grads = [torch.autograd.grad(y.square().sum(), input)[0] for y in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=600 * torch.finfo(torch.float32).eps * grads[1].abs().max().item())


@pytest.mark.parametrize(("mode", "padding"), [("reflect", 5), ("circular", 6), ("reflect", (0, 9))], ids=str)
def test_a_padding_that_the_mode_cannot_fill_is_refused(mode, padding):
    layer = cnn_ext.Conv2d(4, 6, 3, padding=padding, padding_mode=mode)
    input = torch.randn(1, 4, 5, 5)
    with pytest.raises(RuntimeError) as torchs:
        nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode)(input)
    with pytest.raises(RuntimeError, match="adding") as ours:
        layer(input)
    start = "Padding size should be less than the corresponding input dimension, but got: padding"
    words = start if mode == "reflect" else "Padding value causes wrapping around more than once"
    assert words in str(ours.value) and words in str(torchs.value)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"conv2d\(\) expected padding_mode to be one of zeros"):
        C.conv2d(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3), padding_mode="mirror")


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    geometry = ((1, 1), (1, 2, 0, 1), (1, 1), 2, False, mode)
    input, weight = torch.randn(2, 4, 6, 5), torch.randn(6, 2, 3, 2)
    operators = torch.ops.cnn_ext
    output = operators.conv2d_forward(input, weight, None, *geometry)
    torch.library.opcheck(operators.conv2d_forward.default, (input, weight, torch.randn(6), *geometry))
    arguments = (output, weight, list(input.shape), *geometry)
    torch.library.opcheck(operators.conv2d_backward_input.default, arguments)
    arguments = (output, input, list(weight.shape), *geometry[:4], False, *geometry[4:])
    torch.library.opcheck(operators.conv2d_backward_weight.default, arguments)


# What a device does whose kernels map no padding, CUDA: a padded copy, and a gradient that is folded.


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 0, 3), (2, 3, 3, 1)], ids=str)
def test_a_padded_copy_and_its_gradient(padding, mode, memory_format):
    input = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    top, bottom, left, right = padding
    wanted = F.pad(input, (left, right, top, bottom), mode=mode)
    result = pad(input.detach(), padding, mode, memory_format)
    assert torch.equal(result, wanted) and result.is_contiguous(memory_format=memory_format)
    grad = torch.randn_like(wanted)
    folded = fold(grad.clone(), padding, mode, memory_format)
    torch.testing.assert_close(folded, torch.autograd.grad(wanted, input, grad)[0])
    assert folded.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_without_mapping_kernels(mode, memory_format, monkeypatch):
    def results():
        tensors = [torch.linspace(-1, 1, 2 * 4 * 6 * 7), torch.linspace(-1, 1, 6 * 2 * 3 * 3), torch.ones(6)]
        sizes = (2, 4, 6, 7), (6, 2, 3, 3), (6,)
        tensors = [t.double().reshape(size).requires_grad_() for t, size in zip(tensors, sizes, strict=True)]
        tensors[0] = tensors[0].detach().contiguous(memory_format=memory_format).requires_grad_()
        layer = cnn_ext.Conv2d(4, 6, 3, stride=2, padding=2, groups=2, padding_mode=mode, dtype=torch.float64)
        layer.weight.data, layer.bias.data = tensors[1].data, tensors[2].data
        output = layer(tensors[0])
        return [output.detach(), *torch.autograd.grad(output.sin().sum(), [tensors[0], layer.weight, layer.bias])]

    mapped = results()
    monkeypatch.setattr(conv2d_operators, "pads_a_copy", lambda mode, tensor: mode != "zeros")
    for got, wanted in zip(results(), mapped, strict=True):
        torch.testing.assert_close(got, wanted)
        assert got.stride() == wanted.stride()
