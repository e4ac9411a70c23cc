"""Reader for the IDX files of MNIST, raw or gzip-compressed.

IDX: two zero bytes, the element type (0x08 = unsigned byte), the number of axes, one big-endian 32-bit size per axis,
then the elements.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from cnn_ext.mnist.errors import InputError, reason

_UNSIGNED_BYTE = 0x08


def read_bytes(path: Path) -> bytes:
    """The content of ``path``, decompressed where its name ends in .gz."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error


def parse(content: bytes, source: Path, axes: int) -> torch.Tensor:
    """The uint8 tensor with ``axes`` axes in ``content``; ``source`` is named in errors."""
    header = 4 + 4 * axes
    if len(content) < header:
        raise InputError(f"{source}: truncated: {len(content)} bytes, shorter than the IDX header of {header}")
    magic = bytes([0, 0, _UNSIGNED_BYTE, axes])
    if content[:4] != magic:
        raise InputError(f"{source}: not the IDX file expected: it begins with {content[:4].hex()}, not {magic.hex()}")
    sizes = np.frombuffer(content, ">u4", count=axes, offset=4).tolist()
    expected = header + int(np.prod(sizes, dtype=object))
    if len(content) != expected:
        wrong = "truncated" if len(content) < expected else "too long"
        raise InputError(f"{source}: {wrong}: {len(content)} bytes, but its header {sizes} asks for {expected}")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(sizes)
