"""A hint to the C library's memory allocator."""

import ctypes

__all__ = ["tune_malloc"]

# Numbers and names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LIMITS = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1, _M_TOP_PAD: 1 << 26}


class _DlInfo(ctypes.Structure):
    """Where the dynamic linker found an address."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _file_of(process: ctypes.CDLL, function: str) -> bytes:
    """The shared object that serves calls of a function in this process."""
    info = _DlInfo()
    found = process.dladdr(ctypes.cast(getattr(process, function), ctypes.c_void_p), ctypes.byref(info))
    return info.file if found else b""


def tune_malloc() -> bool:
    """Lets freed memory stay in the process: up to 1 GiB a block, from glibc's malloc, until the process ends.

    Otherwise glibc returns the memory of large tensors to the system as they are freed, and the next tensor pays a page
    fault for every 4 KiB. It speeds up torch's own operators as well. The price: the process keeps its largest size.

    Returns:
        whether it took effect: False where another C library or allocator serves malloc.
    """
    try:
        process = ctypes.CDLL(None)
        libc = _file_of(process, "gnu_get_libc_version")
        # malloc itself may have an address in the executable's table of calls (Debian's python3), which says nothing of
        # who serves it. The allocators that take its place define this one as well.
        if not libc or _file_of(process, "malloc_usable_size") != libc:
            return False
    except (OSError, AttributeError, TypeError):  # no dynamic linker, or functions that this libc lacks
        return False
    return all([process.mallopt(name, value) == 1 for name, value in _LIMITS.items()])
