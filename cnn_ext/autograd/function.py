"""How the package's autograd.Functions are called.

Each is written once, in the style that torch.func needs (``forward`` without a context, then ``setup_context``). Plain
eager mode runs a twin in the older style, ``forward(ctx, ...)``, which torch calls faster.
"""

from collections.abc import Callable

import torch
from torch.autograd import Function


def _eager_twin(function: type[Function]) -> type[Function]:
    compute, setup_context = function.forward, function.setup_context

    def forward(ctx, *args):
        output = compute(*args)
        if any(ctx.needs_input_grad):
            setup_context(ctx, args, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(function.backward),
        "__doc__": function.__doc__,
    }
    return type(f"{function.__name__}Eager", (Function,), members)


def _distinct(args: tuple) -> list:
    """``args`` with views in place of tensors that came before: torch.compile traces no call with one tensor twice."""
    return [
        arg.view_as(arg) if isinstance(arg, torch.Tensor) and any(arg is earlier for earlier in args[:i]) else arg
        for i, arg in enumerate(args)
    ]


def needs_backward(*inputs: torch.Tensor | None) -> bool:
    """Whether a backward may come; under torch.func the tensors at hand do not tell."""
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(input is not None and input.requires_grad for input in inputs)


def in_layout(grad: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """``grad`` in the layout of the forward call, so that the gradients come in the layouts of their tensors."""
    return grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def differentiable(function: type[Function]) -> Callable:
    """The callable of a Function written with ``setup_context``: in plain eager mode it runs the twin."""
    function.generate_vmap_rule = True
    eager = _eager_twin(function)

    def apply(*args):
        if torch.compiler.is_compiling():
            return function.apply(*_distinct(args))
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return eager.apply(*args)

    return apply
