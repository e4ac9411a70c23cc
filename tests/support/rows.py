"""The rows of the kernel table, for the tests: which there are, whether one accepts a case, and how to run exactly that
one.

Everything here speaks NCHW tensors to the tests and lays them out as a row needs them. Outputs are poisoned before a
call, so an element that a kernel forgets to write shows. ``shift`` moves the start of every tensor by that many
elements: one element misaligns it for vectors.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from cnn_ext import _native
from tests.support.cases import Conv2dCase, FusedCase, Pool2dCase, conv2d_cases, fused_cases, pool2d_cases
from tests.support.sized_pool2d import SizedPool2dCase

SIZED_POOL2D_OPS = ("adaptive_max_pool2d", "adaptive_avg_pool2d", "max_unpool2d")
DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)
ALL_DTYPES = DTYPES + HALF_DTYPES
POOL2D_LAYOUTS = ("nchw", "nhwc")
# Of the activations and of the weight: a model may be channels_last in one of them only.
CONV2D_LAYOUTS = (("nchw", "nchw"), ("nhwc", "nhwc"), ("nhwc", "nchw"), ("nchw", "nhwc"))


@dataclass(frozen=True)
class Row:
    """A supported row of a device's table."""

    name: str
    op: str
    direction: str
    isa: str
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name

    @property
    def is_naive(self) -> bool:
        return "_naive" in self.name

    @property
    def allows_tf32(self) -> bool:
        """Whether it is for calls that may round float32 operands to TF32; some rows are for the others alone."""
        return "_tf32x3_" not in self.name

    @property
    def module(self) -> ModuleType:
        return _native.cpu if self.device == "cpu" else _native.cuda()


@functools.cache
def _all_rows() -> tuple[Row, ...]:
    """Every row that this machine can run: of the CPU's table and, where there is a GPU, of CUDA's."""
    modules = {"cpu": _native.cpu}
    if torch.cuda.is_available():
        modules["cuda"] = _native.cuda()
    return tuple(
        Row(row["name"], row["op"], row["direction"], row.get("isa", ""), device)
        for device, module in modules.items()
        for row in module.kernels()
        if row["supported"]
    )


def rows(*, op: str | None = None, direction: str | None = None) -> list[Row]:
    """Those of an op and a direction, if named."""
    return [row for row in _all_rows() if op in (None, row.op) and direction in (None, row.direction)]


@contextlib.contextmanager
def forced(row: Row) -> Iterator[None]:
    """Inside, calls of the row's op and direction use it alone, and torch's switch for TF32 is as it wants it."""
    previous, allowed = row.module.force_kernel(row.name), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = row.allows_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
        row.module.restore_forced_kernel(row.name, previous)


def dense(tensor: torch.Tensor, layout: str = "nchw", shift: int = 0, device: str = "cpu") -> torch.Tensor:
    """A copy of ``tensor`` that lies densely in ``layout``; a tensor without four dimensions ignores the layout."""
    if shift == 0:
        channels_last = tensor.dim() == 4 and layout == "nhwc"
        return tensor.to(device).clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return empty(tuple(tensor.shape), tensor.dtype, layout, shift, device).copy_(tensor)


def empty(
    size: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw", shift: int = 0, device: str = "cpu"
) -> torch.Tensor:
    """A poisoned tensor of ``size`` that lies densely in ``layout``."""
    channels_last = len(size) == 4 and layout == "nhwc"
    physical = (size[0], size[2], size[3], size[1]) if channels_last else size
    count = 1
    for extent in size:
        count *= extent
    poison = torch.nan if dtype.is_floating_point else 255
    tensor = torch.full((count + shift,), poison, dtype=dtype, device=device)[shift:].reshape(physical)
    return tensor.permute(0, 3, 1, 2) if channels_last else tensor


def _normalised(fields: dict[str, int]) -> dict[str, int]:
    """As the operators describe a problem: the stride of an axis with one output is 1."""
    return fields | {f"stride_{axis}": 1 for axis in "hw" if fields[f"out_{axis}"] == 1}


