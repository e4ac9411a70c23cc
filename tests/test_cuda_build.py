"""The CUDA module without a GPU: what it was built from, what the assembler made of it, and that it refuses plainly.

Only where the module was built: a CPU-only installation is whole without it. Values on a GPU are tested with the CPU's.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from cnn_ext import _native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").iterdir())
OPERATORS = {
    ("conv2d", "forward"),
    ("conv2d", "backward_input"),
    ("conv2d", "backward_weight"),
    ("conv2d", "backward_bias"),
    ("max_pool2d", "forward"),
    ("max_pool2d", "backward"),
    ("max_pool2d", "gather"),
    ("avg_pool2d", "forward"),
    ("avg_pool2d", "backward"),
}

needs_module = pytest.mark.skipif(
    importlib.util.find_spec("cnn_ext._cuda") is None, reason="the package was built without CUDA"
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def resource_rows() -> list[dict]:
    """The lines of the table that the build installs beside the module."""
    header, *lines = (Path(_native.cuda().__file__).parent / "_cuda_resources.txt").read_text().splitlines()
    names = header.split()
    return [dict(zip(names, line.split(None, len(names) - 1), strict=True)) for line in lines]


def conv2d_shape():
    ones = ("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups")
    sizes = dict(batch=2, in_channels=8, in_h=9, in_w=9, out_channels=8, out_h=9, out_w=9, kernel_h=3, kernel_w=3)
    layouts = dict(layout=_native.Layout.nchw, weight_layout=_native.Layout.nchw)
    policy = {"dtype": _native.DTYPES[torch.float32], "allow_winograd": 0, "allow_tf32": 0}
    return _native.Conv2dShape(**sizes, **dict.fromkeys(ones, 1), **layouts, **policy)


@pytest.mark.parametrize("allowed", [True, False])
def test_cuda_shapes_follow_torchs_switch_for_tf32(allowed):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        assert bool(_native.on_device(conv2d_shape(), torch.device("cuda")).allow_tf32) == allowed
        assert not _native.on_device(conv2d_shape(), torch.device("cpu")).allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older switch alone")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_cuda_shapes_follow_torchs_newest_switch_for_tf32(precision):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        assert bool(_native.on_device(conv2d_shape(), torch.device("cuda")).allow_tf32) == (precision == "tf32")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def code(path: Path) -> str:
    """A source without its comments."""
    return re.sub(r"//[^\n]*", "", path.read_text())


@needs_module
def test_no_kernel_spills_registers():
    rows = resource_rows()
    assert rows
    assert [row for row in rows if int(row["spilled"]) or int(row["stack"])] == []


@needs_module
def test_every_kernel_is_compiled_for_every_arch():
    kernels = {}
    for row in resource_rows():
        kernels.setdefault(row["kernel"], set()).add(row["arch"])
    machine_code = {arch for arch in _native.cuda().archs if arch.startswith("sm_")}
    assert {name for name, archs in kernels.items() if archs != machine_code} == set()


@needs_module
def test_table_serves_every_operator():
    rows = _native.cuda().kernels()
    assert {(row["op"], row["direction"]) for row in rows} == OPERATORS
    for row in rows:
        assert row["name"].startswith(f"{row['op']}_{row['direction']}_")
        assert row["name"].endswith(f"_{row['isa']}")


@needs_module
@needs_no_gpu
def test_no_row_is_supported_without_a_gpu():
    assert not any(row["supported"] for row in _native.cuda().kernels())
    with pytest.raises(ValueError, match="no CUDA device for kernel"):
        _native.cuda().force_kernel("conv2d_forward_direct_sm80")


@needs_module
@needs_no_gpu
def test_a_call_without_a_gpu_says_so():
    cuda = _native.cuda()
    with pytest.raises(RuntimeError, match="there is no CUDA device to use"):
        cuda.conv2d_forward(conv2d_shape(), 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="there is no CUDA device to use"):
        cuda.conv2d_workspace_bytes(_native.Conv2dDirection.backward_weight, conv2d_shape())


@needs_module
def test_a_missing_arch_names_both_sides_and_the_remedy():
    cuda = _native.cuda()
    newest = max(int(re.search(r"\d+", arch)[0]) for arch in cuda.archs)
    cuda.require_arch(newest, "CUDA device 0")
    cuda.require_arch(newest + 10, "CUDA device 0")  # portable code counts upwards
    with pytest.raises(RuntimeError, match=r"need compute capability 8\.0 or newer: CUDA device 3 is sm_75"):
        cuda.require_arch(75, "CUDA device 3")


@needs_module
def test_module_says_that_it_is_unproven():
    cuda = _native.cuda()
    assert not cuda.proven
    assert "never" in cuda.note


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_atomics(path):
    assert not re.search(r"\batomic(Add|Sub|Exch|Min|Max|CAS)\w*\b|\bred\.", code(path))


def test_every_launch_is_checked():
    launches = {path.name: code(path).count("<<<") for path in SOURCES if "<<<" in code(path)}
    assert launches == {"launch.cuh": 1}
    assert re.search(r"<<<[^;]*;\s*CUDA_CHECK\(cudaGetLastError\(\)\);", code(ROOT / "csrc" / "cuda" / "launch.cuh"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_runtime_call_is_checked(path):
    calls = re.findall(r"(?<!CUDA_CHECK\()\bcuda[A-Z]\w*\(", code(path))
    used_in_place = {"cudaGetDevice(", "cudaGetDeviceCount(", "cudaGetErrorString(", "cudaGetErrorName("}
    assert set(calls) <= used_in_place
