"""What is kept of tensors that stay the same: the packed weights of a layer, for :func:`cnn_ext.pack`."""

from collections.abc import Callable

import torch

from cnn_ext._native import PackedWeight


class Kept:
    """The value of a function of some tensors and numbers, for as long as these are the same and unchanged.

    Unchanged is what torch's version counter does not count: writes through ``.data`` or NumPy go unseen. The tensors'
    memory is held, so that none comes back at the address of another. Copied or pickled it is empty.
    """

    def __init__(self):
        self._kept = None

    def __reduce__(self):
        return Kept, ()

    def of(self, compute: Callable, tensors: tuple, numbers: tuple = ()):
        """``compute()``, or what it gave for the same arguments before. A tensor may be None."""
        kept = self._kept
        if kept is not None and numbers == kept[2] and all(map(_is_same, tensors, *kept[:2])):
            return kept[3]
        value = compute()
        aliases = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
        self._kept = aliases, tuple(map(_version, tensors)), numbers, value
        return value

    def clear(self) -> None:
        self._kept = None


def _version(tensor: torch.Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


def _is_same(tensor: torch.Tensor | None, alias: torch.Tensor | None, version: int) -> bool:
    if tensor is None or alias is None:
        return tensor is alias
    if tensor.data_ptr() != alias.data_ptr() or tensor._version != version:
        return False
    return tensor.shape == alias.shape and tensor.stride() == alias.stride()


class Packing:
    """What a layer keeps: its packed weight, and the weight with a normalisation folded in."""

    def __init__(self):
        self.packed, self.folded = Kept(), Kept()

    def packed_weight(self, weight: torch.Tensor) -> PackedWeight | None:
        """The packed weight, which a kernel fills at its first call.

        None where it cannot be kept: on CUDA, and of an inference tensor, which does not count its changes.
        """
        if not weight.is_cpu or weight.is_inference():
            return None
        return self.packed.of(PackedWeight, (weight,))

    def clear(self) -> None:
        self.packed.clear()
        self.folded.clear()

    @property
    def bytes(self) -> int:
        """Of the packed weight."""
        kept = self.packed._kept
        return 0 if kept is None else kept[-1].bytes
