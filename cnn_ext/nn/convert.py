"""Swaps the layers of a model for this package's and back.

A layer is swapped by its class alone: the module object with its parameters, buffers, hooks, name and training mode
stays the same, so whatever refers to it (an optimiser, a hook handle, weight tying) goes on working.
"""

import copy
from collections.abc import Callable, Container

import torch

from cnn_ext._arguments import is_per_side
from cnn_ext.nn.conv import Conv2d
from cnn_ext.nn.pooling import AvgPool2d, MaxPool2d

_REPLACEMENTS = {torch.nn.Conv2d: Conv2d, torch.nn.MaxPool2d: MaxPool2d, torch.nn.AvgPool2d: AvgPool2d}
_ORIGINALS = {ours: theirs for theirs, ours in _REPLACEMENTS.items()}

Selection = Container[str] | Callable[[str, torch.nn.Module], bool] | None


def _selected(selection: Selection, name: str, module: torch.nn.Module) -> bool:
    """Whether a selection (names, or a function of name and module) takes a layer."""
    if callable(selection):
        return bool(selection(name, module))
    return name in selection


def convert(
    model: torch.nn.Module,
    *,
    inplace: bool = True,
    only: Selection = None,
    skip: Selection = None,
    fuse: bool = False,
    functional: bool = False,
) -> torch.nn.Module:
    """Makes every Conv2d, MaxPool2d and AvgPool2d of ``model`` compute with this package.

    Exactly torch's classes are swapped; a subclass with a forward of its own is left alone.

    Args:
        model: any module, a single layer too.
        inplace: whether to change ``model`` itself, or a deep copy of it.
        only: the layers to swap: a container of their qualified names, or a function of name and module.
        skip: layers to leave alone, given likewise.
        fuse, functional: not there yet.

    Returns:
        the model. :func:`revert` is the way back.
    """
    for name, value in (("fuse", fuse), ("functional", functional)):
        if value:
            raise NotImplementedError(f"convert() does not support {name}={value!r} yet; expected {name}=False")
    if not inplace:
        model = copy.deepcopy(model)
    for name, module in model.named_modules():
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is None or (only is not None and not _selected(only, name, module)):
            continue
        if skip is None or not _selected(skip, name, module):
            module.__class__ = replacement
    return model


def _check_revertible(name: str, module: torch.nn.Module) -> None:
    padding = module.padding
    if isinstance(padding, str):
        known = ("valid", "same") if module.stride == (1, 1) else ("valid",)
        foreign = type(module) is not Conv2d or padding not in known
    else:
        foreign = is_per_side(padding)
    if foreign:
        raise ValueError(f"revert(): torch has no padding={padding!r}, which {name or 'the model'} ({module}) uses")


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Gives the layers of ``model`` back to torch, in place: the inverse of :func:`convert`.

    A layer with a padding that torch does not know is refused before anything is changed.
    """
    ours = [(name, module) for name, module in model.named_modules() if type(module) in _ORIGINALS]
    for name, module in ours:
        _check_revertible(name, module)
    for _, module in ours:
        module.__class__ = _ORIGINALS[type(module)]
    return model
