"""The one exception that means: a person can mend this, and one line says how."""


class EndoRewardError(ValueError):
    """Bad input or a setting that cannot work: what was wrong, where, and what to do, in one line.

    The command line prints it and exits with 2. Anything else that escapes is a defect of ours and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its name; both where the message alone is a bare key."""
    line, name = " ".join(str(error).strip().partition("\n")[0].split()), type(error).__name__
    return f"{name}: {line}" if line and isinstance(error, LookupError) else line or name
