"""The entry point of ``cnn-ext``: runs a command and turns what went wrong into one line and an exit status."""

import sys
from collections.abc import Sequence

EXTRA = {"click", "matplotlib", "PIL", "requests", "safetensors", "tqdm"}  # what cnn_ext itself does without
BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 for what the user can put right, or 130 after Ctrl-C."""
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        return _fail(f"{error.name} is not installed: pip install 'cnn_ext[mnist]'", BAD_INPUT)


def _run(arguments: Sequence[str] | None) -> int:
    import click

    from cnn_ext.mnist.commands import cli
    from cnn_ext.mnist.errors import InputError, StoppedError

    try:
        return cli.main(arguments, prog_name="cnn-ext", standalone_mode=False) or 0
    except InputError as error:
        return _fail(str(error), BAD_INPUT)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except StoppedError as error:
        return _fail(str(error), INTERRUPTED)
    except click.Abort:
        return _fail("stopped by Ctrl-C", INTERRUPTED)


def _fail(message: str, status: int) -> int:
    print(f"cnn-ext: {message}", file=sys.stderr)
    return status
