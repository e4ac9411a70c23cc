"""Which kernels there are, which one a call would run, how to force one, and what this build is made of."""

import contextlib
import dataclasses
import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType

import torch

from cnn_ext import _native, policy
from cnn_ext._arguments import conv_geometry
from cnn_ext.ops.conv2d import prepare_backward_bias, prepare_forward
from cnn_ext.ops.shapes import spec
from cnn_ext.ops.taps import taps_inside

__all__ = ["Explanation", "KernelInfo", "build_info", "explain", "force_kernel", "kernels", "version"]


def version() -> str:
    """The installed version."""
    try:
        return metadata.version("cnn_ext")
    except metadata.PackageNotFoundError:
        return "0+unknown"


@dataclasses.dataclass(frozen=True)
class KernelInfo:
    """A row of the table of kernels. The name is ``<op>_<direction>_<algorithm>_<isa>``."""

    name: str
    op: str
    direction: str
    algorithm: str
    isa: str
    device: str
    supported: bool


def _cuda_module() -> ModuleType | None:
    """The CUDA module, where the package was built with it."""
    return _native.cuda() if importlib.util.find_spec("cnn_ext._cuda") else None


def _modules() -> dict[str, ModuleType]:
    cuda = _cuda_module()
    return {"cpu": _native.cpu} if cuda is None else {"cpu": _native.cpu, "cuda": cuda}


def _kernel_info(row: dict, device: str) -> KernelInfo:
    algorithm = row["name"].removeprefix(f"{row['op']}_{row['direction']}_").removesuffix(f"_{row['isa']}")
    return KernelInfo(row["name"], row["op"], row["direction"], algorithm, row["isa"], device, row["supported"])


def kernels() -> list[KernelInfo]:
    """Every kernel, in the order in which those of one op and direction are tried; unsupported ones are listed too."""
    return [_kernel_info(row, device) for device, module in _modules().items() for row in module.kernels()]


@contextlib.contextmanager
def force_kernel(name: str) -> Iterator[None]:
    """While the context lasts, calls of the kernel's op and direction run it and no other, in every thread.

    Raises:
        ValueError: no kernel has this name, or this machine cannot run it; at the call: the kernel refuses the shape.
    """
    owners = [module for module in _modules().values() if any(row["name"] == name for row in module.kernels())]
    module = owners[0] if owners else _native.cpu  # which knows the name to be unknown
    previous = module.force_kernel(name)
    try:
        yield
    finally:
        module.restore_forced_kernel(name, previous)


def _table(rows: dict[str, object]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a call would run."""

    kernel: str
    isa: str
    tile: tuple[int, int]  # channels, pixels of one register tile
    threads: int
    workspace_bytes: int
    flops: int  # additions and multiplications of taps inside the input
    bytes: int  # of the tensors, each read or written once

    def __str__(self) -> str:
        channels, pixels = self.tile
        return _table(
            {
                "kernel": self.kernel,
                "isa": self.isa,
                "tile": f"{channels} channels x {pixels} pixels",
                "threads": self.threads,
                "workspace": f"{self.workspace_bytes:,} bytes",
                "flops": f"{self.flops:,}",
                "bytes": f"{self.bytes:,}",
            }
        )


def _multiplications(shape) -> int:
    rows = taps_inside(shape.in_h, shape.out_h, shape.kernel_h, shape.stride_h, shape.pad_top, shape.dilation_h)
    columns = taps_inside(shape.in_w, shape.out_w, shape.kernel_w, shape.stride_w, shape.pad_left, shape.dilation_w)
    return shape.batch * shape.out_channels * (shape.in_channels // shape.groups) * rows * columns


def _elements(direction: str, input, weight, bias, outputs: int) -> int:
    """Elements that the tensors of a direction have together."""
    if direction == "backward_bias":
        return outputs + weight.shape[0]
    with_bias = bias is not None and direction == "forward"
    return input.numel() + weight.numel() + outputs + (bias.numel() if with_bias else 0)


def explain(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, direction="forward") -> Explanation:
    """Which kernel ``conv2d`` with these arguments would run, and how, without running it.

    Args:
        direction: 'forward', 'backward_input', 'backward_weight' or 'backward_bias'; the output's gradient counts as
            laid out like the output.

    Raises:
        ValueError: an unknown direction, or a forced kernel that refuses the shape; else as conv2d.
    """
    choices = _native.Conv2dDirection.__members__
    if direction not in choices:
        raise ValueError(f"explain() expected direction to be one of {', '.join(choices)}, but got {direction!r}")
    geometry = conv_geometry("explain", input, weight, bias, stride, padding, dilation, groups, axes=2)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    bias_spec = None if bias is None else spec(bias)
    shape, output_size, memory_format, *_ = prepare_forward(
        spec(batched), spec(weight), bias_spec, geometry, policy.allowed.winograd
    )
    output = torch.empty(output_size, dtype=input.dtype, device="meta", memory_format=memory_format)
    if direction == "backward_bias":
        shape = prepare_backward_bias(spec(output))[-1]
    module = _modules()["cuda" if input.is_cuda else "cpu"]
    choice = module.choose_conv2d(choices[direction], _native.on_device(shape, input.device), torch.get_num_threads())
    return Explanation(
        kernel=choice["kernel"],
        isa=choice["isa"],
        tile=(choice["tile_channels"], choice["tile_pixels"]),
        threads=choice["threads"],
        workspace_bytes=choice["workspace_bytes"],
        flops=output.numel() if direction == "backward_bias" else 2 * _multiplications(shape),
        bytes=_elements(direction, input, weight, bias, output.numel()) * input.element_size(),
    )


def _cuda_info() -> dict | str:
    module = _cuda_module()
    if module is None:
        return "not built: no nvcc was found, or CNN_EXT_CUDA=off; CNN_EXT_CUDA=on makes its absence an error"
    rows = module.kernels()
    return {
        "toolkit": module.toolkit,
        "archs": module.archs,
        "proven": f"{sum(row['proven'] for row in rows)} of {len(rows)} kernels have run on a GPU",
        "set_aside": [row["name"] for row in rows if not row["admitted"]],  # unless CNN_EXT_UNPROVEN=1
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def build_info() -> dict:
    """What this build is made of and what it runs on: what a bug report should carry."""
    rows = _native.cpu.kernels()
    return {
        "version": version(),
        "source_hash": _native.cpu.source_hash,
        "compiler": _native.cpu.compiler,
        "isas": sorted({row["isa"] for row in rows}),
        "isa": _native.cpu.best_isa(),
        "openmp": _native.openmp_runtime,
        "threads": torch.get_num_threads(),
        "cuda": _cuda_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
