"""What a user can put right: one line, exit status 2."""


class InputError(Exception):
    """Bad input. The message is one line that names the file or option and says what is wrong with it."""


def reason(error: Exception) -> str:
    """Why a call failed, on one line, without the file's name, which the message has already."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
