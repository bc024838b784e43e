"""What an output's name says of its format, held against what is written there."""

from __future__ import annotations

from pathlib import Path

from ...errors import EndoRewardError

TEXT, PAGE, JSON, JSON_LINES = "text", "HTML", "JSON", "JSON Lines"
NAMES = {
    ".html": PAGE, ".htm": PAGE, ".json": JSON, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES,
    ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".xlsx": "Excel", ".xls": "Excel", ".arrow": "Arrow",
    ".feather": "Feather", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard", ".zip": "zip",
    ".png": "PNG", ".svg": "SVG", ".jpg": "JPEG", ".jpeg": "JPEG", ".pdf": "PDF", ".md": "Markdown", ".pkl": "pickle",
}  # fmt: skip
"""A suffix that is not here promises nothing."""


def format_of(output: str | None) -> str | None:
    """What the name of an output says; None: nothing."""
    return None if output is None else NAMES.get(Path(output).suffix.lower())


def refuse_other_format(output: str | None, written: str, flag: str = "--output") -> str | None:
    """Raise EndoRewardError where the name of `output` promises another format than the one written.

    JSON Lines under .json, which some tools expect, are worth a note: it is returned.
    """
    named = format_of(output)
    if named in (None, written):
        return None
    if (named, written) == (JSON, JSON_LINES):
        return f"{output} gets {JSON_LINES}: an object a line, no array"
    good = [suffix for suffix, name in NAMES.items() if name == written] or [".txt"]
    raise EndoRewardError(f"{flag} {output}: {written} is written there, not {named}: end its name in {good[0]}")
