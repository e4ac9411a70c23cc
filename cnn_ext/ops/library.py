"""The namespace ``torch.ops.cnn_ext`` and how an operator enters it."""

import functools
from collections.abc import Callable

import torch

from cnn_ext._native import NoMemoryError
from cnn_ext.ops.batching import vmap_rule
from cnn_ext.ops.onnx import TRANSLATIONS

_LIBRARY = torch.library.Library("cnn_ext", "DEF")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})


def _with_tuples(function: Callable) -> Callable:
    """The dispatcher hands lists over; as tuples they may be keys of a cache, and are what direct callers pass."""

    @functools.wraps(function)
    def call(*args):
        return function(*(tuple(arg) if type(arg) is list else arg for arg in args))

    return call


def register(schema: str, compute: Callable, fake: Callable) -> Callable:
    """Defines an operator with one implementation for both devices and a fake one, and returns what calls it.

    Plain tensors that nobody observes go to the implementation directly: the dispatcher would take longer than the
    kernel of a small problem. Tensors whose memory holds the negative of their values (``x.conj().imag``) and zeros
    that have no memory (tangents may) do not: it writes them out. Hints, which the operator does not have, go there
    alone: they change no result.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _with_tuples(compute), "CPU")
    _LIBRARY.impl(name, _with_tuples(compute), "CUDA")
    torch.library.register_fake(f"cnn_ext::{name}", _with_tuples(fake), lib=_LIBRARY)
    operator = getattr(torch.ops.cnn_ext, name).default
    torch.library.register_vmap(f"cnn_ext::{name}", vmap_rule(operator), lib=_LIBRARY)
    tensors = sum(str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in operator._schema.arguments)

    def dispatch(*args):
        if torch.onnx.is_in_onnx_export() and name in TRANSLATIONS:
            return TRANSLATIONS[name](*args)
        return operator(*args)

    # Who may want to see the operator: torch.compile, a mode, a transform, a tracer, a profiler. This runs before every
    # call, so the functions are looked up once.
    compiling, modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
    transformed, traced = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
    profiled = torch.autograd._profiler_enabled

    def call(*args, **hints):
        if compiling() or modes() or transformed() or traced() or profiled():
            return dispatch(*args)
        for arg in args[:tensors]:
            if type(arg) not in _PLAIN or (arg is not None and arg.is_neg()):
                return operator(*args)
        if not (args[0].is_cpu or args[0].is_cuda):
            return operator(*args)
        try:
            return compute(*args, **hints)
        except NoMemoryError:
            if any(isinstance(arg, torch.Tensor) and arg._is_zerotensor() for arg in args):
                return operator(*args)
            raise

    return call
