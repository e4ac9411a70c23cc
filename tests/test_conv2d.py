"""conv2d and all its gradients: the shared cases against the float64 truth, layouts and strides against torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import cnn_ext
import cnn_ext.functional as C
from cnn_ext.ops.taps import nearest_taps
from tests.support import reference
from tests.support.cases import Conv2dCase, conv2d_cases
from tests.support.tolerances import assert_close

FORMATS = [torch.contiguous_format, torch.channels_last]


def per_side(case: Conv2dCase):
    return (case.pad_top, case.pad_bottom), (case.pad_left, case.pad_right)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in conv2d_cases() if min(case.padding) >= 0], ids=str)
def test_forward_and_gradients(case, dtype):
    t = case.tensors(dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (t.input, t.weight, t.bias)]
    output = C.conv2d(*leaves, case.stride, per_side(case), case.dilation, case.groups)
    grads = torch.autograd.grad(output, leaves, t.grad_output)
    assert_close(output.detach(), reference.conv2d_forward(case, t.input, t.weight, t.bias), "output")
    assert_close(grads[0], reference.conv2d_backward_input(case, t.grad_output, t.weight), "grad_input")
    assert_close(grads[1], reference.conv2d_backward_weight(case, t.grad_output, t.input), "grad_weight")
    assert_close(grads[2], reference.conv2d_backward_bias(case, t.grad_output), "grad_bias")


def forward_and_gradients(conv2d, input, weight, bias, grad_output, **arguments):
    leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    output = conv2d(*leaves, **arguments)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def problem(dtype=torch.float64, *, groups=1):
    input, weight, bias = (torch.randn(size, dtype=dtype) for size in [(2, 4, 9, 8), (6, 4 // groups, 3, 2), (6,)])
    return input, weight, bias, torch.randn(2, 6, 7, 7, dtype=dtype)


@pytest.mark.parametrize(("input_format", "weight_format"), list(itertools.product(FORMATS, FORMATS)))
@pytest.mark.parametrize("groups", [1, 2])
def test_layouts_are_torchs(input_format, weight_format, groups):
    input, weight, bias, grad_output = problem(groups=groups)
    operands = input.contiguous(memory_format=input_format), weight.contiguous(memory_format=weight_format), bias
    ours = forward_and_gradients(C.conv2d, *operands, grad_output, groups=groups)
    torchs = forward_and_gradients(F.conv2d, *operands, grad_output, groups=groups)
    for got, wanted in zip(ours[:2], torchs[:2], strict=True):
        assert got.stride() == wanted.stride()
    assert ours[2].stride() == operands[1].stride()  # the buckets of data-parallel training need the weight's


@pytest.mark.parametrize("size", [(2, 1, 5, 5), (2, 3, 1, 1), (1, 3, 5, 5), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_ambiguous_layouts_are_torchs(size, format):
    input = torch.randn(size).to(memory_format=format)
    for kernel in (1, 3):
        weight = torch.randn(4, size[1], kernel, kernel)
        assert C.conv2d(input, weight, padding=1).stride() == F.conv2d(input, weight, padding=1).stride()


VIEWS = {
    "expanded": lambda t: t[:1, :1].expand_as(t),
    "stepped": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "offset": lambda t: torch.cat([t, t])[t.shape[0] :],
    "channel slice of channels_last": lambda t: t.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[
        :, ::2
    ],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("position", [0, 1, 3], ids=["input", "weight", "grad_output"])
def test_views_give_the_bits_of_their_copies(view, position):
    operands = list(problem(torch.float32))
    operands[position] = VIEWS[view](operands[position])
    copies = list(operands)
    copies[position] = operands[position].clone()  # keeps the layout where that is dense
    format = torch.channels_last if "channels_last" in view else torch.contiguous_format
    copies[position] = operands[position].clone(memory_format=format)
    for got, wanted in zip(
        forward_and_gradients(C.conv2d, *operands), forward_and_gradients(C.conv2d, *copies), strict=True
    ):
        assert torch.equal(got, wanted)


def test_a_sum_hands_an_expanded_gradient_back():
    input, weight, bias, _ = problem()
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    ours = torch.autograd.grad(C.conv2d(*leaves).sum(), leaves)
    ones = torch.ones(2, 6, 7, 7, dtype=torch.float64)
    for got, wanted in zip(ours, torch.autograd.grad(C.conv2d(*leaves), leaves, ones), strict=True):
        assert torch.equal(got, wanted)


def test_without_batch():
    input, weight, bias, _ = problem()
    assert torch.equal(C.conv2d(input[0], weight, bias), C.conv2d(input[:1], weight, bias)[0])


def test_without_bias():
    input, weight, bias, _ = problem()
    assert torch.equal(C.conv2d(input, weight), C.conv2d(input, weight, torch.zeros_like(bias)))


def test_empty_batch_has_zero_gradients():
    input, weight, bias, grad_output = problem()
    output, *grads = forward_and_gradients(C.conv2d, input[:0], weight, bias, grad_output[:0])
    assert output.shape == (0, 6, 7, 7)
    assert [g.shape for g in grads] == [(0, 4, 9, 8), weight.shape, bias.shape]
    assert not any(g.any() for g in grads)


def test_without_input_channels_the_bias_is_left():
    bias = torch.randn(6)
    output = C.conv2d(torch.empty(2, 0, 5, 5), torch.empty(6, 0, 3, 3), bias)
    assert torch.equal(output, bias.view(1, -1, 1, 1).expand(2, 6, 3, 3))
    assert not C.conv2d(torch.empty(2, 0, 5, 5), torch.empty(6, 0, 3, 3)).any()


def same_upper(size, kernel, stride, dilation):
    """TensorFlow's formula."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (4, 5)], ids=str)