@functools.cache
def conv2d_shape(
    case: Conv2dCase,
    dtype: torch.dtype,
    layout: str,
    weight_layout: str,
    *,
    allow_winograd: bool = True,
    padding_mode: str = "zeros",
) -> _native.Conv2dShape:
    """The struct that the kernels are given for ``case``."""
    fields = (
        "batch in_channels in_h in_w out_channels out_h out_w kernel_h kernel_w stride_h stride_w pad_top pad_left "
        "dilation_h dilation_w groups"
    )
    return _native.Conv2dShape(
        **_normalised({field: getattr(case, field) for field in fields.split()}),
        dtype=_native.DTYPES[dtype],
        layout=getattr(_native.Layout, layout),
        weight_layout=getattr(_native.Layout, weight_layout),
        padding_mode=_native.PADDING_MODES[padding_mode],
        allow_winograd=allow_winograd,
        allow_tf32=True,
    )


@functools.cache
def fused_shape(
    case: FusedCase, dtype: torch.dtype, layout: str, weight_layout: str, *, allow_winograd: bool = False
) -> _native.Conv2dReluPoolShape:
    """The struct that the kernels are given for ``case``."""
    return _native.Conv2dReluPoolShape(
        conv=conv2d_shape(case.conv, dtype, layout, weight_layout, allow_winograd=allow_winograd),
        pool_h=case.window,
        pool_w=case.window,
        pool_stride_h=case.stride,
        pool_stride_w=case.stride,
        pooled_h=case.output_size[2],
        pooled_w=case.output_size[3],
    )


@functools.cache
def pool2d_shape(case: Pool2dCase, dtype: torch.dtype, layout: str) -> _native.Pool2dShape:
    """The struct that the kernels are given for ``case``."""
    fields = (
        "batch channels in_h in_w out_h out_w kernel_h kernel_w stride_h stride_w pad_top pad_bottom pad_left "
        "pad_right dilation_h dilation_w divisor_override count_include_pad"
    )
    return _native.Pool2dShape(
        **_normalised({field: getattr(case, field) for field in fields.split()}),
        dtype=_native.DTYPES[dtype],
        layout=getattr(_native.Layout, layout),
    )


def cases_of(op: str) -> tuple:
    """The list of an operator."""
    if op in SIZED_POOL2D_OPS:
        return tuple(map(SizedPool2dCase, pool2d_cases()))
    return {"conv2d": conv2d_cases, "conv2d_relu_max_pool2d": fused_cases}.get(op, pool2d_cases)()


def layouts_of(op: str) -> tuple:
    """The layouts in which the rows of an operator are tested."""
    return CONV2D_LAYOUTS if op.startswith("conv2d") else POOL2D_LAYOUTS


@functools.cache
def shape_of(case, dtype: torch.dtype, layouts, *, allow_winograd: bool = False):
    """The shape of a case of any kind; ``layouts`` is an item of ``layouts_of`` its operator. ``allow_winograd`` is for
    the fused convolution: the plain one always allows it.
    """
    if isinstance(case, Conv2dCase):
        return conv2d_shape(case, dtype, *layouts)
    if isinstance(case, FusedCase):
        return fused_shape(case, dtype, *layouts, allow_winograd=allow_winograd)
    if isinstance(case, SizedPool2dCase):
        return case.shape(dtype, layouts)
    return pool2d_shape(case, dtype, layouts)


def choice(row: Row, shape, threads: int = 1) -> dict:
    """What a call of the row's op and direction with ``shape`` would run."""
    if row.op == "conv2d":
        return row.module.choose_conv2d(getattr(_native.Conv2dDirection, row.direction), shape, threads)
    if row.op == "conv2d_relu_max_pool2d":
        return row.module.choose_conv2d_relu_pool(getattr(_native.Conv2dDirection, row.direction), shape, threads)
    if row.op in SIZED_POOL2D_OPS:
        op = getattr(_native.SizedPool2dOp, row.op.removesuffix("_pool2d").removesuffix("2d"))
        direction = getattr(_native.SizedPool2dDirection, row.direction)
        return row.module.choose_sized_pool2d(op, direction, shape, threads)
    op, direction = getattr(_native.Pool2dOp, row.op.split("_")[0]), getattr(_native.Pool2dDirection, row.direction)
    return row.module.choose_pool2d(op, direction, shape, threads)


