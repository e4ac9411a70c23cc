"""What adaptive pooling and unpooling may be passed; as ``cnn_ext.ops.shapes``. Sizes may lack the batch."""

import torch

from cnn_ext.ops.shapes import TensorSpec, check_device, dtype_name


def _refuse_empty(op: str, verb: str, input_size, first_axis: int, end: str = "") -> None:
    for axis in range(first_axis, len(input_size)):
        if input_size[axis] == 0:
            raise RuntimeError(
                f"{op}(): Expected input to have non-zero size for non-batch dimensions, but {verb} {list(input_size)} "
                f"with dimension {axis} being empty{end}"
            )


def check_adaptive_pool2d(op: str, input_size, output_size) -> None:
    """Checks an adaptive pooling; ``output_size`` is (height, width)."""
    is_max = op == "adaptive_max_pool2d"
    if len(input_size) not in (3, 4):
        colon = ":" if is_max else ""
        raise RuntimeError(f"{op}(): Expected 3D or 4D tensor, but got{colon} {list(input_size)}")
    _refuse_empty(op, "input has sizes", input_size, len(input_size) - (3 if is_max else 2))
    if output_size[0] < 0 or output_size[1] < 0:
        height, width = output_size
        if is_max:
            negative = height if height < 0 else width
            raise RuntimeError(
                f"Trying to create tensor with negative dimension {negative}: {[*input_size[:-2], height, width]}"
            )
        raise RuntimeError(
            f"{op}: elements of output_size must be greater than or equal to 0 but received {{{height}, {width}}}"
        )


def check_unpool2d(input: TensorSpec, indices: TensorSpec) -> None:
    """Checks the tensors of an unpooling; whether the indices lie within the result is found out by the kernel."""
    if indices.dtype != torch.int64:
        raise RuntimeError(f"elements in indices should be type int64 but got: {dtype_name(indices.dtype)}")
    if list(indices.size) != list(input.size):
        raise RuntimeError(
            f"Expected shape of indices to be same as that of the input tensor ({list(input.size)}) but got indices "
            f"tensor with shape: {list(indices.size)}"
        )
    check_device("indices", indices.device, input.device)
    if len(input.size) not in (3, 4):
        raise RuntimeError(
            f"Input to max_unpooling2d should be a 3d or 4d Tensor, but got a tensor with {len(input.size)} dimensions."
        )


def refuse_empty_unpool2d(input_size) -> None:
    """Refuses an unpooling of nothing."""
    _refuse_empty("max_unpooling2d_forward_out_cpu", "got", input_size, len(input_size) - 3, ".")