@pytest.mark.parametrize("word", ["same", "same_lower", "valid", "full"])
def test_padding_words(word, kernel, dilation, stride):
    input, weight = torch.randn(1, 2, 11, 10, dtype=torch.float64), torch.randn(3, 2, *kernel, dtype=torch.float64)
    strides = (stride, stride) if isinstance(stride, int) else stride
    sides = []
    for size, k, s in zip(input.shape[2:], kernel, strides, strict=True):
        before, after = same_upper(size, k, s, dilation)
        whole = dilation * (k - 1)
        sides.append(
            {"same": (before, after), "same_lower": (after, before), "valid": (0, 0), "full": (whole, whole)}[word]
        )
    padded = F.pad(input, (*sides[1], *sides[0]))
    if min(p - dilation * (k - 1) for p, k in zip(padded.shape[2:], kernel, strict=True)) < 1:
        with pytest.raises(RuntimeError):
            C.conv2d(input, weight, None, stride, word, dilation)
        return
    got = C.conv2d(input, weight, stride=stride, padding=word, dilation=dilation)
    wanted = F.conv2d(padded, weight, stride=stride, dilation=dilation)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2 * kernel[0] * kernel[1] * torch.finfo(torch.float64).eps * 9)
    if word == "same":
        assert got.shape[2:] == tuple(-(-n // s) for n, s in zip(input.shape[2:], strides, strict=True))
    if word in ("same", "valid") and strides == (1, 1):
        assert got.shape == F.conv2d(input, weight, padding=word, dilation=dilation).shape


def test_integers_of_other_kinds_are_arguments():
    import numpy

    input, weight, *_ = problem()
    wanted = C.conv2d(input, weight, stride=2, padding=1)
    assert torch.equal(C.conv2d(input, weight, stride=numpy.int64(2), padding=torch.tensor(1)), wanted)
    assert torch.equal(C.conv2d(input, weight, stride=[2], padding=[1, 1]), wanted)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dilation", [(3000, 3000), (1, 200_000_000), (2**40, 1)], ids=str)
def test_taps_far_apart(dilation, format):
    """All of them but one, or one row or column, lie in the padding."""
    input, weight = (torch.randn(size).contiguous(memory_format=format) for size in [(1, 16, 6, 5), (16, 16, 3, 3)])
    bias, grad_output = torch.randn(16), torch.randn(1, 16, 6, 5)
    arguments = {"padding": dilation, "dilation": dilation}
    ours = forward_and_gradients(C.conv2d, input, weight, bias, grad_output, **arguments)
    near = (..., *(slice(None) if step == 1 else slice(1, 2) for step in dilation))  # the taps that meet the input
    padding = [1 if step == 1 else 0 for step in dilation]
    wanted = forward_and_gradients(F.conv2d, input, weight[near], bias, grad_output, padding=padding)
    assert ours[2].count_nonzero() == ours[2][near].count_nonzero()
    ours[2] = ours[2][near]
    for got, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_taps_brought_near_meet_the_same_inputs():
    def met(size, outputs, kernel, stride, before, dilation):
        positions = ((o, r, o * stride - before + r * dilation) for o in range(outputs) for r in range(kernel))
        return [(output, tap, at) for output, tap, at in positions if 0 <= at < size]

    for axis in itertools.product([1, 4], [1, 3], [2, 3, 4], [1, 2, 9], [0, 1, 5, 30, 31, 60, 100], [20, 30, 31]):
        *others, dilation = axis
        near_before, near_dilation = nearest_taps(*axis)
        assert near_dilation <= dilation and near_before >= 0, axis
        assert met(*others[:-1], near_before, near_dilation) == met(*axis), axis


def test_windows_that_no_row_can_stage_are_left_to_the_naive_one():
    input, weight = torch.empty(1, 16, 4000, 4000), torch.empty(16, 16, 3, 3)
    for direction in ("forward", "backward_input"):
        far = cnn_ext.explain(input, weight, padding=6000, dilation=6000, direction=direction)
        near = cnn_ext.explain(input, weight, padding=300, dilation=300, direction=direction)
        assert "naive" in far.kernel and "naive" not in near.kernel
