"""Check the extension of an output file against the format that is written."""

from __future__ import annotations

from pathlib import Path

from ..errors import EndoRewardError

TEXT, PAGE, JSON, JSON_LINES = "text", "HTML", "JSON", "JSON Lines"
NAMES = {
    ".html": PAGE, ".htm": PAGE, ".json": JSON, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES,
    ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".xlsx": "Excel", ".xls": "Excel", ".arrow": "Arrow",
    ".feather": "Feather", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard", ".zip": "zip",
    ".png": "PNG", ".svg": "SVG", ".jpg": "JPEG", ".jpeg": "JPEG", ".pdf": "PDF", ".md": "Markdown", ".pkl": "pickle",
}  # fmt: skip
"""Formats by suffix. Any format may be written under another suffix."""


def format_of(output: str | None) -> str | None:
    """Return the format that the suffix of `output` stands for, or None."""
    return None if output is None else NAMES.get(Path(output).suffix.lower())


def refuse_other_format(output: str | None, written: str, flag: str = "--output") -> str | None:
    """Raise EndoRewardError if the suffix of `output` stands for another format than the one written.

    JSON Lines under .json are allowed, because some tools expect that. The return value is a note about it.
    """
    named = format_of(output)
    if named in (None, written):
        return None
    if (named, written) == (JSON, JSON_LINES):
        return f"{output} is written as {JSON_LINES}: one object per line, not an array"
    good = [suffix for suffix, name in NAMES.items() if name == written] or [".txt"]
    raise EndoRewardError(f"{flag} {output}: the output is {written}, not {named}: use a name that ends in {good[0]}")
