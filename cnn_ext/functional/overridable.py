"""torch's protocol for functions that others take over: modes, tracers' proxies and subclasses of Tensor."""

import functools
from collections.abc import Callable

from torch.overrides import handle_torch_function, has_torch_function_unary


def overridable(function: Callable) -> Callable:
    """A function that ``__torch_function__`` of its ``input`` and of modes sees, as torch's: torch.fx records it."""

    @functools.wraps(function)
    def call(input, *args, **kwargs):
        if has_torch_function_unary(input):
            return handle_torch_function(call, (input,), input, *args, **kwargs)
        return function(input, *args, **kwargs)

    return call
