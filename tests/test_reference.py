"""The truth itself: our float64 poolings against torch wherever torch accepts the arguments, and the case list against
the tile."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import reference
from tests.support.cases import Pool2dCase, conv2d_cases, pool2d_cases
from tests.support.tolerances import violation

pytestmark = pytest.mark.usefixtures("one_thread")


def symmetric(case: Pool2dCase) -> tuple[int, int] | None:
    """The padding as torch wants it, or None where torch would refuse it."""
    top, bottom, left, right = case.padding
    fits = top <= case.kernel_h // 2 and left <= case.kernel_w // 2
    return (top, left) if (top, left) == (bottom, right) and fits else None


TORCH_CASES = [case for case in pool2d_cases() if symmetric(case)]


@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_max_pool2d_truth_is_torch(case):
    data = case.tensors(torch.float64)
    input = data.input.requires_grad_()
    output, indices = F.max_pool2d(
        input, case.kernel_size, case.stride, symmetric(case), case.dilation, bool(case.ceil_mode), return_indices=True
    )
    truth, offsets = reference.max_pool2d_forward(case, input.detach())
    assert torch.equal(output, truth.value)
    number = (
        torch.arange(case.in_h * case.in_w, dtype=torch.float64)
        .reshape(1, 1, case.in_h, case.in_w)
        .expand(case.input_size)
    )
    assert torch.equal(indices.double(), reference.max_pool2d_gather(case, number, offsets).value)
    (grad_input,) = torch.autograd.grad(output, input, data.grad_output)
    assert violation(grad_input, reference.max_pool2d_backward(case, data.grad_output, offsets)) is None


@pytest.mark.parametrize("case", [case for case in TORCH_CASES if case.dilation == (1, 1)], ids=str)
def test_avg_pool2d_truth_is_torch(case):
    data = case.tensors(torch.float64)
    input = data.input.requires_grad_()
    arguments = bool(case.ceil_mode), bool(case.count_include_pad), case.divisor_override or None
    output = F.avg_pool2d(input, case.kernel_size, case.stride, symmetric(case), *arguments)
    assert violation(output.detach(), reference.avg_pool2d_forward(case, input.detach())) is None
    (grad_input,) = torch.autograd.grad(output, input, data.grad_output)
    assert violation(grad_input, reference.avg_pool2d_backward(case, data.grad_output)) is None


def test_tolerance_sees_one_wrong_bit_of_a_copy_and_one_missing_tap():
    case = next(case for case in conv2d_cases() if case.name == "resnet_3x3")
    data = case.tensors(torch.float32)
    truth = reference.conv2d_forward(case, data.input, data.weight, data.bias)
    assert violation(truth.value.float(), truth) is None
    data.weight[:, 0, 2, 2] = 0
    assert (
        violation(reference.conv2d_forward(case, data.input, data.weight, data.bias).value.float(), truth) is not None
    )
    copy = reference.exact(data.input)
    assert violation(data.input, copy) is None
    assert violation(torch.nextafter(data.input, torch.tensor(9.0)), copy) is not None


def test_the_list_touches_every_edge_of_the_tile():
    widths = {case.out_w for case in conv2d_cases()}
    channels = {case.out_channels for case in conv2d_cases()}
    assert {1, 5, 6, 7, 13, 14, 15} <= widths
    assert {edge + step for edge in (4, 8, 16, 32) for step in (-1, 0, 1)} <= channels
    assert any(case.batch == 0 for case in conv2d_cases()) and any(case.batch == 0 for case in pool2d_cases())
    assert any(case.in_channels == 0 for case in conv2d_cases())
    assert any(case.groups == case.in_channels > 1 and case.out_channels > case.in_channels for case in conv2d_cases())
    assert any(case.stride_h > 1 and case.dilation_h > 1 for case in conv2d_cases())
    assert any(case.stride_h > case.kernel_h for case in conv2d_cases())
    assert {256, 257} <= {case.kernel_h * case.kernel_w for case in pool2d_cases()}
