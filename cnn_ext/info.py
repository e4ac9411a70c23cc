"""``python -m cnn_ext.info``: what this build is made of, and a self-test of about a second."""

import sys
import time

import torch

from cnn_ext import functional
from cnn_ext.inspection import build_info, force_kernel, kernels

# (name, forward, sizes of its inputs): odd sizes and padding, so that tiles have edges.
_CASES = [
    (
        "conv2d",
        lambda x, w, b: functional.conv2d(x, w, b, padding=1),
        [(2, 5, 19, 23), (18, 5, 3, 3), (18,)],
    ),
    (
        "conv2d strided",
        lambda x, w, b: functional.conv2d(x, w, b, stride=2, padding=2, groups=2),
        [(2, 6, 17, 17), (8, 3, 5, 5), (8,)],
    ),
    (
        "conv2d_relu_max_pool2d",
        lambda x, w, b: functional.conv2d_relu_max_pool2d(x, w, b, padding=1),
        [(2, 5, 19, 23), (18, 5, 3, 3), (18,)],
    ),
    ("max_pool2d", lambda x: functional.max_pool2d(x, 3, 2, 1), [(2, 7, 17, 19)]),
    ("avg_pool2d", lambda x: functional.avg_pool2d(x, 2, ceil_mode=True), [(2, 7, 17, 19)]),
]


def _forward_and_gradients(forward, sizes, dtype, memory_format) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, dtype=dtype, generator=generator) for size in sizes]
    inputs[0] = inputs[0].contiguous(memory_format=memory_format)
    for tensor in inputs:
        tensor.requires_grad_()
    output = forward(*inputs)
    grad_output = torch.randn(output.shape, dtype=dtype, generator=generator)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]


def _naively(forward, sizes, dtype, memory_format) -> list[torch.Tensor]:
    """The same by the naive kernels, one row for each op and direction."""
    naive = [row.name for row in kernels() if row.algorithm == "naive" and row.device == "cpu"]
    contexts = [force_kernel(name) for name in naive]
    try:
        for context in contexts:
            context.__enter__()
        return _forward_and_gradients(forward, sizes, dtype, memory_format)
    finally:
        for context in reversed(contexts):
            context.__exit__(None, None, None)


def _agrees(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Within eps * (terms of the largest sum here, a batch of planes) of the largest magnitude."""
    terms = 2 * 19 * 23
    tolerance = torch.finfo(got.dtype).eps * terms * wanted.abs().max()
    return bool((got - wanted).abs().max() <= tolerance)


def self_test() -> list[str]:
    """Compares the kernels that calls choose on the CPU with the naive ones; returns what disagreed."""
    failures = []
    for name, forward, sizes in _CASES:
        for dtype in (torch.float32, torch.float64):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                call = (forward, sizes, dtype, memory_format)
                pairs = zip(_forward_and_gradients(*call), _naively(*call), strict=True)
                if not all(_agrees(got, wanted) for got, wanted in pairs):
                    failures.append(f"{name} {dtype} {memory_format}")
    return failures


def _print_info() -> None:
    rows = {}
    for name, value in build_info().items():
        nested = {f"{name} {key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        rows.update(nested)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")


def main() -> int:
    """Prints it all; the exit status is 1 if the self-test failed."""
    _print_info()
    start = time.perf_counter()
    failures = self_test()
    seconds = time.perf_counter() - start
    print(f"self-test: {'FAILED: ' + '; '.join(failures) if failures else 'passed'} ({seconds:.1f} s)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
