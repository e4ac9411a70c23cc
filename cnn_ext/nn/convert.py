"""Swaps the layers of a model for this package's and back.

A layer is swapped by its class alone: the module object with its parameters, buffers, hooks, name and training mode
stays the same, so whatever refers to it (an optimiser, a hook handle, weight tying) goes on working.
"""

import copy
import dataclasses
from collections.abc import Callable, Container

import torch

from cnn_ext._arguments import is_per_side
from cnn_ext.nn.conv import Conv1d, Conv2d
from cnn_ext.nn.derived import Overridden, overridden
from cnn_ext.nn.fuse import Fused, find_chains, unfuse
from cnn_ext.nn.fused import ConvReLUPool2d
from cnn_ext.nn.packing import unpack
from cnn_ext.nn.swap import computes_itself, swap, torchs_class, unswapped_class

_POOL_KINDS = ("MaxPool", "AvgPool", "LPPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "MaxUnpool")
_KINDS = (torch.nn.modules.conv._ConvNd, *(getattr(torch.nn.modules.pooling, f"_{kind}Nd") for kind in _POOL_KINDS))

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
    """Makes the convolutions and poolings of ``model`` that this package has compute with it.

    Torch's classes and their subclasses are swapped; one with a forward of its own is left alone.

    With ``fuse``, a ``torch.nn.Sequential`` computes each chain Conv2d (- BatchNorm2d) - ReLU (- MaxPool2d) or Conv2d -
    BatchNorm2d in it at once, as it stands at the call. Called by itself or in a slice, each layer computes its own
    part, and so it does from the first layer of a chain that has hooks. A batch normalisation is multiplied into the
    weight in evaluation mode and runs by itself in training mode. Where the weight's dtype is half, its product with
    the normalisation's factor is rounded to it once more. A pool with padding, dilation, ``ceil_mode`` or
    ``return_indices`` is not fused.

    Args:
        model: any module, a single layer too.
        inplace: whether to change ``model`` itself, or a deep copy of it.
        only: the layers to swap: a container of their qualified names, or a function of name and module.
        skip: layers to leave alone, given likewise.
        fuse: whether to fuse chains whose layers are all selected.
        functional: whether the model's forward is to run under :func:`cnn_ext.override`, which also catches
            ``F.conv2d``, ``F.max_pool2d`` and their like, called by whatever layer.

    Returns:
        the model. :func:`revert` is the way back.

    Raises:
        ValueError: ``functional`` together with ``only`` or ``skip``: it catches every call; or for a TorchScript
            module, whose forward is not Python's.
    """
    if functional:
        _check_functional(model, only, skip)
    if not inplace:
        model = copy.deepcopy(model)

    def is_selected(name: str, module: torch.nn.Module) -> bool:
        taken = only is None or _selected(only, name, module)
        return taken and (skip is None or not _selected(skip, name, module))

    for name, module in model.named_modules():
        if is_selected(name, module):
            swap(module)
    if fuse:
        for chain in list(find_chains(model, is_selected)):
            chain.fuse()
    if functional and not isinstance(model, Overridden):
        model.__class__ = overridden(type(model))
    return model


def _check_functional(model: torch.nn.Module, only: Selection, skip: Selection) -> None:
    if only is not None or skip is not None:
        raise ValueError("convert(): functional=True catches every call in a forward; expected neither only nor skip")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("convert(): functional=True expected a module with a forward in Python, but got TorchScript")


def _check_revertible(name: str, module: torch.nn.Module) -> None:
    if type(module) is ConvReLUPool2d:
        raise ValueError(f"revert(): torch has no layer like {name or 'the model'} ({module})")
    if unswapped_class(module) is None:
        return
    padding = getattr(module, "padding", 0)
    if isinstance(padding, str):
        is_convolution = isinstance(module, (Conv1d, Conv2d))
        known = ("valid", "same") if is_convolution and set(module.stride) == {1} else ("valid",)
        foreign = not is_convolution or padding not in known
    else:
        foreign = is_per_side(padding)
    if foreign:
        raise ValueError(f"revert(): torch has no padding={padding!r}, which {name or 'the model'} ({module}) uses")


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Gives the layers of ``model`` back to torch, in place: the inverse of :func:`convert`.

    A layer with a padding that torch does not know is refused before anything is changed.
    """
    for name, module in model.named_modules():
        _check_revertible(name, module)
    for module in model.modules():
        unpack(module)
        unfuse(module)
        while isinstance(module, (Overridden, Fused)):
            module.__class__ = module.original
        if (original := unswapped_class(module)) is not None:
            module.__class__ = original
    return model


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One convolution or pooling of a model: who computes it, and why not this package."""

    name: str
    layer: str
    converted: bool
    reason: str  # empty where converted
    note: str = ""  # on the fusion of a converted layer


class ConversionReport(tuple[LayerReport, ...]):
    """The layers in the order of the model; prints as a table."""

    def __str__(self) -> str:
        width = max((len(row.name) for row in self), default=0)
        who = ((row, row.reason or f"cnn_ext{', ' if row.note else ''}{row.note}") for row in self)
        return "\n".join(f"{row.name:{width}}  {row.layer:20}  {text}" for row, text in who)


def _reason(module: torch.nn.Module) -> str:
    """Why torch computes a layer; empty where this package does."""
    if type(module) is ConvReLUPool2d or unswapped_class(module) is not None:
        return ""
    if torchs_class(type(module)) is None:
        return "torch: this package has no such layer"
    if computes_itself(module):
        return "left alone: it has a forward of its own"
    return "torch: not converted"


def conversion_report(model: torch.nn.Module) -> ConversionReport:
    """Which convolutions and pools of ``model`` this package computes, which torch does, and why; what is fused, and
    which hooks stand in the way of it."""
    notes, followers = {}, {}
    for chain in find_chains(model, lambda name, module: True):
        notes[chain.conv[0]] = chain.note()
        followers |= {name: f"computed with {chain.conv[0]}" for name, _ in chain.fused_followers()}
    reports = []
    for name, module in model.named_modules():
        if isinstance(module, _KINDS) or name in followers:
            reason = "" if name in followers else _reason(module)
            note = followers.get(name) or notes.get(name, "")
            reports.append(LayerReport(name, type(module).__name__, not reason, reason, note))
    return ConversionReport(reports)
