"""torch.autocast for convolutions: they run in the dtype of the region, by torch's rule. Poolings keep their dtype."""

import torch

is_autocast_on = torch._C._is_any_autocast_enabled  # on whatever device


def cast_for_autocast(*tensors) -> tuple:
    """The operands of a convolution, those of float16, bfloat16 and float32 in the dtype of the region around the call.

    The casts are differentiable, so gradients arrive in the dtypes of the tensors given.
    """
    return tuple(map(_cast, tensors)) if is_autocast_on() else tensors


def _cast(tensor):
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
