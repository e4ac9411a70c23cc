"""How the package's autograd.Functions are called.

Each is written once, with ``forward`` without a context, then ``setup_context``, ``backward`` and ``jvp``. Plain eager
mode, torch.compile and torch.func each run a variant made of these functions.
"""

import operator
import threading
from collections.abc import Callable, Sequence

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_map_only

from cnn_ext.ops.shapes import is_channels_last, spec


def _skipping_undefined(backward: Callable) -> Callable:
    """A backward that passes a gradient on only where one came."""

    def skipping(ctx, *grads):
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    return skipping


def _variant(function: type[Function], name: str, **members: Callable) -> type[Function]:
    """A Function with the gradients of ``function`` and members of its own."""
    members = {name: staticmethod(member) for name, member in members.items()}
    members |= {"backward": staticmethod(_skipping_undefined(function.backward)), "__doc__": function.__doc__}
    return type(f"{function.__name__}{name}", (Function,), members)


def _eager_variant(function: type[Function]) -> type[Function]:
    """In the style that torch calls fastest."""
    compute, setup_context = function.forward, function.setup_context

    def forward(ctx, *args):
        output = compute(*args)
        setup_context(ctx, args, output)
        return output

    return _variant(function, "Eager", forward=forward, jvp=function.jvp)


def _traced_variant(function: type[Function]) -> type[Function]:
    """Without forward mode, as torch.compile wants it."""
    return _variant(function, "Traced", forward=function.forward, setup_context=function.setup_context)


class _Leaf:
    """An argument that torch.func is not to look into: it counts the items of a tuple wrongly in nested transforms."""

    def __init__(self, value):
        self.value = value


def _value(arg):
    return arg.value if isinstance(arg, _Leaf) else arg


def _refuse_nested_forward_mode() -> None:
    """torch computes the tangent of a Function's tangent as 0."""
    levels = [level.key() for level in get_interpreter_stack() or ()]
    if levels.count(TransformType.Jvp) > 1:
        raise NotImplementedError(
            "cnn_ext: forward mode within forward mode is not supported by autograd.Function: "
            "take jacfwd(jacrev(f)) instead of jacfwd(jacfwd(f))"
        )


def _transformed_variant(function: type[Function]) -> type[Function]:
    """For torch.func, which derives how it is mapped; arguments that are no tensors come as leaves."""
    compute, set_up = function.forward, function.setup_context

    def forward(*args):
        return compute(*map(_value, args))

    def setup_context(ctx, inputs, output):
        # What torch.vmap derives takes the tensors kept for backward and for jvp to be the same, and maps no None.
        ctx.keeps_all = True
        set_up(ctx, tuple(map(_value, inputs)), output)
        ctx.set_materialize_grads(True)

    def jvp(ctx, *tangents):
        _refuse_nested_forward_mode()
        return function.jvp(ctx, *tangents)

    variant = _variant(function, "Transformed", forward=forward, setup_context=setup_context, jvp=jvp)
    variant.generate_vmap_rule = True
    return variant


def _distinct(args: tuple) -> list:
    """``args`` with views in place of tensors that came before: torch.compile traces no call with one tensor twice."""
    return [
        arg.view_as(arg) if isinstance(arg, torch.Tensor) and any(arg is earlier for earlier in args[:i]) else arg
        for i, arg in enumerate(args)
    ]


def _as_traced(arg):
    """While torch.jit traces, sizes come as tensors; it records a call of a Function with numbers."""
    return arg if isinstance(arg, torch.Tensor) else tree_map_only(torch.Tensor, int, arg)


class _Pass(threading.local):
    """The backward pass that runs in a thread, and the places, of a Function, of leaves that it was asked for."""

    task = -1
    leaves = frozenset()


_pass = _Pass()


def asked_gradients(ctx) -> tuple[bool, ...]:
    """``ctx.needs_input_grad`` within backward, without the inputs that this backward pass leaves out, as
    torch.autograd.grad(output, weight) leaves out the input.

    torch tells, outside of its transforms, whether the node of an input runs.
    """
    needs = ctx.needs_input_grad
    if sum(needs) == 1 or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return needs
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # one for each input that needs a gradient
    return tuple(is_needed and _is_asked(next(nodes), (type(ctx), i)) for i, is_needed in enumerate(needs))


