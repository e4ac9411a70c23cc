"""Max and average pooling, gradients and indices: the shared cases against the truth, the rest against torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import cnn_ext.functional as C
from tests.support import reference
from tests.support.cases import Pool2dCase, pool2d_cases
from tests.support.tolerances import assert_close

FORMATS = [torch.contiguous_format, torch.channels_last]


def per_side(case: Pool2dCase):
    return (case.pad_top, case.pad_bottom), (case.pad_left, case.pad_right)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", pool2d_cases(), ids=str)
def test_max_pool2d(case, dtype):
    t = case.tensors(dtype)
    input = t.input.clone().requires_grad_()
    window = (case.kernel_size, case.stride, per_side(case), case.dilation, bool(case.ceil_mode))
    output = C.max_pool2d(input, *window)
    (grad_input,) = torch.autograd.grad(output, input, t.grad_output)
    wanted, offsets = reference.max_pool2d_forward(case, t.input)
    assert_close(output.detach(), wanted, "output")
    assert_close(grad_input, reference.max_pool2d_backward(case, t.grad_output, offsets), "grad_input")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", pool2d_cases(), ids=str)
def test_avg_pool2d(case, dtype):
    t = case.tensors(dtype)
    input = t.input.clone().requires_grad_()
    output = C.avg_pool2d(
        input,
        case.kernel_size,
        case.stride,
        per_side(case),
        bool(case.ceil_mode),
        bool(case.count_include_pad),
        case.divisor_override or None,
        dilation=case.dilation,
    )
    (grad_input,) = torch.autograd.grad(output, input, t.grad_output)
    assert_close(output.detach(), reference.avg_pool2d_forward(case, t.input), "output")
    assert_close(grad_input, reference.avg_pool2d_backward(case, t.grad_output), "grad_input")


WINDOWS = [(2, None, 0), (3, 2, 1), ((3, 2), (1, 2), (1, 0)), (5, 3, 2), (1, 2, 0)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_layouts_and_indices_are_torchs(window, ceil_mode, format):
    input = torch.randn(2, 3, 9, 10).round(decimals=1).contiguous(memory_format=format)
    input[0, 0, 2, 3] = input[0, 0, 3, 3] = torch.nan
    input[0, 1] = -torch.inf
    for dilation in (1, 2):
        kernel_size, stride, padding = window
        got = C.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)
        wanted = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)
        for ours, torchs in zip(got, wanted, strict=True):
            assert torch.equal(ours.nan_to_num(7.0), torchs.nan_to_num(7.0))
            assert (ours.dtype, ours.stride()) == (torchs.dtype, torchs.stride())
    averages = (pool(input, *window, ceil_mode) for pool in (C.avg_pool2d, F.avg_pool2d))
    ours, torchs = averages
    assert ours.stride() == torchs.stride()


@pytest.mark.parametrize("pool", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("grad", ["expanded", "channels_last", "stepped"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_any_layout(pool, grad, format):
    input = torch.randn(2, 3, 8, 8).contiguous(memory_format=format).requires_grad_()
    output = getattr(C, pool)(input, 3, 2, 1)
    grad_output = {
        "expanded": torch.ones(()).expand_as(output),
        "channels_last": torch.randn_like(output).contiguous(memory_format=torch.channels_last),
        "stepped": torch.randn(2, 3, 4, 8)[..., ::2],
    }[grad]
    (got,) = torch.autograd.grad(output, input, grad_output, retain_graph=True)
    (wanted,) = torch.autograd.grad(output, input, grad_output.contiguous())
    assert torch.equal(got, wanted)
    assert got.stride() == input.stride()


@pytest.mark.parametrize("pool", ["max_pool2d", "avg_pool2d"])
def test_without_batch_and_with_an_empty_one(pool):
    ours, torchs = getattr(C, pool), getattr(F, pool)
    input = torch.randn(2, 3, 8, 8)
    assert torch.equal(ours(input[0], 2), ours(input, 2)[0])
    assert ours(input[:0], 2).shape == torchs(input[:0], 2).shape == (0, 3, 4, 4)
    leaf = input[:0].clone().requires_grad_()
    assert torch.autograd.grad(ours(leaf, 2).sum(), leaf)[0].shape == leaf.shape


def test_indices_without_batch_have_no_gradient():
    input = torch.randn(3, 8, 8, requires_grad=True)
    output, indices = C.max_pool2d(input, 2, return_indices=True)
    wanted = F.max_pool2d(input, 2, return_indices=True)[1]
    assert torch.equal(indices, wanted)
    assert output.requires_grad and not indices.requires_grad


def test_windows_of_more_than_256_taps():
    input = torch.randn(1, 2, 40, 40, requires_grad=True)
    output, indices = C.max_pool2d(input, 17, 3, return_indices=True)
    wanted, wanted_indices = F.max_pool2d(input, 17, 3, return_indices=True)
    assert torch.equal(output, wanted) and torch.equal(indices, wanted_indices)
    grads = [torch.autograd.grad(y.square().sum(), input)[0] for y in (output, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=36 * torch.finfo(torch.float32).eps * grads[1].abs().max().item())


def test_padding_up_to_half_the_dilated_window():
    input = torch.randn(1, 1, 7, 7)
    with pytest.raises(RuntimeError):
        F.max_pool2d(input, 3, 1, 2, 2)
    padded = F.pad(input, (2, 2, 2, 2), value=-torch.inf)
    assert torch.equal(C.max_pool2d(input, 3, 1, 2, 2), F.max_pool2d(padded, 3, 1, 0, 2))


@pytest.mark.parametrize(("word", "stride"), list(itertools.product(["same", "same_lower"], [1, 2, 3])))
def test_same_padding(word, stride):
    input = torch.randn(1, 2, 10, 11)
    output = C.max_pool2d(input, 3, stride, word)
    assert output.shape[2:] == tuple(-(-n // stride) for n in input.shape[2:])
    sides = []
    for size in input.shape[2:]:
        total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
        sides.append((total // 2, total - total // 2)[:: 1 if word == "same" else -1])
    padded = F.pad(input, (*sides[1], *sides[0]), value=-torch.inf)
    assert torch.equal(output, F.max_pool2d(padded, 3, stride))
    assert torch.equal(C.max_pool2d(input, 3, stride, tuple(sides)), output)
    inside = C.avg_pool2d(torch.ones_like(input), 3, stride, word, count_include_pad=False)
    assert torch.equal(inside, torch.ones_like(inside))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_average_of_an_empty_window_has_no_sign(memory_format):
    input = torch.ones(1, 5, 1, 4).to(memory_format=memory_format)
    padding = ((2, 1), (1, 1))
    average = C.avg_pool2d(input, 2, 1, padding, dilation=(3, 1), divisor_override=-3)
    empty = average == 0
    assert empty.any() and not torch.signbit(average[empty]).any()
