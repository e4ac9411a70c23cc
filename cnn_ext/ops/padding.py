"""Padding modes where no kernel maps indices: a padded copy of the input, and the gradient folded back into it.

``padding`` is (top, bottom, left, right); what each mode may fill is checked by the operators. Slices and copies alone:
the order in which ``fold`` adds is fixed, and nothing waits for the device.
"""

import torch

from cnn_ext.ops.results import empty

NO_PADDING = (0, 0, 0, 0)


def pads_a_copy(mode: str, tensor: torch.Tensor) -> bool:
    """Whether the padding of a mode is written out: the kernels of CUDA know zeros alone."""
    return mode != "zeros" and tensor.is_cuda


def _sides(padded: torch.Tensor, axis: int, padding, mode: str):
    """Along an axis: the two paddings, each with the elements that it copies, which lie inside."""
    before, after = padding[2 * (axis - 2) : 2 * (axis - 2) + 2]
    size = padded.shape[axis] - before - after
    inside = padded.narrow(axis, before, size)
    if mode == "reflect":
        sources = inside.narrow(axis, min(1, before), before), inside.narrow(axis, size - after - min(1, after), after)
    elif mode == "replicate":
        sources = inside.narrow(axis, 0, 1), inside.narrow(axis, size - 1, 1)
    else:
        sources = inside.narrow(axis, size - before, before), inside.narrow(axis, 0, after)
    return zip((padded.narrow(axis, 0, before), padded.narrow(axis, before + size, after)), sources, strict=True)


def padded_size(size, padding) -> tuple[int, int, int, int]:
    top, bottom, left, right = padding
    return (*size[:2], size[2] + top + bottom, size[3] + left + right)


def _inside(padded: torch.Tensor, padding) -> torch.Tensor:
    top, bottom, left, right = padding
    return padded[:, :, top : padded.shape[2] - bottom, left : padded.shape[3] - right]


def pad(input: torch.Tensor, padding, mode: str, memory_format: torch.memory_format) -> torch.Tensor:
    """[N, C, H, W] with the elements around it that ``mode`` ('reflect', 'replicate', 'circular') takes from it."""
    padded = empty(padded_size(input.shape, padding), input, memory_format)
    _inside(padded, padding).copy_(input)
    for axis in (2, 3):  # the columns' padding copies the rows', corners and all
        for side, source in _sides(padded, axis, padding, mode):
            side.copy_(source.flip(axis) if mode == "reflect" else source)
    return padded


def fold(grad: torch.Tensor, padding, mode: str, memory_format: torch.memory_format) -> torch.Tensor:
    """The gradient of ``pad``: each element of the padding is added, in ``grad`` itself, to the one that it copied."""
    for axis in (3, 2):
        for side, source in _sides(grad, axis, padding, mode):
            if mode == "replicate":
                source.add_(side.sum(axis, keepdim=True))
            else:
                source.add_(side.flip(axis) if mode == "reflect" else side)
    return _inside(grad, padding).contiguous(memory_format=memory_format)
