"""Which class of this package's a layer's class is to be swapped for, and back."""

import functools

import torch
from torch.nn.utils import parametrize

from cnn_ext.nn.conv import (
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    LazyConv1d,
    LazyConv2d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
)
from cnn_ext.nn.derived import Derived, derived_class
from cnn_ext.nn.pooling import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxUnpool2d,
)

LAYERS = (
    *(Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d),
    *(LazyConv1d, LazyConv2d, LazyConvTranspose1d, LazyConvTranspose2d),
    *(MaxPool1d, MaxPool2d, AvgPool1d, AvgPool2d),
    *(AdaptiveAvgPool2d, AdaptiveMaxPool2d, MaxUnpool2d),
)
REPLACEMENTS = {getattr(torch.nn, layer.__name__): layer for layer in LAYERS}  # which are named as torch's are
_ORIGINALS = {ours: theirs for theirs, ours in REPLACEMENTS.items()}
_COMPUTING = ("__call__", "forward", "_conv_forward")  # the methods that say what a layer computes


def torchs_class(cls: type) -> type | None:
    """The nearest base of ``cls`` that is a layer of torch's which this package has as well."""
    return next((base for base in cls.__mro__ if base in REPLACEMENTS), None)


def computes_itself(layer: torch.nn.Module) -> bool:
    """Whether a layer's class, or the object, has a forward of its own in place of torch's."""
    theirs = torchs_class(type(layer))
    return any(
        name in vars(layer) or getattr(type(layer), name, None) is not getattr(theirs, name, None)
        for name in _COMPUTING
    )


class _Swapped(Derived):
    """Mixed into the class made for a subclass of torch's."""


@functools.cache
def _swapped(cls: type) -> type:
    """The class for ``cls`` that computes with this package.

    For a subclass of torch's, this package's class is put between the two: what it leaves to torch's comes here.
    """
    theirs = torchs_class(cls)
    return REPLACEMENTS[cls] if cls is theirs else derived_class(_swapped, cls, _Swapped, cls, REPLACEMENTS[theirs])


def _rebased(cls: type, base: type) -> type:
    """The class that torch.nn.utils.parametrize made for one layer, made of another base."""
    names = {name: member for name, member in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), names)


def swap(layer: torch.nn.Module) -> None:
    """Makes a layer compute with this package, if its class leaves the computation to one of torch's."""
    cls = type(layer)
    if torchs_class(cls) is None or computes_itself(layer):
        return
    if parametrize.is_parametrized(layer):
        layer.__class__ = _rebased(cls, _swapped(cls.__base__))
    else:
        layer.__class__ = _swapped(cls)


def _original(cls: type) -> type | None:
    return cls.original if issubclass(cls, _Swapped) else _ORIGINALS.get(cls)


def unswapped_class(layer: torch.nn.Module) -> type | None:
    """The class that a layer which computes with this package goes back to; None for another layer."""
    cls = type(layer)
    if not parametrize.is_parametrized(layer):
        return _original(cls)
    base = _original(cls.__base__)
    return None if base is None else _rebased(cls, base)
