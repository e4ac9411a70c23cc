"""No torch kernel computes for this package: with torch's convolutions, pools and matrix products made to raise on the
CPU, every function still runs, forward, backward and twice backward. A planted F.conv2d is caught.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROLOGUE = """
import torch
import torch.nn.functional as F

import cnn_ext
import cnn_ext.functional as C
from tests.support.forbid import forbid_torchs_kernels

forbidden = forbid_torchs_kernels()
"""

CALLS = """
assert {"convolution", "mkldnn_convolution", "_slow_conv2d_forward", "max_pool2d_with_indices", "avg_pool2d.out", "mm",
        "bmm", "addmm"} & set(forbidden), forbidden


def differentiate(output, *inputs):
    grads = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)


for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for format in (torch.contiguous_format, torch.channels_last):
        for geometry in ({}, {"stride": 2, "padding": "same"}, {"dilation": 2, "groups": 2}, {"groups": 4}):
            groups = geometry.get("groups", 1)
            x = torch.randn(2, 4, 9, 9, dtype=dtype).contiguous(memory_format=format).requires_grad_()
            w = torch.randn(8, 4 // groups, 3, 3, dtype=dtype, requires_grad=True)
            b = torch.randn(8, dtype=dtype, requires_grad=True)
            differentiate(C.conv2d(x, w, b, **geometry), x, w, b)
            differentiate(C.conv2d(x, w, b, **geometry, activation="relu"), x, w, b)
            differentiate(C.conv2d_relu_max_pool2d(x, w, b, **geometry), x, w, b)
        one = torch.randn(8, 4, 1, 1, dtype=dtype, requires_grad=True)
        differentiate(C.conv2d(x, one), x, one)
        differentiate(C.max_pool2d(x, 3, 2, 1), x)
        differentiate(C.max_pool2d(x, 2, return_indices=True)[0], x)
        differentiate(C.avg_pool2d(x, 2, ceil_mode=True), x)
        t = torch.randn(4, 3, 3, 3, dtype=dtype, requires_grad=True)
        differentiate(C.conv_transpose2d(x, t, b[:3], 2, 1, 1), x, t, b)
        differentiate(C.conv_transpose2d(x, t), x, t)
        differentiate(C.conv1d(x[..., 0], t.transpose(0, 1)[..., 0], b[:3], padding="same"), x, t, b)
        differentiate(C.conv_transpose1d(x[..., 0], t[..., 0], stride=2), x, t)
        differentiate(C.max_pool1d(x[..., 0], 3, 2), x)
        differentiate(C.avg_pool1d(x[..., 0], 3, 2), x)
        for size in (1, 3, (4, 9), 10):
            differentiate(C.adaptive_avg_pool2d(x, size), x)
            differentiate(C.adaptive_max_pool2d(x, size), x)
        differentiate(C.max_unpool2d(*C.max_pool2d(x, 2, return_indices=True), 2, output_size=(9, 9)), x)
    for size in ((7,), (7, 6)):
        x, w = torch.randn(size, dtype=dtype, requires_grad=True), torch.randn(size, dtype=dtype, requires_grad=True)
        differentiate(cnn_ext.convolve(x, w), x, w)
        differentiate(cnn_ext.correlate(x, w, "same"), x, w)
model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.MaxPool2d(2), torch.nn.AvgPool2d(2),
                            torch.nn.ConvTranspose2d(4, 4, 2, 2), torch.nn.AdaptiveAvgPool2d(3))
cnn_ext.convert(model)(torch.randn(2, 1, 8, 8)).sum().backward()
print("done")
"""


def run(code: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", PROLOGUE + textwrap.dedent(code)]
    return subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


def test_every_function_runs_without_torchs_kernels():
    result = run(CALLS)
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stderr


PLANTED = [
    "F.conv2d(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3))",
    "F.conv2d(torch.randn(1, 1, 4, 4).double(), torch.randn(1, 1, 3, 3).double())",
    "F.max_pool2d(torch.randn(1, 1, 4, 4), 2)",
    "F.avg_pool2d(torch.randn(1, 1, 4, 4), 2)",
    "F.unfold(torch.randn(1, 1, 4, 4), 2)",
    "torch.randn(2, 2) @ torch.randn(2, 2)",
]


@pytest.fixture(scope="module")
def caught() -> dict[str, str]:
    """What each planted call raises, all of them in one process."""
    result = run(f"""
        for planted in {PLANTED}:
            try:
                eval(planted)
            except AssertionError as error:
                print(planted, error, sep=": ")
    """)
    assert result.returncode == 0, result.stderr
    return dict(line.split(": ", 1) for line in result.stdout.splitlines())


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_torch_kernel_is_caught(caught, planted):
    assert caught[planted].startswith("torch computes: aten::")
