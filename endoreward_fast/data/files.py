"""Read files and standard input into rows: JSON Lines, JSON, CSV and TSV, plain or gzipped, and Parquet.

The content of a file decides its format; the extension decides only if the content fits several formats.
JSON Lines and CSV are streamed, so that the first rows are scored before the last are read.

Reading is strict. Input that two readers could understand differently is an error: an error of its row if the next row
can be found, else an error of the file, raised after the rows before it.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import itertools
import stat
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import EndoRewardError
from .csv_rows import cell, csv_rows
from .json_rows import COLUMNS, LISTS, TEXTS, document, is_mostly_lines, is_row, json_lines, rows_of_document
from .magic import HEAD, refuse_foreign
from .records import DEEPEST, Record, is_messages, kind_of, record

__all__ = [
    "COLUMNS", "DEEPEST", "LISTS", "STDIN", "TEXTS", "Record", "Source", "is_messages", "kind_of", "open_source",
]  # fmt: skip

STDIN = "-"
UTF8_BOM = b"\xef\xbb\xbf"
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """An opened input."""

    name: str
    records: Iterator[Record]
    total: int | None
    """number of rows, if a quick count can tell; else None"""


def open_source(path: str, limit: int | None = None) -> Source:
    """Open `path` ("-" is standard input) and detect its format. `limit` is the maximum number of rows.

    Raises EndoRewardError if it cannot be opened, is empty or has an unsupported format. Later damage gives a Record
    with an error if the next row can be found; else iterating over the records raises EndoRewardError.
    """
    name = "standard input" if path == STDIN else path
    stream = _open(path, name)
    head: bytes = stream.peek(HEAD)  # type: ignore[attr-defined]
    if head[:4] == b"PAR1":
        source = Source(name, _parquet(stream, name), None)
    else:
        refuse_foreign(head, name)
        source = _text_source(path, name, stream)
    records = _readable(source.records, name, stream)
    if limit is None:
        return Source(name, records, source.total)
    total = None if source.total is None else min(limit, source.total)
    return Source(name, itertools.islice(records, min(limit, sys.maxsize)), total)


def _open(path: str, name: str) -> BinaryIO:
    """Return a decompressed byte stream that can peek."""
    try:
        if path == STDIN:
            raw: Any = sys.stdin.buffer
            stream = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
        else:
            stream = open(path, "rb")  # noqa: SIM115  still read after this returns; _readable closes it
        if stream.peek(2)[:2] == b"\x1f\x8b":
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))
        stream.peek(1)  # raises here if the gzip header is damaged
    except FileNotFoundError:
        raise EndoRewardError(f"no such file: {name}") from None
    except (EOFError, zlib.error, OSError) as error:
        raise EndoRewardError(f"cannot read {name}: {_reason(error)}") from None
    return stream


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _readable(records: Iterator[Record], name: str, stream: BinaryIO) -> Iterator[Record]:
    """Yield `records`, turn errors of reading into a one-line EndoRewardError, and close the file at the end."""
    try:
        yield from records
        if stream is not getattr(sys.stdin, "buffer", None):
            stream.close()
    except (EOFError, zlib.error, OSError) as error:
        raise EndoRewardError(f"cannot read {name} to its end: {_reason(error)}") from None


def _text_source(path: str, name: str, stream: BinaryIO) -> Source:
    lines, skipped = _after_blank_lines(stream, name)
    first = next(lines, b"")
    if not first.strip():
        raise EndoRewardError(f"{name} is empty: there is nothing to score")
    lines = itertools.chain([first], lines)
    opening = first.lstrip()[:1]
    suffix = next((s.lower() for s in reversed(Path(path).suffixes) if s.lower() != ".gz"), "")
    if suffix in (".csv", ".tsv") or (suffix not in (*JSON_LINES, ".json") and opening not in (b"{", b"[")):
        return Source(name, csv_rows(lines, skipped, name), None)
    if (suffix in JSON_LINES and opening != b"[") or (suffix != ".json" and is_row(first)):
        return Source(name, json_lines(lines, skipped), _count_lines(path, stream))
    data = b"".join(lines)
    try:
        value = document(name, data, skipped)
    except EndoRewardError:
        # It may be damaged JSON Lines whose file name does not say so.
        if (suffix in JSON_LINES or opening == b"{") and is_mostly_lines(data):
            broken = data.split(b"\n")
            return Source(name, json_lines(broken, skipped), len(broken))
        raise
    rows = rows_of_document(value, name)
    return Source(name, (record(f"row {n}", row) for n, row in enumerate(rows, start=1)), len(rows))


def _after_blank_lines(stream: BinaryIO, name: str) -> tuple[Iterator[bytes], int]:
    """Return the lines without leading blank lines and byte-order mark, and the number of lines skipped."""
    lines = iter(stream)
    try:
        first = next(lines, b"")
        first, skipped = first.removeprefix(UTF8_BOM), 0
        while first and not first.strip():
            first, skipped = next(lines, b""), skipped + 1
    except (EOFError, zlib.error, OSError) as error:
        raise EndoRewardError(f"cannot read {name}: {_reason(error)}") from None
    return itertools.chain([first], lines), skipped


def _count_lines(path: str, stream: BinaryIO) -> int | None:
    """Count the lines of a plain file. Returns None for pipes and compressed files."""
    if path == STDIN or isinstance(stream, gzip.GzipFile) or not stat.S_ISREG(Path(path).stat().st_mode):
        return None
    with open(path, "rb") as file:
        count, last = 0, b"\n"
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _parquet(stream: BinaryIO, name: str) -> Iterator[Record]:
    if importlib.util.find_spec("pyarrow") is None:
        raise EndoRewardError(f"{name} is Parquet: to read it, `pip install pyarrow`; or save it as JSON Lines")
    from pyarrow import ArrowException, parquet

    data: Any = stream if stream.seekable() else io.BytesIO(stream.read())
    try:
        file = parquet.ParquetFile(data)
        names = file.schema_arrow.names
        batches = file.iter_batches(batch_size=256)
    except (ArrowException, OSError) as error:
        raise EndoRewardError(f"cannot read {name}: {error}") from None
    if twice := next((column for n, column in enumerate(names) if column in names[:n]), None):
        raise EndoRewardError(f"{name} has two columns named {twice!r}: rename one")
    if twice := _field_twice(file.schema_arrow):
        raise EndoRewardError(f"{name} has two fields named {twice!r} in one object: rename one")
    return _parquet_records(batches, name)


def _parquet_records(batches: Iterator[Any], name: str) -> Iterator[Record]:
    from pyarrow import ArrowException

    try:
        rows = itertools.chain.from_iterable(map(_rows_of_batch, batches))
        for number, (row, error) in enumerate(rows, start=1):
            yield Record(f"row {number}", None, error) if error else _parquet_record(f"row {number}", row)
    except (ArrowException, OSError) as error:
        raise EndoRewardError(f"cannot read {name} to its end: {error}") from None


def _rows_of_batch(batch: Any) -> list[tuple[dict[str, Any], str | None]]:
    """Return (row, error or None) per row. Parquet may hold values that Python cannot: a year past 9999, say."""
    from pyarrow import ArrowException

    def row_of(i: int) -> tuple[dict[str, Any], str | None]:
        row = {}
        for column, values in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[column] = values[i].as_py()
            except (ArrowException, ValueError, OverflowError) as error:
                return row, f"{column}: cannot be read ({error})"
        return row, None

    try:
        return [(row, None) for row in batch.to_pylist()]
    except (ArrowException, ValueError, OverflowError):
        return [row_of(i) for i in range(batch.num_rows)]


def _parquet_record(where: str, row: dict[str, Any]) -> Record:
    try:
        cells = {name: cell(name, value) if isinstance(value, str) else value for name, value in _unfilled(row).items()}
    except EndoRewardError as error:
        return Record(where, None, str(error))
    return record(where, cells)


def _field_twice(fields: Any) -> str | None:
    """Return a name that two fields of one object share, at any depth, or None."""
    kept = list(fields)
    names = [field.name for field in kept]
    inner = (_field_twice([field.type.field(i) for i in range(field.type.num_fields)]) for field in kept)
    twice = (name for n, name in enumerate(names) if name in names[:n])
    return next((name for name in itertools.chain(twice, inner) if name is not None), None)


def _unfilled(value: Any, *, inside: bool = False) -> Any:
    """Return a row without null fields in its tools and tool calls. Parquet adds them: all calls share one schema."""
    if isinstance(value, dict):
        kept = ((name, inner) for name, inner in value.items() if not inside or inner is not None)
        return {name: _unfilled(inner, inside=inside or name in ("tools", "tool_calls")) for name, inner in kept}
    return [_unfilled(inner, inside=inside) for inner in value] if isinstance(value, list) else value
