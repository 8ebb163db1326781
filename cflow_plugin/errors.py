"""The error that a user can act upon."""

__all__ = ["CflowError", "first_line"]


class CflowError(RuntimeError):
    """Something is wrong with the input, the settings or the machine; the message says what, and what to do."""


def first_line(error: BaseException, length: int = 120) -> str:
    r"""The first line of an error's message, or the error's type where there is none, for use inside a sentence.

    Args:
        error: The error.
        length: At most this many characters.

    Example:
        >>> first_line(ValueError("No such layer.\nTry another."))
        'No such layer'
    """
    lines = str(error).strip().splitlines()
    return lines[0][:length].rstrip(". ") if lines else type(error).__name__
