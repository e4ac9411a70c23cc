"""The truth: every operator and every gradient in float64, independent of the kernels.

Convolutions are torch's own in float64 on an explicitly padded input. Poolings are written here, tap by tap, for
torch refuses some of what the kernels take (per-side padding, dilated averages); ``test_reference.py`` compares them
with torch wherever it agrees to run.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tests.support.cases import NO_GRADIENT, Conv2dCase, FusedCase, Pool2dCase


@dataclass(frozen=True)
class Truth:
    """A float64 value, the sum of its terms' magnitudes and the roundings a term meets: what a tolerance takes."""

    value: torch.Tensor
    magnitude: torch.Tensor
    roundings: int

    @functools.cached_property
    def tolerances(self) -> dict[torch.dtype, torch.Tensor]:
        """Those that were asked for (tolerances.py): a truth serves many rows."""
        return {}


def exact(value: torch.Tensor) -> Truth:
    """A truth that a kernel has to meet bit by bit, but for the sign of zero."""
    return Truth(value.double(), value.double().abs(), 0)


def _conv2d(case: Conv2dCase, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    top, bottom, left, right = case.padding
    if case.in_channels == 0:  # torch drops the output channels, too
        output = input.new_zeros(case.output_size)
        return output if bias is None else output + bias.reshape(1, -1, 1, 1)
    return F.conv2d(F.pad(input, (left, right, top, bottom)), weight, bias, case.stride, 0, case.dilation, case.groups)


def _with_magnitude(function: Callable[..., torch.Tensor], *operands: torch.Tensor | None, roundings: int) -> Truth:
    """The truth of a sum of products of ``operands``: its magnitude is the same function of their absolute values."""
    doubles = [None if t is None else t.double() for t in operands]
    return Truth(function(*doubles), function(*[None if t is None else t.abs() for t in doubles]), roundings)


def _gradient(
    function: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, ...], grad_output: torch.Tensor
) -> torch.Tensor:
    """The gradient of a linear ``function`` of one tensor of ``size``."""
    at = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    output = function(at)
    if not output.requires_grad or output.numel() == 0:
        return torch.zeros(size, dtype=torch.float64)
    return torch.autograd.grad(output, at, grad_output)[0]


