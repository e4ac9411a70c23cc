"""Scratch is bounded: over the layers of the benchmark, in every dtype, a call takes at most its packed weights, 2 MB
for each thread and a quarter of its larger activation (64 MB at most). Winograd's packed weights are its transformed
ones, those of the half types are packed as float32.
"""

import pytest
import torch

import cnn_ext
from benchmarks.cases import Conv2dCase, conv2d_cases

MB = 1 << 20
PADDED_CHANNELS = 32  # packed weights are padded to whole units of output channels, of either direction
POINTS = {3: 36, 5: 64}  # of Winograd's largest tile, in place of kernel_h * kernel_w taps


def rounded_up(count: int) -> int:
    return -(-count // PADDED_CHANNELS) * PADDED_CHANNELS


def bound(case: Conv2dCase, dtype: torch.dtype, threads: int, winograd: bool) -> int:
    taps = POINTS[case.kernel_h] if winograd else case.kernel_h * case.kernel_w
    group_in, group_out = case.in_channels // case.groups, case.out_channels // case.groups
    weights = max(4, dtype.itemsize) * case.groups * rounded_up(group_in) * rounded_up(group_out) * taps
    activation = dtype.itemsize * max(torch.Size(size).numel() for size in (case.input_size, case.output_size))
    return weights + 2 * MB * threads + min(64 * MB, activation // 4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "dtype, winograd",
    [
        pytest.param(torch.float32, False, id="float32"),
        pytest.param(torch.float32, True, id="winograd"),
        pytest.param(torch.float64, False, id="float64"),
        pytest.param(torch.float16, False, id="float16"),
        pytest.param(torch.bfloat16, False, id="bfloat16"),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("direction", ["forward", "backward_input", "backward_weight"])
def test_scratch_is_bounded(direction, layout, dtype, winograd, threads):
    torch.set_num_threads(threads)
    excess = []
    for case in conv2d_cases():
        input = torch.empty(case.input_size, dtype=dtype, memory_format=layout)
        weight = torch.empty(case.weight_size, dtype=dtype, memory_format=layout)
        with cnn_ext.flags(winograd=winograd):
            plan = cnn_ext.explain(
                input, weight, None, case.stride, case.padding, case.dilation, case.groups, direction=direction
            )
        allowed = bound(case, dtype, plan.threads, "_winograd_" in plan.kernel)
        if plan.workspace_bytes > allowed:
            excess.append(f"{case.name} {plan.kernel}: {plan.workspace_bytes / MB:.1f} of {allowed / MB:.1f} MB")
    assert not excess, "\n".join(excess)
