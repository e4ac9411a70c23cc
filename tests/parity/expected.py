"""What torch makes of a call, in float64, with what a tolerance needs beside each value."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tests.parity.draws import Call


@dataclass(frozen=True)
class Refusal:
    """torch raised ``error``; nothing was computed."""

    error: type[Exception]
    message: str


@dataclass(frozen=True)
class Value:
    """One result in float64; the sum of its terms' magnitudes, and how often a term is rounded. None: exact."""

    value: np.ndarray
    magnitude: np.ndarray | None = None
    roundings: np.ndarray | int = 0


Expected = Refusal | dict[str, Value]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")
_AVERAGES = ("avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d")


def run(module, call: Call, tensors: dict, grad_output: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The results of a call of ``module``'s function and the gradients that were asked for, by name."""
    leaves = {
        name: tensor.detach().requires_grad_(name in call.wants_grad) if torch.is_tensor(tensor) else None
        for name, tensor in tensors.items()
        if name != "indices"
    }
    arguments, named = call.split_arguments()
    first = [leaves[name] if name in leaves else tensors[name] for name in tensors]
    made = getattr(module, call.function)(*first, *arguments, **named)
    output, *indices = made if isinstance(made, tuple) else (made,)
    results = {"output": output.detach()} | dict(zip(("indices",), indices, strict=False))
    wanted = [name for name in leaves if leaves[name] is not None and leaves[name].requires_grad]
    if wanted:
        grad_output = call.grad_output(output) if grad_output is None else grad_output
        grads = torch.autograd.grad(output, [leaves[name] for name in wanted], grad_output.to(output.dtype))
        results |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def expected(call: Call) -> Expected:
    tensors = {name: _double(tensor) for name, tensor in call.tensors().items()}
    try:
        values = run(F, call, tensors)
    except Exception as error:  # whatever torch raises is what is wanted
        return Refusal(type(error), str(error))
    if call.function in _CONVOLUTIONS + _AVERAGES:
        return _sums(call, tensors, values)
    return _selections(call, tensors, values)


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def _sums(call: Call, tensors: dict, values: dict[str, torch.Tensor]) -> dict[str, Value]:
    """Results that are sums of products: the same function of the magnitudes, and of ones, which counts the terms."""
    grad_output = call.grad_output(values["output"]).double()
    magnitudes = run(F, call, _mapped(tensors, torch.abs), grad_output.abs())
    if call.function in _CONVOLUTIONS:
        terms = run(F, call, _mapped(tensors, torch.ones_like), torch.ones_like(grad_output))
        roundings = {name: count.numpy() for name, count in terms.items()}
    else:
        roundings = dict.fromkeys(values, _taps(call, values["output"]) + 1)  # and the division
    return {
        name: Value(value.numpy(), magnitudes[name].abs().numpy(), roundings[name]) for name, value in values.items()
    }


def _selections(call: Call, tensors: dict, values: dict[str, torch.Tensor]) -> dict[str, Value]:
    """Results of maxima: copies, but for gradients, which add up where windows overlap."""
    made = {name: Value(value.numpy()) for name, value in values.items()}
    if "gradient of input" in values and call.function != "max_unpool2d":
        magnitudes = run(F, call, tensors, call.grad_output(values["output"]).double().abs())
        name = "gradient of input"
        made[name] = Value(values[name].numpy(), magnitudes[name].numpy(), _taps(call, values["output"]) - 1)
    return made


def _mapped(tensors: dict, function) -> dict:
    return {name: None if tensor is None else function(tensor) for name, tensor in tensors.items()}


def _taps(call: Call, output: torch.Tensor) -> int:
    """The most elements that one window covers, and windows that cover one element."""
    if "kernel_size" not in call.arguments:  # adaptive: there may be more windows than elements
        return max(math.prod(call.sizes["input"][-2:]), math.prod(output.shape[-2:]))
    kernel = call.arguments["kernel_size"]
    rank = 1 if call.function.endswith("1d") else 2
    return math.prod(kernel) if isinstance(kernel, (tuple, list)) else kernel**rank