@functools.cache
def accepts(row: Row, shape) -> bool:
    """Whether ``row`` takes ``shape``."""
    if row.op == "conv2d":
        shape = shape.with_tf32(row.allows_tf32)
    with forced(row):
        try:
            choice(row, shape)
        except ValueError:
            return False
    return True


def run_conv2d(
    row: Row,
    case: Conv2dCase,
    layouts: tuple[str, str] = ("nchw", "nchw"),
    *,
    input: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
    shift: int = 0,
) -> torch.Tensor:
    """What ``row`` makes of those operands that its direction reads (the others are ignored)."""
    layout, weight_layout = layouts
    dtype = next(t.dtype for t in (input, weight, grad_output) if t is not None)
    shape = conv2d_shape(case, dtype, layout, weight_layout)

    def place(tensor: torch.Tensor | None, layout: str) -> torch.Tensor | None:
        return None if tensor is None else dense(tensor, layout, shift, row.device)

    def result(size: tuple[int, ...], layout: str) -> torch.Tensor:
        return empty(size, dtype, layout, shift, row.device)

    with forced(row):
        if row.direction == "forward":
            out = result(case.output_size, layout)
            _native.conv2d_forward(shape, place(input, layout), place(weight, weight_layout), place(bias, "nchw"), out)
        elif row.direction == "backward_input":
            out = result(case.input_size, layout)
            _native.conv2d_backward_input(shape, place(grad_output, layout), place(weight, weight_layout), out)
        elif row.direction == "backward_weight":
            out = result(case.weight_size, weight_layout)
            _native.conv2d_backward_weight(shape, place(grad_output, layout), place(input, layout), out)
        else:
            out = result((case.out_channels,), "nchw")
            _native.conv2d_backward_bias(shape, place(grad_output, layout), out)
    return out.cpu()


def run_fused(
    row: Row,
    case: FusedCase,
    layouts: tuple[str, str] = ("nchw", "nchw"),
    *,
    input: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    with_offsets: bool = True,
    shift: int = 0,
) -> tuple[torch.Tensor, ...]:
    """What ``row`` makes of those operands that it reads: one tensor, or the output and, with pooling, offsets."""
    layout, weight_layout = layouts
    dtype = next(t.dtype for t in (input, weight, grad_output) if t is not None)
    shape = fused_shape(case, dtype, layout, weight_layout, allow_winograd="_winograd_" in row.name)

    def place(tensor: torch.Tensor | None, layout: str = layout) -> torch.Tensor | None:
        return None if tensor is None else dense(tensor, layout, shift, row.device)

    def result(size: tuple[int, ...], layout: str = layout, dtype: torch.dtype = dtype) -> torch.Tensor:
        return empty(size, dtype, layout, shift, row.device)

    with forced(row):
        if row.direction == "forward":
            out = [result(case.output_size)]
            out += [result(case.output_size, dtype=torch.uint8)] if with_offsets and case.has_pooling else []
            offsets = out[1] if len(out) > 1 else None
            _native.conv2d_relu_max_pool2d_forward(
                shape, place(input), place(weight, weight_layout), place(bias), out[0], offsets
            )
        elif row.direction == "backward_input":
            out = [result(case.conv.input_size)]
            _native.conv2d_relu_max_pool2d_backward_input(
                shape, place(grad_output), place(mask), place(weight, weight_layout), *out
            )
        elif row.direction == "backward_weight":
            out = [result(case.conv.weight_size, weight_layout)]
            _native.conv2d_relu_max_pool2d_backward_weight(shape, place(grad_output), place(mask), place(input), *out)
        else:
            out = [result((case.conv.out_channels,))]
            _native.conv2d_relu_max_pool2d_backward_bias(shape, place(grad_output), place(mask), *out)
    return tuple(t.cpu() for t in out)


