"""What a convolution may trade for speed: switches for the whole process, off by default.

A graph remembers what was allowed when its forward ran; its backward is allowed the same.
"""

import dataclasses

from cnn_ext._arguments import check_bool

__all__ = ["flags"]


@dataclasses.dataclass
class _Allowed:
    winograd: bool = False


allowed = _Allowed()  # read at every call of a convolution


class flags:  # noqa: N801 (a setter and a context manager, as torch.backends' flags)
    """Sets switches: ``flags(winograd=True)`` until it is set again, ``with flags(winograd=True):`` inside the block.

    Args:
        winograd: whether float32 and float64 convolutions on the CPU may use Winograd's algorithm, faster and with a
            larger error (docs/kernels/winograd.md has the bound). None leaves it as it is.

    Raises:
        TypeError: not a bool.
    """

    def __init__(self, *, winograd: bool | None = None):
        self._before = allowed.winograd
        if winograd is not None:
            check_bool("flags", "winograd", winograd)
            allowed.winograd = winograd

    def __enter__(self) -> "flags":
        return self

    def __exit__(self, *exception) -> None:
        allowed.winograd = self._before
