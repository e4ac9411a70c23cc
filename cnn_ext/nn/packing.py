"""Packed weights that layers keep between calls, for inference."""

import torch
from torch.nn.utils import parametrize

from cnn_ext.nn.conv import Conv1d, Conv2d
from cnn_ext.ops.packing import Packing


def pack(model: torch.nn.Module) -> torch.nn.Module:
    """Makes the convolutions of ``model`` that this package computes keep their packed weights between calls.

    A convolution copies its weight into the order in which its kernel reads it, at every call. A packed layer does so
    once, at the first call in evaluation mode under ``torch.no_grad()`` or ``torch.inference_mode()``, and keeps the
    copy: as much memory again as its weight takes. Of a chain that ``convert(fuse=True)`` made it also keeps the weight
    with the batch normalisation folded in. Results have the same bits as without.

    The copy is made anew when the weight was written to, replaced or moved (an optimiser's step, ``load_state_dict``,
    ``.to()``), and when an input needs another form of it (the last one is kept); a call in training mode drops it.
    Writes that torch's version counter does not see, through ``.data`` or NumPy, are not noticed: call ``pack`` again
    after them. Layers of other classes, transposed convolutions, parametrized weights, calls under autocast, float16
    and CUDA compute as before.

    Args:
        model: any module, a single layer too; as a rule one that :func:`convert` gave.

    Returns:
        the model, whose parameters and ``state_dict`` are what they were. :func:`revert` takes the copies away.

    Raises:
        ValueError: there is no convolution of this package in it.
    """
    layers = [module for module in model.modules() if isinstance(module, (Conv1d, Conv2d))]
    if not layers:
        raise ValueError("pack(): expected a model with convolutions of cnn_ext (see convert()), but it has none")
    for layer in layers:
        if not parametrize.is_parametrized(layer):
            layer.packing = Packing()
    return model


def unpack(layer: torch.nn.Module) -> None:
    """Takes what a layer keeps away from it."""
    layer.__dict__.pop("packing", None)
