"""What a run leaves in its folder: history.json, curves.png, predictions.png and the checkpoint, after every epoch."""

import os
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
        for name, temporary in temporaries.items():
            os.replace(temporary, out / name)
    except OSError as error:
        raise InputError(f"{out}: cannot be written to: {reason(error)}") from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
