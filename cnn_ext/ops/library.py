"""The namespace ``torch.ops.cnn_ext`` and how an operator enters it."""

from collections.abc import Callable

import torch

from cnn_ext.ops.batching import vmap_rule
from cnn_ext.ops.onnx import TRANSLATIONS

_LIBRARY = torch.library.Library("cnn_ext", "DEF")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})


def _is_observed(
    # Bound once: this runs before every call.
    modes=torch._C._len_torch_dispatch_stack,
    transformed=torch._C._are_functorch_transforms_active,
    traced=torch._C._get_tracing_state,
    profiled=torch.autograd._profiler_enabled,
) -> bool:
    """Whether a mode, a transform, a tracer or a profiler wants to see the operator."""
    return modes() or transformed() or traced() or profiled()


def register(schema: str, compute: Callable, fake: Callable) -> Callable:
    """Defines an operator with one implementation for both devices and a fake one, and returns what calls it.

    Plain tensors that nobody observes go to the implementation directly: the dispatcher would take longer than the
    kernel of a small problem.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CPU")
    _LIBRARY.impl(name, compute, "CUDA")
    torch.library.register_fake(f"cnn_ext::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.cnn_ext, name).default
    torch.library.register_vmap(f"cnn_ext::{name}", vmap_rule(operator), lib=_LIBRARY)
    tensors = sum(str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in operator._schema.arguments)

    def dispatch(*args):
        if torch.onnx.is_in_onnx_export() and name in TRANSLATIONS:
            return TRANSLATIONS[name](*args)
        return operator(*args)

    def call(*args):
        if torch.compiler.is_compiling() or _is_observed():
            return dispatch(*args)
        first = args[0]
        if (first.is_cpu or first.is_cuda) and _PLAIN.issuperset(map(type, args[:tensors])):
            return compute(*args)
        return operator(*args)

    return call
