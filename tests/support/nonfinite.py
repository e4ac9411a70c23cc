"""The truth of convolutions whose operands hold infinities and NaNs: every tap inside multiplies, also zero times
infinity, and none outside.

torch's float64 convolution multiplies the padding too, which turns an infinite weight into NaN, so the sum is
written out here, tap by tap.
"""

import torch

from tests.support.cases import Conv2dCase
from tests.support.reference import Truth


def conv2d(case: Conv2dCase, direction: str, **operands: torch.Tensor) -> Truth:
    """The truth of ``direction`` for the two tensors that it reads; the magnitude holds where the value is finite."""
    magnitudes = {name: t.double().abs().nan_to_num(0.0, 0.0, 0.0) for name, t in operands.items()}
    value = _by_taps(case, direction, **{name: t.double() for name, t in operands.items()})
    return Truth(value, _by_taps(case, direction, **magnitudes), max(case.multiplications, 1))


def _outputs_and_inputs(size: int, out: int, tap: int, stride: int, before: int, dilation: int) -> tuple[slice, slice]:
    """Along one axis: the outputs that read inside the input through ``tap``, and the positions that they read."""
    shift = tap * dilation - before
    first, last = max(0, -(shift // stride)), min(out - 1, (size - 1 - shift) // stride)
    start = first * stride + shift
    return slice(first, max(last + 1, first)), slice(start, max(last * stride + shift + 1, start), stride)


def _by_taps(
    case: Conv2dCase,
    direction: str,
    input: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
) -> torch.Tensor:
    """``direction`` as the definition has it, grouped: one tap's terms are [N, G, K / G, C / G, OH, OW]."""

    def grouped(tensor: torch.Tensor | None, size: tuple[int, ...], axis: int) -> torch.Tensor:
        whole = torch.zeros(size, dtype=torch.float64) if tensor is None else tensor
        return whole.unflatten(axis, (case.groups, -1))

    x = grouped(input, case.input_size, 1)[:, :, None]
    w = grouped(weight, case.weight_size, 0)
    g = grouped(grad_output, case.output_size, 1)[:, :, :, None]
    result = {"forward": g[:, :, :, 0], "backward_input": x[:, :, 0], "backward_weight": w}[direction]
    for r in range(case.kernel_h):
        oh, ih = _outputs_and_inputs(case.in_h, case.out_h, r, case.stride_h, case.pad_top, case.dilation_h)
        for s in range(case.kernel_w):
            ow, iw = _outputs_and_inputs(case.in_w, case.out_w, s, case.stride_w, case.pad_left, case.dilation_w)
            tap = w[None, :, :, :, r, s, None, None]
            if direction == "forward":
                result[..., oh, ow] += (x[..., ih, iw] * tap).sum(3)
            elif direction == "backward_input":
                result[..., ih, iw] += (g[..., oh, ow] * tap).sum(2)
            else:
                result[..., r, s] += (g[..., oh, ow] * x[..., ih, iw]).sum((0, 4, 5))
    return result.flatten(0, 1) if direction == "backward_weight" else result.flatten(1, 2)
