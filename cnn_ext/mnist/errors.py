"""What ends a command with one line instead of a traceback."""


class InputError(Exception):
    """Bad input. The message is one line that names the file or option and what is wrong with it; exit status 2."""


class StoppedError(Exception):
    """Ctrl-C during training. The message is one line that says what was saved; exit status 130."""


def reason(error: Exception) -> str:
    """Why a call failed, on one line, without the file's name, which the message has already."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