def _is_asked(node, place: tuple[type, int]) -> bool:
    """Whether the node of the input at ``place`` runs in this pass.

    Of a leaf that torch.autograd.grad is asked for torch refuses to tell, which takes as long as a small kernel. So it
    is not asked again in this pass: a later leaf at the same place, the next layer's weight say, counts as asked for.
    """
    task = torch._C._current_graph_task_id()
    if _pass.task != task:
        _pass.task, _pass.leaves = task, frozenset()
    if place in _pass.leaves and isinstance(node, torch._C._functions.AccumulateGrad):
        return True
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        _pass.leaves |= {place}
        return True


def save(ctx, tensors: tuple, needed: tuple) -> None:
    """Keeps what backward needs of ``tensors``, None in place of others; ``jvp``, which torch calls at once if at all,
    finds them all.

    Gradients and tangents that do not exist are to come as None.
    """
    ctx.set_materialize_grads(False)
    keeps_all = getattr(ctx, "keeps_all", False)
    ctx.save_for_backward(*(tensors if keeps_all else needed))
    if (keeps_all or forward_ad._current_level >= 0) and not torch.compiler.is_compiling():
        ctx.save_for_forward(*tensors)


def bilinear_tangent(function: Callable, operands: tuple, tangents: tuple) -> torch.Tensor | None:
    """The tangent of ``function(first, second)``, which is linear in each; a tangent that is None is 0."""
    (first, second), (first_tangent, second_tangent) = operands, tangents
    if first_tangent is None:
        return None if second_tangent is None else function(first, second_tangent)
    tangent = function(first_tangent, second)
    return tangent if second_tangent is None else tangent + function(first, second_tangent)


def needs_backward(*arguments) -> bool:
    """Whether a derivative may be asked for; under torch.func, in forward mode and while torch.jit traces, the tensors
    at hand do not tell."""
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
        return True
    return _asks_for_derivative(arguments)


def _asks_for_derivative(arguments, is_grad_enabled=torch.is_grad_enabled, tensor=torch.Tensor) -> bool:
    """The same in plain eager mode. This runs before every call, so the functions are looked up once."""
    if is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, tensor) and argument.requires_grad:
                return True
    return forward_ad._current_level >= 0


def lies_channels_last(tensor: torch.Tensor) -> bool:
    """``is_channels_last`` of a 4-D tensor, soon decided where it is not."""
    stride = tensor.stride()
    return stride[1] <= stride[3] and is_channels_last(spec(tensor))


def weight_form(weight: torch.Tensor) -> tuple[Sequence[int], bool]:
    """Size, and whether channels_last: what the gradient of a weight has of it."""
    return weight.shape, lies_channels_last(weight)


def in_layout(grad: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """``grad`` in the layout of the forward call, so that the gradients come in the layouts of their tensors.

    Under torch.func it stays as it is: a mapped tensor's layout is another matter.
    """
    if torch._C._are_functorch_transforms_active():
        return grad
    if not channels_last:
        return grad.contiguous()
    grad = grad.contiguous(memory_format=torch.channels_last)
    # A plane of one element is both at once: its strides are to say which.
    return grad if is_channels_last(spec(grad)) else grad.clone(memory_format=torch.channels_last)


def differentiable(function: type[Function], compute: Callable | None = None) -> Callable:
    """The callable of a Function written with ``setup_context``: each caller of it gets the variant it needs, and one
    that asks for no derivative none, which is the fastest: it calls ``compute``, if given with hints, which change no
    result, else ``function.forward``."""
    eager, traced, transformed = (make(function) for make in (_eager_variant, _traced_variant, _transformed_variant))
    compute = compute or function.forward
    apply_eagerly = super(Function, eager).apply  # without what torch's own apply does for torch.func

    compiling, transforming = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
    tracing = torch._C._get_tracing_state

    def apply(*args, **hints):
        if compiling():
            return traced.apply(*_distinct(args))
        if transforming():
            return transformed.apply(*(_Leaf(arg) if isinstance(arg, tuple) else arg for arg in args))
        if tracing():
            return apply_eagerly(*map(_as_traced, args))
        try:
            return apply_eagerly(*args) if _asks_for_derivative(args) else compute(*args, **hints)
        except RuntimeError:
            living = unwrap_dead_wrappers(args)  # of tensors that outlived their transform
            if all(map(operator.is_, args, living)):
                raise
            return apply(*living)

    return apply
