"""Fetches MNIST's four compressed files from public mirrors; gives up after 20 s without a byte from any of them."""

import hashlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import requests

from cnn_ext.mnist.errors import InputError, reason
from cnn_ext.mnist.files import FILES, MnistFile

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
CONNECT_TIMEOUT = 5.0  # seconds, for each address of a mirror
READ_TIMEOUT = 8.0  # seconds; with the one above it leaves time for the second mirror
PATIENCE = 20.0  # seconds without a byte, over all mirrors


class DownloadError(Exception):
    """MNIST cannot be had from any mirror."""


class _Patience:
    """A deadline that moves on whenever bytes come."""

    def __init__(self):
        self.renew()

    def renew(self) -> None:
        self.deadline = time.monotonic() + PATIENCE

    def get(self, chunks: queue.Queue):
        try:
            return chunks.get(timeout=max(self.deadline - time.monotonic(), 0))
        except queue.Empty:
            raise DownloadError("no answer in time") from None


def _stream(url: str, chunks: queue.Queue) -> None:
    """Puts the bytes behind ``url`` into the queue piece by piece, then None; or the error."""
    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
            response.raise_for_status()
            for chunk in response.iter_content(1 << 16):
                chunks.put(chunk)
        chunks.put(None)
    except Exception as error:
        chunks.put(error)


def _chunks(url: str, patience: _Patience) -> Iterator[bytes]:
    """The bytes behind ``url``, read by a thread: a name look-up obeys no time-out and each address has its own."""
    chunks: queue.Queue = queue.Queue()
    threading.Thread(target=_stream, args=(url, chunks), daemon=True).start()
    while (chunk := patience.get(chunks)) is not None:
        if isinstance(chunk, Exception):
            raise DownloadError(_in_short(chunk))
        patience.renew()
        yield chunk


def _in_short(error: Exception) -> str:
    response = getattr(error, "response", None)
    return type(error).__name__ if response is None else f"HTTP status {response.status_code}"


def _fetch_file(file: MnistFile, folder: Path, patience: _Patience) -> None:
    """One file, from the first mirror that has it; it gets its name only once its sum is right."""
    failures = []
    for mirror in MIRRORS:
        try:
            content = b"".join(_chunks(f"{mirror}{file.name}.gz", patience))
        except DownloadError as error:
            failures.append(f"{mirror}: {error}")
            continue
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == file.gz_md5:
            _place(content, folder / f"{file.name}.gz")
            return
        failures.append(f"{mirror}: the file served has a wrong MD5 sum")
    raise DownloadError("; ".join(failures))


def _place(content: bytes, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {reason(error)}") from error


def fetch(root: Path) -> None:
    """Puts those of the four files that are missing into torchvision's layout under ``root``, or DownloadError."""
    patience = _Patience()
    folder = root / "MNIST" / "raw"
    print(f"Downloading MNIST into {folder}", file=sys.stderr, flush=True)
    for file in FILES.values():
        if not (folder / f"{file.name}.gz").is_file():
            _fetch_file(file, folder, patience)
