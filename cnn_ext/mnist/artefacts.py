"""What a run leaves in its folder: history.json, curves.png, predictions.png and the checkpoint, after every epoch."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from cnn_ext.mnist.errors import InputError, reason


def prepare(out: Path) -> None:
    """Makes the folder and finds out now, not after an epoch, whether it can be written to."""
    probe = _temporary(out / "probe")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out}: cannot be written to: {reason(error)}") from error


def write(out: Path, contents: dict[str, bytes]) -> None:
    """Writes all files under temporary names, then renames them: whenever it stops, each name holds a complete file."""
    temporaries = {name: _temporary(out / name) for name in contents}
    try:
        for name, content in contents.items():
            temporaries[name].write_bytes(content)
        with _interrupt_afterwards():
            for name, temporary in temporaries.items():
                os.replace(temporary, out / name)
    except OSError as error:
        raise InputError(f"{out}: cannot be written to: {reason(error)}") from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Holds Ctrl-C back until all files are of the same epoch. Signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        raise KeyboardInterrupt


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
