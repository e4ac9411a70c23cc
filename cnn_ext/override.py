"""torch.nn.functional's convolutions and poolings caught where they are called, and computed by this package.

A mode sees every function of torch that is called while it is active; those that ``cnn_ext.functional`` has under the
same name are replaced. A function that joins ``cnn_ext.functional`` joins here.
"""

import functools
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from cnn_ext import functional

__all__ = ["override"]


def _with_indices(function: Callable, *args, **kwargs):
    """What F.max_pool2d_with_indices and its like return; they have an argument ``return_indices`` without effect."""
    return function(*args, **(kwargs | {"return_indices": True}))


def _replacements() -> dict:
    """This package's function for each of torch's: F.conv2d, torch.conv2d, F.max_pool2d, F.max_pool2d_with_indices."""
    replacements = {}
    for name in functional.__all__:
        ours = getattr(functional, name)
        with_indices = functools.partial(_with_indices, ours)
        for module in (torch.nn.functional, torch):
            for suffix, function in (("", ours), ("_with_indices", with_indices)):
                theirs = getattr(module, name + suffix, None)
                if theirs is not None:
                    replacements[theirs] = function
    return replacements


_REPLACEMENTS = _replacements()


class override(TorchFunctionMode):  # noqa: N801 (a context manager, as flags)
    """While the context lasts, ``F.conv2d``, ``F.max_pool2d`` and their like are computed by this package.

    It holds for the calls of this thread, from wherever they come: a model's forward, torch.nn's layers, torchvision.
    Arguments that this package does not serve (an integer dtype, another device) raise NotImplementedError.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _REPLACEMENTS.get(function, function)(*args, **(kwargs or {}))
