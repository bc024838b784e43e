"""The package's exception for errors that the user can fix."""


class EndoRewardError(ValueError):
    """Raised for bad input or a setting that cannot work. One line says what was wrong, where, and what to do.

    The command line prints the line and exits with status 2. Any other exception is a bug and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or the error's name if it has no message.

    A LookupError gets both, because its message is often just the missing key.
    """
    line, name = " ".join(str(error).strip().partition("\n")[0].split()), type(error).__name__
    return f"{name}: {line}" if line and isinstance(error, LookupError) else line or name
