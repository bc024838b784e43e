"""The one exception that means: a person can mend this, and one line says how."""


class EndoRewardError(ValueError):
    """Bad input or a setting that cannot work: what was wrong, where, and what to do, in one line.

    The command line prints it and exits with 2. Anything else that escapes is a defect of ours and keeps its traceback.
    """
