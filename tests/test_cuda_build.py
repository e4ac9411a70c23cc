"""The CUDA module without a GPU: what it was built from, what the assembler made of it, and that it refuses plainly.

Only where the module was built: a CPU-only installation is whole without it. Values on a GPU are tested with the CPU's.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnn_ext import _native
from tests.support import sass

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc" / "cuda").rglob("*") if path.is_file())
OPERATORS = {
    ("conv2d", "forward"),
    ("conv2d", "backward_input"),
    ("conv2d", "backward_weight"),
    ("conv2d", "backward_bias"),
    ("conv2d_relu_max_pool2d", "forward"),
    ("conv2d_relu_max_pool2d", "backward_input"),
    ("conv2d_relu_max_pool2d", "backward_weight"),
    ("conv2d_relu_max_pool2d", "backward_bias"),
    ("max_pool2d", "forward"),
    ("max_pool2d", "backward"),
    ("max_pool2d", "gather"),
    ("avg_pool2d", "forward"),
    ("avg_pool2d", "backward"),
    ("adaptive_max_pool2d", "forward"),
    ("adaptive_avg_pool2d", "forward"),
    ("adaptive_avg_pool2d", "backward"),
    ("max_unpool2d", "forward"),
    ("max_unpool2d", "scatter"),
    ("max_unpool2d", "gather"),
}

needs_module = pytest.mark.skipif(
    importlib.util.find_spec("cnn_ext._cuda") is None, reason="the package was built without CUDA"
)
needs_disassembler = pytest.mark.skipif(not sass.is_at_hand(), reason="no cuobjdump and nvdisasm")
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
    zeros = {"padding_mode": _native.PADDING_MODES["zeros"]}
    return _native.Conv2dShape(**sizes, **dict.fromkeys(ones, 1), **layouts, **policy, **zeros)


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


# By the kernel's name and its element type: the product's instruction, and how operands reach it.
MATRIX_INSTRUCTIONS = {
    "float": "HMMA.1688.F32.TF32",
    "__half": "HMMA.16816.F32",
    "__nv_bfloat16": "HMMA.16816.F32.BF16",
    "double": "DMMA.884",
}
PLAIN_INSTRUCTIONS = {"float": "FFMA", "__half": "FFMA", "__nv_bfloat16": "FFMA", "double": "DFMA"}
CHUNKS = {"float": 4, "__half": 8, "__nv_bfloat16": 8, "double": 2}  # elements of 16 bytes


@pytest.fixture(scope="module")
def opcodes() -> dict[str, set[str]]:
    """The machine instructions of every kernel for the oldest device that it serves."""
    return sass.opcodes(Path(_native.cuda().__file__), "sm_80")


def element_type(kernel: str) -> str:
    return re.search(r"\b(float|double|__half|__nv_bfloat16)\b", kernel)[1]


@pytest.fixture(scope="module")
def hopper_opcodes() -> dict[str, set[str]]:
    """The same of those that are compiled for sm_90a alone."""
    return sass.opcodes(Path(_native.cuda().__file__), "sm_90a")


# The products of warpgroups, by the element type; UTMALDG is the copy engine.
WARPGROUP_INSTRUCTIONS = {"float": ".F32.TF32", "__half": ".F32", "__nv_bfloat16": ".F32.BF16"}


@needs_module
@needs_disassembler
def test_hopper_kernels_have_the_intended_instructions(hopper_opcodes):
    products = {name: found for name, found in hopper_opcodes.items() if "_wgmma<" in name}
    assert products or "sm_90" not in _native.cuda().archs
    for name, found in products.items():
        assert any(
            op.startswith("HGMMA") and op.endswith(WARPGROUP_INSTRUCTIONS[element_type(name)]) for op in found
        ), name
        assert "UTMALDG.4D" in found, name
        assert "UTMALDG.4D.IM2COL" in found or "patch_wgmma" in name or "PlanesGemm" in name, name
        assert not any(op.startswith(("HMMA", "LDL", "STL")) for op in found), name


@needs_module
@needs_disassembler
@pytest.mark.slow
def test_no_kernel_touches_local_memory(opcodes):
    of_sm_80 = {row["kernel"] for row in resource_rows() if row["arch"] == "sm_80"}
    assert len(opcodes) >= len(of_sm_80)
    assert {name for name, found in opcodes.items() if any(op.startswith(("LDL", "STL")) for op in found)} == set()


def intended(kernel: str) -> set[str]:
    """The instructions that a kernel must have, by its name: its products, and accesses of 16 bytes.

    ``..Mma..Tile<...>, true``: what is aligned is copied to shared memory past the registers.
    """
    if "_implicit_gemm<" in kernel:
        return {PLAIN_INSTRUCTIONS[element_type(kernel)], "LDS.128"}
    if re.search(r"\bdepthwise\w*<", kernel):
        return {"LDG.E.128.CONSTANT", "STG.E.128"}
    if "correlate_planes<" in kernel:
        return {"LDG.E.128.CONSTANT", "LDS.128"}
    if pool := re.search(r"\bpool_(chunks|row_strips)<.*, (\d)>\(", kernel):
        if int(pool[2]) != CHUNKS[element_type(kernel)]:
            return set()
        return {"LDG.E.128.CONSTANT"} | ({"STG.E.128"} if pool[1] == "chunks" else set())
    if re.search(r"\breduce_chunks<.*, true>\(", kernel):
        return {"LDG.E.128"}
    if re.search(r"\bpool_backward_(strips|blocks)<|\bpool_backward_pixels<[^>]*<\w+>, [248],", kernel):
        return {"STG.E.128"}
    if "_mma<" not in kernel:
        return set()
    wanted = {MATRIX_INSTRUCTIONS[element_type(kernel)], "LDGDEPBAR"}
    wanted |= {"LDGSTS.E.BYPASS.128"} if re.search(r"Mma\w*<[^>]*>, true", kernel) else set()
    return wanted | ({"STG.E.128"} if re.search(r"gather_mma<[^>]*>, true", kernel) else set())


@needs_module
@needs_disassembler
def test_kernels_have_the_intended_instructions(opcodes):
    assert any("_implicit_gemm<" in name for name in opcodes) and any("_mma<" in name for name in opcodes)
    missing = {name: intended(name) - found for name, found in opcodes.items()}
    assert {name: wanted for name, wanted in missing.items() if wanted} == {}
    for name, found in opcodes.items():
        if "_mma<" in name and element_type(name) in ("__half", "__nv_bfloat16"):
            assert any(op.startswith("LDSM.16") for op in found), name


@needs_module
def test_every_kernel_is_compiled_for_every_arch():
    kernels = {}
    for row in resource_rows():
        kernels.setdefault(row["kernel"], set()).add(row["arch"])
    machine_code = {arch for arch in _native.cuda().archs if arch.startswith("sm_")}
    of_one_arch = r"\w*_wgmma<|transpose(_slabs)?<|sum_clusters(_to_planes)?<|global_avg_cluster<"
    of_one_arch = {name for name in kernels if re.match(of_one_arch, name)}
    assert all(kernels[name] == {"sm_90a"} for name in of_one_arch)
    assert bool(of_one_arch) == bool(machine_code & {"sm_90", "sm_90a"})
    assert {name for name, archs in kernels.items() if archs != machine_code} <= of_one_arch


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
        cuda.conv2d_forward(conv2d_shape(), 0, 0, 0, 0, (0, 0), True, int)


@needs_module
def test_a_missing_arch_names_both_sides_and_the_remedy():
    cuda = _native.cuda()
    newest = max(int(re.search(r"\d+", arch)[0]) for arch in cuda.archs)
    cuda.require_arch(newest, "CUDA device 0")
    cuda.require_arch(newest + 10, "CUDA device 0")  # portable code counts upwards
    with pytest.raises(RuntimeError, match=r"need compute capability 8\.0 or newer: CUDA device 3 is sm_75"):
        cuda.require_arch(75, "CUDA device 3")


def rows_in_a_new_process(unproven: str) -> subprocess.CompletedProcess:
    program = "import json; from cnn_ext import _native; print(json.dumps(_native.cuda().kernels()))"
    environment = os.environ | {"CNN_EXT_UNPROVEN": unproven}
    return subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)


@needs_module
def test_what_has_never_run_on_a_gpu_is_set_aside():
    """Where it needs tensor cores: the other rows serve meanwhile. CNN_EXT_UNPROVEN=1 chooses it all the same."""
    rows = json.loads(rows_in_a_new_process("0").stdout)
    admitted = [row for row in rows if row["admitted"]]
    assert {(row["op"], row["direction"]) for row in admitted} == OPERATORS
    for row in rows:
        assert row["admitted"] == ("mma_" not in row["name"] or row["proven"]), row["name"]
    assert all(row["admitted"] for row in json.loads(rows_in_a_new_process("1").stdout))
    assert 'CNN_EXT_UNPROVEN: got "yes", want 0 or 1' in rows_in_a_new_process("yes").stderr


def test_a_recorded_result_is_the_proof(tmp_path):
    result = {
        "rows": [
            {"name": "a_sm80", "right": True},
            {"name": "b_sm80", "right": False},
            {"name": "c_sm80", "right": True},
        ]
    }
    (tmp_path / "rows_cuda.json").write_text(json.dumps(result))
    script = tmp_path / "script.cmake"
    for file, proven in (("rows_cuda.json", "a_sm80 c_sm80"), ("none.json", "")):
        call = f'cnn_ext_proven_rows("{tmp_path}/{file}" names)\nmessage("<${{names}}>")\n'
        script.write_text(f'include("{ROOT}/cmake/proven_rows.cmake")\n{call}')
        done = subprocess.run(["cmake", "-P", str(script)], check=True, capture_output=True, text=True)
        assert done.stderr.strip() == f"<{proven}>"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_atomics_whose_result_depends_on_the_order(path):
    """A minimum of integers is the same in any order; sums and exchanges are not."""
    assert not re.search(r"\batomic(Add|Sub|Exch|Max|CAS)\w*\b|\bred\.", code(path))
    assert path.name == "primitives.cuh" or "atomicMin" not in code(path)


def test_every_launch_is_checked():
    launches = {path.name: code(path).count("<<<") for path in SOURCES if "<<<" in code(path)}
    assert launches == {"launch.cuh": 1}
    assert re.search(r"<<<[^;]*;\s*CUDA_CHECK\(cudaGetLastError\(\)\);", code(ROOT / "csrc" / "cuda" / "launch.cuh"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_runtime_call_is_checked(path):
    calls = re.findall(r"(?<!CUDA_CHECK\()\bcuda[A-Z]\w*\(", code(path))
    used_in_place = {"cudaGetDevice(", "cudaGetDeviceCount(", "cudaGetErrorString(", "cudaGetErrorName("}
    assert set(calls) <= used_in_place
