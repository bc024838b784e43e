"""What one mutation is, and all of them: mistakes that were made somewhere, or are easily made here."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A mistake, and the test that must notice it."""

    file: str
    """below endoreward_fast/"""
    old: str
    """what stands there, exactly once"""
    new: str
    """what replaces it"""
    test: str
    """the test that must fail, as pytest names it"""
    fails_with: str = "AssertionError"
    """the exception's type, or the signal that ends the process: a regular expression"""


HARD, MAIN, DEVICES = "tests/vocab/test_hard_cases.py", "tests/test_functional.py", "tests/vocab/test_devices.py"
PROPERTIES, IDENTITIES = "tests/vocab/test_properties.py", "tests/test_identities.py"
EXTRAS = "tests/vocab/test_extras.py"
OPS, WORKSPACE, ROWS = "tests/vocab/test_ops.py", "tests/vocab/test_workspace.py", "tests/vocab/test_rows.py"
# In the interpreter an address is one of this process, and 4 GiB below a tensor there is most likely nothing.
WILD_READ = "SIGSEGV|AssertionError"
