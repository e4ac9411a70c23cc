"""Makes torch's own convolutions, pools and matrix products raise on the CPU, in the whole process and for good.

A TorchDispatchMode would not see what runs inside a registered operator; replaced kernels are met wherever they are
called from. For processes of their own, never for pytest's.
"""

import torch

_NAMES = {"conv", "pool", "unfold", "im2col", "col2im", "mm", "bmm", "matmul", "addmm", "addbmm", "baddbmm", "addmv"}
_NAMES |= {"mv", "dot", "vdot", "einsum", "linear"}
_KEYS = ("CPU", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
_LIBRARY = torch.library.Library("aten", "IMPL")


class TorchComputesError(AssertionError):
    """One of the forbidden kernels was called."""


def _computes(name: str) -> bool:
    base = name.split(".")[0].strip("_")
    return "conv" in base or "pool" in base or "im2col" in base or "unfold_b" in base or base in _NAMES


def _replace(name: str) -> bool:
    def kernel(*args, **kwargs):
        raise TorchComputesError(f"torch computes: aten::{name}")

    for key in _KEYS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
            _LIBRARY.impl(name, kernel, "CPU", allow_override=True)
            return True
    return False


def forbid_torchs_kernels() -> list[str]:
    """Replaces the kernels, and returns the names of those that were."""
    names = [name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    return [name for name in names if _computes(name) and _replace(name)]
