"""torch.vmap over the raw operators: one call of the operator for the whole mapped dimension, no loop.

The mapped dimension joins one of the indices that an operator has anyway. A convolution, its gradient for the input and
that for the weight tie three tensors to each other: input [N, C, ..], weight [K, C / groups, ..] and output [N, K, ..].
Where one of the three is not mapped, the dimension joins the index which that one lacks: images, output channels or
input channels. Where all are, it multiplies the groups. Poolings take it as images.
"""

from collections.abc import Callable

import torch

# What each argument is to the convolution or the pooling, by its name; *_size are sizes of tensors.
_ROLES = {
    "input": "input",
    "input_size": "input",
    "weight": "weight",
    "weight_size": "weight",
    "bias": "bias",
    "input_bias": "input_bias",
    "grad_output": "output",
    "mask": "output",
    "offsets": "output",
    "indices": "output",
}
# What an operator computes, by the end of its name.
_RESULTS = {
    "transpose2d_forward": "input",
    "forward": "output",
    "gather": "output",
    "scatter": "input",
    "backward": "input",
    "backward_input": "input",
    "backward_weight": "weight",
    "backward_bias": "bias",
}
# Each way to take the mapped dimension in: the axis of each tensor that it joins, and whether it stands inside of the
# groups there (channels are numbered group by group) or outside.
_IMAGES = {"input": (0, False), "output": (0, False)}
_OUT_CHANNELS = {"output": (1, True), "weight": (0, True), "bias": (0, True)}
_IN_CHANNELS = {"input": (1, True), "weight": (1, False), "input_bias": (0, True)}
_GROUPS = {
    "input": (1, False),
    "output": (1, False),
    "weight": (0, False),
    "bias": (0, False),
    "input_bias": (0, False),
}
_WITHOUT = {"weight": _IMAGES, "input": _OUT_CHANNELS, "output": _IN_CHANNELS}


def _fold_of(mapped: set[str], result: str) -> dict[str, tuple[int, bool]]:
    """How a convolution takes in the mapped dimension of the tensors ``mapped``."""
    tied = {"weight" if role in ("bias", "input_bias") else role for role in (*mapped, result)}
    lacking = [fold for role, fold in _WITHOUT.items() if role not in tied]
    return lacking[0] if lacking else _GROUPS


def _fold(tensor: torch.Tensor, dim: int | None, batch: int, axis: int, groups: int) -> torch.Tensor:
    """``tensor`` with its mapped dimension (or with copies of itself) joined to ``axis``, inside of ``groups``."""
    tensor = tensor.expand(batch, *tensor.shape).movedim(0, axis) if dim is None else tensor.movedim(dim, axis)
    if groups == 1:
        return tensor.flatten(axis, axis + 1)
    per_group = tensor.shape[axis + 1] // groups
    return tensor.unflatten(axis + 1, (groups, per_group)).transpose(axis, axis + 1).flatten(axis, axis + 2)


def _unfold(tensor: torch.Tensor, batch: int, axis: int, groups: int) -> torch.Tensor:
    """The inverse: the mapped dimension comes first."""
    per_group = tensor.shape[axis] // (groups * batch)
    return tensor.unflatten(axis, (groups, batch, per_group)).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)


def _fold_argument(value, dim: int | None, batch: int, axis: int, groups: int):
    """A tensor, or the size of one."""
    if isinstance(value, torch.Tensor):
        return _fold(value, dim, batch, axis, groups)
    return [extent * batch if i == axis else extent for i, extent in enumerate(value)]


def _unfold_result(result: torch.Tensor, batch: int, axis: int, groups: int) -> tuple[torch.Tensor, int | None]:
    """The result with its mapped dimension, and where that is. Offsets that nobody asked for have none."""
    if axis >= result.dim() or (result.dim() == 1 and result.numel() == 0):
        return result, None
    return _unfold(result, batch, axis, groups), 0


def vmap_rule(operator: torch._ops.OpOverload) -> Callable:
    """The batching rule of an operator, from its name and the names of its arguments."""
    names = [argument.name for argument in operator._schema.arguments]
    result = next(role for ending, role in _RESULTS.items() if operator._schema.name.endswith(f"_{ending}"))
    is_pooling = "weight" not in {result, *map(_ROLES.get, names)} and result != "bias"

    def rule(info, in_dims, *args):
        dims = {name: dim for name, dim in zip(names, in_dims, strict=False) if isinstance(dim, int)}
        arguments = dict(zip(names, args, strict=False))
        fold = _IMAGES if is_pooling else _fold_of({_ROLES[name] for name in dims}, result)
        inner = arguments.get("groups", 1)

        def place(role: str) -> tuple[int, int]:
            axis, inside = fold[role]
            return axis, inner if inside else 1

        for name, value in arguments.items():
            role = _ROLES.get(name)
            if role in fold and value is not None:
                arguments[name] = _fold_argument(value, dims.get(name), info.batch_size, *place(role))
        if fold is _GROUPS:
            arguments["groups"] = inner * info.batch_size
        results = operator(*arguments.values())
        if isinstance(results, torch.Tensor):
            return _unfold_result(results, info.batch_size, *place(result))
        return tuple(zip(*(_unfold_result(tensor, info.batch_size, *place(result)) for tensor in results), strict=True))

    return rule