def run_pool2d(
    row: Row,
    case: Pool2dCase,
    layout: str = "nchw",
    *,
    input: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    with_offsets: bool = True,
    shift: int = 0,
) -> tuple[torch.Tensor, ...]:
    """What ``row`` makes of the operands that its direction reads: one tensor, or max pooling's output and offsets."""
    dtype = next(t.dtype for t in (input, grad_output) if t is not None)
    shape = pool2d_shape(case, dtype, layout)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return dense(tensor, layout, shift, row.device)

    def result(size: tuple[int, ...], dtype: torch.dtype = dtype) -> torch.Tensor:
        return empty(size, dtype, layout, shift, row.device)

    with forced(row):
        if row.direction == "backward":
            out = (result(case.input_size),)
            if row.op == "max_pool2d":
                _native.max_pool2d_backward(shape, place(grad_output), place(offsets), *out)
            else:
                _native.avg_pool2d_backward(shape, place(grad_output), *out)
        elif row.direction == "gather":
            out = (result(case.output_size),)
            _native.max_pool2d_gather(shape, place(input), place(offsets), *out)
        elif row.op == "avg_pool2d":
            out = (result(case.output_size),)
            _native.avg_pool2d_forward(shape, place(input), *out)
        else:
            out = (result(case.output_size), *([result(case.output_size, case.offsets_dtype)] if with_offsets else []))
            _native.max_pool2d_forward(shape, place(input), out[0], out[1] if with_offsets else None)
    return tuple(t.cpu() for t in out)


def run_sized_pool2d(
    row: Row,
    case: SizedPool2dCase,
    layout: str = "nchw",
    *,
    input: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    with_indices: bool = True,
    shift: int = 0,
) -> tuple[torch.Tensor, ...]:
    """What ``row`` makes of the operands that its direction reads: one tensor, or adaptive max pooling's two."""
    kernel = getattr(_native, f"{row.op}_{row.direction}")
    shape = case.shape(input.dtype, layout)

    def result(size: tuple[int, ...], dtype: torch.dtype = input.dtype) -> torch.Tensor:
        return empty(size, dtype, layout, shift, row.device)

    if row.op == "max_unpool2d":
        reads_large = row.direction == "gather"
        operands = (input if reads_large else grad_output, indices)
        out = (result(case.small_size if reads_large else case.large_size),)
    elif row.direction == "backward":
        operands, out = (grad_output,), (result(case.large_size),)
    else:
        operands, out = (input,), (result(case.small_size),)
        if row.op == "adaptive_max_pool2d":
            out = (*out, *([result(case.small_size, torch.int64)] if with_indices else []))
    absent = [None] if row.op == "adaptive_max_pool2d" and not with_indices else []
    with forced(row):
        kernel(shape, *(dense(operand, layout, shift, row.device) for operand in operands), *out, *absent)
    return tuple(t.cpu() for t in out)


def run(row: Row, case, layouts, **operands) -> tuple[torch.Tensor, ...]:
    """What ``row`` makes of those ``operands`` that it reads: one tensor, or output and offsets."""
    if row.op == "conv2d":
        return (run_conv2d(row, case, layouts, **operands),)
    if row.op in SIZED_POOL2D_OPS:
        return run_sized_pool2d(row, case, layouts, **operands)
    return (run_fused if row.op == "conv2d_relu_max_pool2d" else run_pool2d)(row, case, layouts, **operands)


@functools.cache
def naive(row: Row) -> Row:
    """The oracle of a row: the last one of its op and direction."""
    return rows(op=row.op, direction=row.direction)[-1] if row.device == "cpu" else naive(cpu_twin(row))


def cpu_twin(row: Row) -> Row:
    """The first CPU row of the same op and direction."""
    return next(r for r in rows(op=row.op, direction=row.direction) if r.device == "cpu")
