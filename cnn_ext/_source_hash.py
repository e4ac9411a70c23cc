"""The content hash of the kernels' sources, embedded in the compiled modules and compared at import.

Standard library only: setup.py loads this file by its path, before anything is installed.
"""

import hashlib
from pathlib import Path

_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".inl"}


def source_hash(csrc: Path) -> str:
    """SHA-256, shortened to 16 hex digits, over the names and contents of the sources under ``csrc``."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in _SUFFIXES and "tests" not in path.relative_to(csrc).parts:
            digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
