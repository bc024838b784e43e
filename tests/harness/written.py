"""Helpers that write a file and read it with the command's readers."""

from endoreward_fast.data.files import open_source
from endoreward_fast.errors import EndoRewardError


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(folder, name, data):
    """Return (row or error of each record, error that ended reading or None)."""
    found = []
    try:
        for record in open_source(str(put(folder, name, data))).records:
            found.append(record.error or record.row)
    except EndoRewardError as error:
        assert "\n" not in str(error) and name in str(error)
        return found, str(error)
    return found, None
