"""The namespace ``torch.ops.cnn_ext`` and how an operator enters it."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("cnn_ext", "DEF")


def register(schema: str, compute: Callable, fake: Callable) -> Callable:
    """Defines an operator with one implementation for both devices and a fake one, and returns what calls it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CPU")
    _LIBRARY.impl(name, compute, "CUDA")
    torch.library.register_fake(f"cnn_ext::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.cnn_ext, name).default
