"""Memory for what an operator returns."""

from collections.abc import Sequence

import torch


def empty(
    size: Sequence[int], like: torch.Tensor, memory_format: torch.memory_format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor of ``size`` on the device of ``like``, of its dtype unless another one is named.

    torch takes half the time to read a size that comes as several numbers instead of as one tuple, and less to make a
    tensor like another one.
    """
    if dtype is None and memory_format is torch.contiguous_format:
        return like.new_empty(*size)
    return torch.empty(*size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)
