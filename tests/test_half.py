"""float16 and bfloat16: float32 arithmetic, rounded once to nearest even; infinities where a half ends, NaNs kept.

``test_kernels.py`` and ``test_bits.py`` run every row with both types as well; here is what only the types show.
"""

import pytest
import torch

import cnn_ext.functional as C
from tests.support.rows import HALF_DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(params=HALF_DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=FORMATS, ids=str)
def memory_format(request: pytest.FixtureRequest) -> torch.memory_format:
    return request.param


def every_half(dtype: torch.dtype, memory_format: torch.memory_format) -> torch.Tensor:
    """All 65536 values, [4, 16, 32, 32]."""
    halves = torch.arange(65536).to(torch.uint16).view(dtype).reshape(4, 16, 32, 32)
    return halves.contiguous(memory_format=memory_format)


def assert_equal(result: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(result, wanted.expand_as(result), rtol=0, atol=0, equal_nan=True)


def test_every_half_passes_unchanged(dtype, memory_format):
    halves = every_half(dtype, memory_format)
    weight = torch.ones(16, 1, 1, 1, dtype=dtype)
    assert_equal(C.conv2d(halves, weight, groups=16), halves)
    assert_equal(C.avg_pool2d(halves, 1), halves)
    assert_equal(C.max_pool2d(halves, 1), halves)


@pytest.mark.parametrize("other", [2.0**-9, 3 * 2.0**-12, -1.0, 2.0**-24, 40000.0])
def test_sums_are_rounded_to_nearest_even_like_torchs_conversion(dtype, memory_format, other):
    """A product with one and one addition in float32, then torch's own rounding, which is to nearest even."""
    halves = every_half(dtype, memory_format)
    bias = torch.full((16,), other, dtype=dtype)
    for groups in (16, 1):
        if groups == 1:  # zeros meet the values of other channels
            halves = halves.nan_to_num(0, 0, 0)
        weight = torch.eye(16).reshape(16, 16, 1, 1) if groups == 1 else torch.ones(16, 1, 1, 1)
        wanted = (halves.float() + bias.float().reshape(1, -1, 1, 1)).to(dtype)
        assert_equal(C.conv2d(halves, weight.to(dtype), bias, groups=groups), wanted)


def test_the_bias_gradient_of_1600_ones_is_1600(dtype, memory_format):
    """Where a sum in bfloat16 would end at 256."""
    bias = torch.zeros(3, dtype=dtype, requires_grad=True)
    x = torch.randn(4, 2, 20, 20).to(dtype).contiguous(memory_format=memory_format)
    C.conv2d(x, torch.randn(3, 2, 1, 1).to(dtype), bias).sum().backward()
    assert_equal(bias.grad, torch.tensor(1600.0, dtype=dtype))


def test_an_average_may_have_a_sum_beyond_the_halves(memory_format):
    """4096 * 30000 is 1800 times the largest float16."""
    x = torch.full((1, 3, 64, 64), 30000.0, dtype=torch.float16).contiguous(memory_format=memory_format)
    assert_equal(C.avg_pool2d(x, 64), x[:, :1, :1, :1])


@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_too_large_becomes_infinite(memory_format, kernel):
    x = torch.full((1, 32, 8, 8), 300.0, dtype=torch.float16).contiguous(memory_format=memory_format)
    w = torch.full((32, 32, kernel, kernel), 300.0, dtype=torch.float16)
    for sign in (1, -1):
        assert_equal(C.conv2d(x, sign * w), torch.tensor(sign * torch.inf, dtype=torch.float16))


def test_a_long_sum_is_kept_in_float32(dtype, memory_format):
    """4608 products of one: a sum in a half stops at 2048 (float16) or 256 (bfloat16)."""
    x = torch.ones(1, 512, 3, 3, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.ones(8, 512, 3, 3, dtype=dtype, requires_grad=True)
    output = C.conv2d(x, w)
    assert_equal(output, torch.tensor(4608.0).to(dtype))
    output.sum().backward()
    assert_equal(x.grad, torch.tensor(8.0).to(dtype))
    assert_equal(w.grad, torch.tensor(1.0).to(dtype))


def test_gradients_of_overlapping_windows_are_added_in_float32(dtype, memory_format):
    """One element that 25 windows see: gradients of 1 + 2^-7 add up to 25.1953125 and are rounded once."""
    x = torch.zeros(1, 16, 9, 9, dtype=dtype).contiguous(memory_format=memory_format)
    x[:, :, 4, 4] = 1
    x.requires_grad_()
    grad_output = torch.full((1, 16, 5, 5), 1 + 2.0**-7, dtype=dtype)
    (grad,) = torch.autograd.grad(C.max_pool2d(x, 5, 1), x, grad_output)
    assert_equal(grad[:, :, 4, 4], torch.tensor(25 * (1 + 2.0**-7)).to(dtype))


@pytest.mark.parametrize("channels", [32, 12])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_image_that_is_not_finite_leaves_the_bits_of_the_others(dtype, memory_format, value, channels):
    """Where products are of parts of a half, or reach beyond the taps, an infinity makes NaNs: its image is
    computed again, alone."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, 9, 9, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    w = torch.randn(channels, channels, 3, 3, generator=generator).to(dtype)
    spoiled = x.clone()
    spoiled[1, 5, 4, 4] = value
    output = C.conv2d(spoiled, w, padding=1)
    assert_equal(output[[0, 2]], C.conv2d(x, w, padding=1)[[0, 2]])
    wanted = torch.nn.functional.conv2d(spoiled[1:2].double(), w.double(), padding=1)
    assert_equal(output[1:2].isnan(), wanted.isnan())
    assert_equal(output[1:2].isinf(), wanted.isinf())
    (grad,) = torch.autograd.grad(C.conv2d(x.requires_grad_(), w, padding=1), x, spoiled.detach())
    (clean,) = torch.autograd.grad(C.conv2d(x, w, padding=1), x, x.detach())
    assert_equal(grad[[0, 2]], clean[[0, 2]])
    assert_equal(grad[1].isfinite(), (wanted.isfinite())[0])
