"""The only importer of the compiled modules: tensors in, kernels run, nothing checked.

The floor above (``cnn_ext.ops``) has checked every argument and allocated every output; here tensors become addresses,
and the device decides which module serves: ``_C`` (CPU) or ``_cuda`` (loaded at its first use).
"""

import ctypes
import functools
import importlib
import operator
from pathlib import Path
from types import ModuleType

import torch

from cnn_ext._source_hash import source_hash

_REBUILD = "rebuild with `pip install -e .` (or install with `pip install .` and import from outside the source tree)"


def _share_openmp_runtime() -> str:
    """Makes the OpenMP runtime that torch has loaded visible to ``_C``, which names none of its own; returns its path.

    Two runtimes in one process would oversubscribe the cores and, after a fork, hang.
    """
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    runtimes = [path for path in mapped if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
    # Another package may have brought a second one: torch's lies in torch/lib, or in torch.libs beside it.
    torch_folder = str(Path(torch.__file__).parent)
    runtimes.sort(key=lambda path: (not path.startswith(torch_folder), path))
    path = runtimes[0] if runtimes else "libgomp.so.1"
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return path


def _load(name: str) -> ModuleType:
    """Imports a compiled module and makes sure that it is this package's own, built from the sources beside it."""
    package = Path(__file__).resolve().parent
    try:
        module = importlib.import_module(f"cnn_ext.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(f"cnn_ext: the compiled module {name} is not in {package}: {_REBUILD}") from error
    if Path(module.__file__).resolve().parent != package:  # an editable installation answers for every cnn_ext
        raise ImportError(f"cnn_ext: the compiled module {module.__file__} is not in {package}: {_REBUILD}")
    csrc = package.parent / "csrc"
    if csrc.is_dir() and module.source_hash != source_hash(csrc):
        raise ImportError(
            f"cnn_ext: {module.__file__} was built from other sources (hash {module.source_hash}) than {csrc} "
            f"(hash {source_hash(csrc)}): {_REBUILD}"
        )
    return module


openmp_runtime = _share_openmp_runtime()
cpu = _load("_C")


@functools.cache
def cuda() -> ModuleType:
    """The CUDA module; ImportError where the package was built without it."""
    return _load("_cuda")


PackedWeight = cpu.PackedWeight
Conv2dShape = cpu.Conv2dShape
Conv2dReluPoolShape = cpu.Conv2dReluPoolShape
Pool2dShape = cpu.Pool2dShape
SizedPool2dShape = cpu.SizedPool2dShape
Layout = cpu.Layout
PADDING_MODES = dict(cpu.PaddingMode.__members__)
Conv2dDirection = cpu.Conv2dDirection
Pool2dOp = cpu.Pool2dOp
Pool2dDirection = cpu.Pool2dDirection
SizedPool2dOp = cpu.SizedPool2dOp
SizedPool2dDirection = cpu.SizedPool2dDirection

DTYPES = {
    torch.float32: cpu.DType.float32,
    torch.float64: cpu.DType.float64,
    torch.float16: cpu.DType.float16,
    torch.bfloat16: cpu.DType.bfloat16,
}


CUDA_ALIGNMENT = 16  # bytes: what the copy engine of a GPU wants


_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)  # what torch.backends.cudnn.conv asks, sooner


def _tf32_allowed() -> bool:
    """torch's switch for convolutions on CUDA, by its newest interface."""
    if _fp32_precision is None:
        return torch.backends.cudnn.allow_tf32
    return _fp32_precision("cuda", "conv") == "tf32"


def on_device(shape, device: torch.device):
    """The shape as a device's kernels take it: CUDA's follow torch's switch as it stands at the call."""
    return shape if device.type == "cpu" else shape.with_tf32(_tf32_allowed())


class NoMemoryError(RuntimeError):
    """A tensor with elements has no memory that holds them."""


def _address_of_nothing(tensor: torch.Tensor) -> int:
    """0, of a tensor whose address is 0 because it has no elements."""
    if tensor.numel() == 0:
        return 0
    raise NoMemoryError(
        f"Expected a tensor with memory, but one of size {list(tensor.shape)} has none: was its storage resized to 0?"
    )


def _addresses(tensors: tuple[torch.Tensor | None, ...]) -> list[int]:
    """Where tensors lie; 0 for one that is not given."""
    return [0 if tensor is None else tensor.data_ptr() or _address_of_nothing(tensor) for tensor in tensors]


def _run_packed(kernel: str, shape, *tensors: torch.Tensor | None, packed: PackedWeight) -> None:
    """Runs a CPU kernel on a weight that is kept packed."""
    getattr(cpu, kernel)(shape, *_addresses(tensors), packed, torch.get_num_threads())


def _queue(tensor: torch.Tensor) -> tuple[int, int]:
    """Where CUDA kernels go: device and current stream (torch.cuda.current_stream takes 20 times as long)."""
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def _run(kernel: str, shape, *tensors: torch.Tensor | None) -> None:
    """Runs ``kernel`` of the module for the tensors' device, the first of which is always there.

    Its arguments are the shape, the addresses in the binding's order, then the number of threads or the queue.
    """
    addresses = _addresses(tensors)
    if tensors[0].is_cpu:
        getattr(cpu, kernel)(shape, *addresses, torch.get_num_threads())
    else:
        getattr(cuda(), kernel)(shape, *addresses, _queue(tensors[0]))


@functools.cache
def _allocator(device_index: int):
    """Makes memory for the kernels of a CUDA device: a tensor of as many bytes as it is asked for."""
    return functools.partial(torch.empty, dtype=torch.uint8, device=torch.device("cuda", device_index))


def _run_in_workspace(kernel: str, shape, *tensors: torch.Tensor | None) -> None:
    """``_run`` with what CUDA kernels want: aligned tensors, torch's switch for TF32, and memory to work in, of which
    the kernel that is chosen says how many bytes. CPU kernels bring their own."""
    if tensors[0].is_cpu:
        return _run(kernel, shape, *tensors)
    addresses = _addresses(tensors)
    if functools.reduce(operator.or_, addresses) % CUDA_ALIGNMENT != 0:
        # Only views into the middle of another tensor are not aligned; results are made aligned.
        aligned = [t if t is None or t.data_ptr() % CUDA_ALIGNMENT == 0 else t.clone() for t in tensors]
        return _run_in_workspace(kernel, shape, *aligned)
    queue = _queue(tensors[0])
    return getattr(cuda(), kernel)(shape, *addresses, queue, _tf32_allowed(), _allocator(queue[0]))


def conv2d_forward(shape, input, weight, bias, output):
    if input.is_cpu:  # as below, sooner
        places = (
            input.data_ptr() or _address_of_nothing(input),
            weight.data_ptr() or _address_of_nothing(weight),
            0 if bias is None else bias.data_ptr() or _address_of_nothing(bias),
            output.data_ptr(),
        )
        return cpu.conv2d_forward(shape, *places, torch.get_num_threads())
    return _run_in_workspace("conv2d_forward", shape, input, weight, bias, output)


def conv2d_forward_packed(shape, input, weight, bias, output, packed):
    _run_packed("conv2d_forward_packed", shape, input, weight, bias, output, packed=packed)


def conv2d_backward_input(shape, grad_output, weight, grad_input):
    _run_in_workspace("conv2d_backward_input", shape, grad_output, weight, grad_input)


def conv_transpose2d_forward(shape, grad_output, weight, input_bias, grad_input):
    _run_in_workspace("conv_transpose2d_forward", shape, grad_output, weight, input_bias, grad_input)


def conv2d_backward_weight(shape, grad_output, input, grad_weight):
    _run_in_workspace("conv2d_backward_weight", shape, grad_output, input, grad_weight)


def conv2d_backward_bias(shape, grad_output, grad_bias):
    _run_in_workspace("conv2d_backward_bias", shape, grad_output, grad_bias)


def conv2d_relu_max_pool2d_forward(shape, input, weight, bias, output, offsets):
    _run_in_workspace("conv2d_relu_max_pool2d_forward", shape, input, weight, bias, output, offsets)


def conv2d_relu_max_pool2d_forward_packed(shape, input, weight, bias, output, packed):
    _run_packed("conv2d_relu_max_pool2d_forward_packed", shape, input, weight, bias, output, packed=packed)


def conv2d_relu_max_pool2d_backward_input(shape, grad_output, mask, weight, grad_input):
    _run_in_workspace("conv2d_relu_max_pool2d_backward_input", shape, grad_output, mask, weight, grad_input)


def conv2d_relu_max_pool2d_backward_weight(shape, grad_output, mask, input, grad_weight):
    _run_in_workspace("conv2d_relu_max_pool2d_backward_weight", shape, grad_output, mask, input, grad_weight)


def conv2d_relu_max_pool2d_backward_bias(shape, grad_output, mask, grad_bias):
    _run_in_workspace("conv2d_relu_max_pool2d_backward_bias", shape, grad_output, mask, grad_bias)


def max_pool2d_forward(shape, input, output, offsets):
    _run("max_pool2d_forward", shape, input, output, offsets)


def max_pool2d_backward(shape, grad_output, offsets, grad_input):
    _run("max_pool2d_backward", shape, grad_output, offsets, grad_input)


def max_pool2d_gather(shape, input, offsets, output):
    _run("max_pool2d_gather", shape, input, offsets, output)


def avg_pool2d_forward(shape, input, output):
    _run("avg_pool2d_forward", shape, input, output)


def avg_pool2d_backward(shape, grad_output, grad_input):
    _run("avg_pool2d_backward", shape, grad_output, grad_input)


def adaptive_max_pool2d_forward(shape, input, output, indices):
    _run("adaptive_max_pool2d_forward", shape, input, output, indices)


def adaptive_avg_pool2d_forward(shape, input, output):
    _run("adaptive_avg_pool2d_forward", shape, input, output)


def adaptive_avg_pool2d_backward(shape, grad_output, grad_input):
    _run("adaptive_avg_pool2d_backward", shape, grad_output, grad_input)


def max_unpool2d_forward(shape, input, indices, output):
    _run("max_unpool2d_forward", shape, input, indices, output)


def max_unpool2d_scatter(shape, input, indices, output):
    _run("max_unpool2d_scatter", shape, input, indices, output)


def max_unpool2d_gather(shape, input, indices, output):
    _run("max_unpool2d_gather", shape, input, indices, output)