def conv2d_forward(case: Conv2dCase, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Truth:
    """output [N, K, OH, OW]"""
    taps = case.weight_size[1] * case.kernel_h * case.kernel_w
    roundings = taps + (taps > 0 and bias is not None)  # a bias alone is copied
    return _with_magnitude(lambda x, w, b: _conv2d(case, x, w, b), input, weight, bias, roundings=roundings)


def conv2d_backward_input(case: Conv2dCase, grad_output: torch.Tensor, weight: torch.Tensor) -> Truth:
    """grad_input [N, C, H, W]"""
    taps = case.out_channels // case.groups * case.kernel_h * case.kernel_w
    return _with_magnitude(
        lambda g, w: _gradient(lambda x: _conv2d(case, x, w, None), case.input_size, g),
        grad_output,
        weight,
        roundings=taps,
    )


def conv2d_backward_weight(case: Conv2dCase, grad_output: torch.Tensor, input: torch.Tensor) -> Truth:
    """grad_weight [K, C / groups, R, S]"""
    pixels = case.batch * case.out_h * case.out_w
    return _with_magnitude(
        lambda g, x: _gradient(lambda w: _conv2d(case, x, w, None), case.weight_size, g),
        grad_output,
        input,
        roundings=pixels,
    )


def conv2d_backward_bias(case: Conv2dCase, grad_output: torch.Tensor) -> Truth:
    """grad_bias [K]"""
    pixels = case.batch * case.out_h * case.out_w
    return _with_magnitude(lambda g: g.sum((0, 2, 3)), grad_output, roundings=max(pixels - 1, 0))


def _positions(size: int, out: int, kernel: int, stride: int, before: int, dilation: int) -> torch.Tensor:
    """The input position that output o reads through tap t, inside the input or not: [kernel, out]."""
    return torch.arange(out)[None] * stride - before + torch.arange(kernel)[:, None] * dilation


def _windows(case: Pool2dCase, plane: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each window sees of ``plane`` [..., H, W]: [..., R * S, OH, OW], and its taps inside: [R * S, OH, OW]."""
    rows = _positions(case.in_h, case.out_h, case.kernel_h, case.stride_h, case.pad_top, case.dilation_h)
    columns = _positions(case.in_w, case.out_w, case.kernel_w, case.stride_w, case.pad_left, case.dilation_w)
    rows_inside, columns_inside = (rows >= 0) & (rows < case.in_h), (columns >= 0) & (columns < case.in_w)
    inside = rows_inside[:, None, :, None] & columns_inside[None, :, None, :]
    flat = (
        rows.clamp(0, case.in_h - 1)[:, None, :, None] * case.in_w + columns.clamp(0, case.in_w - 1)[None, :, None, :]
    )
    return plane.flatten(-2)[..., flat.flatten(0, 1)], inside.flatten(0, 1)


def _scatter(case: Pool2dCase, shares: torch.Tensor) -> torch.Tensor:
    """Adds ``shares`` [N, C, R * S, OH, OW] to the input positions of their taps: [N, C, H, W]."""
    number, inside = _windows(case, torch.arange(case.in_h * case.in_w).reshape(case.in_h, case.in_w))
    planes = torch.zeros(*case.input_size[:2], case.in_h * case.in_w, dtype=shares.dtype)
    planes.index_add_(2, number.flatten(), torch.where(inside, shares, 0.0).flatten(2))
    return planes.reshape(case.input_size)


def max_pool2d_forward(case: Pool2dCase, input: torch.Tensor) -> tuple[Truth, torch.Tensor]:
    """output and int64 offsets [N, C, OH, OW]: the first of equals, the last of NaNs; an empty window is -inf, at 0."""
    window, inside = _windows(case, input.double())
    best = torch.full(case.output_size, -torch.inf, dtype=torch.float64)
    offset = torch.full(case.output_size, -1)
    for tap in range(case.kernel_h * case.kernel_w):
        value = window[:, :, tap]
        takes = inside[tap] & ((offset < 0) | (value > best) | value.isnan())
        best, offset = torch.where(takes, value, best), torch.where(takes, tap, offset)
    return exact(best), offset.clamp(min=0)


def _chosen_taps(case: Pool2dCase, offsets: torch.Tensor) -> torch.Tensor:
    """A mask [N, C, R * S, OH, OW] of the tap that each offset names."""
    return torch.arange(case.kernel_h * case.kernel_w).reshape(-1, 1, 1) == offsets.long().unsqueeze(2)


def max_pool2d_backward(case: Pool2dCase, grad_output: torch.Tensor, offsets: torch.Tensor) -> Truth:
    """grad_input [N, C, H, W]"""
    chosen = _chosen_taps(case, offsets)
    overlap = -(-case.kernel_h // case.stride_h) * -(
        -case.kernel_w // case.stride_w
    )  # windows over one position, at most
    scatter = lambda g: _scatter(case, torch.where(chosen, g.unsqueeze(2), 0.0))  # noqa: E731
    return _with_magnitude(scatter, grad_output, roundings=overlap - 1)


def max_pool2d_gather(case: Pool2dCase, input: torch.Tensor, offsets: torch.Tensor) -> Truth:
    """output [N, C, OH, OW]: the element that each offset names; 0 where that is outside the input."""
    window, inside = _windows(case, input.double())
    return exact(torch.where(_chosen_taps(case, offsets) & inside, window, 0.0).sum(2))


def average_divisor(case: Pool2dCase) -> torch.Tensor:
    """[OH, OW]: the override, else the taps inside the padded input (``count_include_pad``) or the input; 0: empty."""
    inside = _windows(case, torch.zeros(case.in_h, case.in_w))[1].sum(0)
    if case.divisor_override != 0:
        divisor = torch.full_like(inside, case.divisor_override)
    elif case.count_include_pad:
        rows = _positions(case.in_h, case.out_h, case.kernel_h, case.stride_h, case.pad_top, case.dilation_h)
        columns = _positions(case.in_w, case.out_w, case.kernel_w, case.stride_w, case.pad_left, case.dilation_w)
        in_rows, in_columns = rows < case.in_h + case.pad_bottom, columns < case.in_w + case.pad_right
        divisor = in_rows.sum(0)[:, None] * in_columns.sum(0)[None, :]
    else:
        divisor = inside
    return torch.where(inside > 0, divisor, 0)


def avg_pool2d_forward(case: Pool2dCase, input: torch.Tensor) -> Truth:
    """output [N, C, OH, OW]; 0 for an empty window"""
    divisor = average_divisor(case)
    scale = torch.where(divisor == 0, 0.0, 1.0 / divisor.double())

    def average(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        window, inside = _windows(case, x)
        return torch.where(inside, window, 0.0).sum(2) * scale

    return _with_magnitude(average, input, scale, roundings=case.kernel_h * case.kernel_w + 1)


def avg_pool2d_backward(case: Pool2dCase, grad_output: torch.Tensor) -> Truth:
    """grad_input [N, C, H, W]"""
    divisor = average_divisor(case)
    scale = torch.where(divisor == 0, 0.0, 1.0 / divisor.double())
    taps = case.kernel_h * case.kernel_w

    def share(g: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return _scatter(case, (g * scale).unsqueeze(2).expand(-1, -1, taps, -1, -1))

    return _with_magnitude(share, grad_output, scale, roundings=taps + 1)


def fused_forward(case: FusedCase, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Truth:
    """output [N, K, PH, PW]"""
    conv = conv2d_forward(case.conv, input, weight, bias)
    value, magnitude = (max_pool2d_forward(case.pool, t)[0].value for t in (conv.value.relu(), conv.magnitude))
    return Truth(value, magnitude, conv.roundings)


def fused_gradient(case: FusedCase, grad_output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The gradient of the convolution's output [N, K, OH, OW]: zero where the mask passes none."""
    if not case.has_pooling:
        return torch.where(mask <= 0, 0.0, grad_output.double())
    passed = torch.where(mask == NO_GRADIENT, 0.0, grad_output.double())
    return max_pool2d_backward(case.pool, passed, mask.long() % NO_GRADIENT).value


def fused_backward(case: FusedCase, direction: str, grad_output: torch.Tensor, mask: torch.Tensor, other) -> Truth:
    """The convolution's ``direction`` of that gradient, with the ``other`` operand that it reads (None for the bias).

    The windows that name an element may be added up first, each sum being rounded.
    """
    operands = () if direction == "backward_bias" else (other,)
    backward = {
        "backward_input": conv2d_backward_input,
        "backward_weight": conv2d_backward_weight,
        "backward_bias": conv2d_backward_bias,
    }[direction]
    value = backward(case.conv, fused_gradient(case, grad_output, mask), *operands).value
    sums = backward(case.conv, fused_gradient(case, grad_output.abs(), mask), *operands)
    return Truth(value, sums.magnitude, sums.roundings + (-(-case.window // case.stride)) ** 2 - 1)
