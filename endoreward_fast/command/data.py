"""Files and standard input into rows: JSON Lines, JSON, CSV or TSV, each plain or gzipped, and Parquet.

What a file is follows from its content; its extension decides only where the content leaves a choice.
JSON Lines and CSV are read as a stream, so that the first rows are scored before the last are read.
"""

from __future__ import annotations

import ast
import csv
import gzip
import importlib.util
import io
import itertools
import json
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import EndoRewardError

STDIN = "-"
UTF8_BOM = b"\xef\xbb\xbf"
DEEPEST = 100
"""levels of lists and objects in a row: far below where Python's readers and writers give up, each at another depth"""
JSON_LINES = (".jsonl", ".ndjson")
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
LISTS = frozenset(("completions", "responses", "messages", "prompt_ids", "completion_ids"))
TEXTS = frozenset(("prompt", "question", "completion", "response", "answer", "chosen", "rejected"))
COLUMNS = TEXTS | LISTS
"""Column names that mean something here; candidates.py says what."""


@dataclass(frozen=True)
class Record:
    """One row of the input, or why it cannot be used."""

    where: str
    """ "line 3" or "row 3", counted from 1: how messages name it"""
    row: dict[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened input."""

    name: str
    records: Iterator[Record]
    total: int | None
    """rows, where that is known without reading everything twice"""


def open_source(path: str, limit: int | None = None) -> Source:
    """Open `path` ("-": standard input) and find out its format.

    Raises EndoRewardError if it cannot be opened, is empty, or is no text this module reads. Damage further
    in surfaces as a Record with an error where the next row can be found, else as EndoRewardError on the way.
    """
    name = "standard input" if path == STDIN else path
    stream = _open(path, name)
    if stream.peek(4)[:4] == b"PAR1":  # type: ignore[attr-defined]
        source = Source(name, _parquet(stream, name), None)
    else:
        source = _text_source(path, name, stream)
    records = _readable(source.records, name, stream)
    if limit is None:
        return Source(name, records, source.total)
    total = None if source.total is None else min(limit, source.total)
    return Source(name, itertools.islice(records, limit), total)


def _open(path: str, name: str) -> BinaryIO:
    """A peekable, decompressed byte stream."""
    try:
        if path == STDIN:
            raw: Any = sys.stdin.buffer
            stream = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
        else:
            stream = open(path, "rb")  # noqa: SIM115  read on long after this returns; _readable closes it
        if stream.peek(2)[:2] == b"\x1f\x8b":
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))
        stream.peek(1)  # a damaged gzip header speaks up here
    except FileNotFoundError:
        raise EndoRewardError(f"no such file: {name}") from None
    except (EOFError, zlib.error, OSError) as error:
        raise EndoRewardError(f"cannot read {name}: {_reason(error)}") from None
    return stream


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _readable(records: Iterator[Record], name: str, stream: BinaryIO) -> Iterator[Record]:
    """`records`, with what reading may raise half-way said in one line; the file is closed at the end."""
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
        return Source(name, _csv(lines, skipped, name), None)
    if (suffix in JSON_LINES and opening != b"[") or (suffix != ".json" and _is_row(first)):
        return Source(name, _json_lines(lines, skipped), _count_lines(path, stream))
    return _json_source(name, b"".join(lines), skipped, lines_allowed=suffix in JSON_LINES or opening == b"{")


def _after_blank_lines(stream: BinaryIO, name: str) -> tuple[Iterator[bytes], int]:
    """The lines from the first that holds anything, without a byte-order mark, and how many came before."""
    lines = iter(stream)
    try:
        first = next(lines, b"")
        if first[:2] in UTF16_BOMS:
            raise EndoRewardError(f"{name} is UTF-16: save it as UTF-8")
        first, skipped = first.removeprefix(UTF8_BOM), 0
        while first and not first.strip():
            first, skipped = next(lines, b""), skipped + 1
    except (EOFError, zlib.error, OSError) as error:
        raise EndoRewardError(f"cannot read {name}: {_reason(error)}") from None
    return itertools.chain([first], lines), skipped


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _count_lines(path: str, stream: BinaryIO) -> int | None:
    """Lines of a plain file, at the speed of the disk; None for pipes and compressed files."""
    if path == STDIN or isinstance(stream, gzip.GzipFile) or not stat.S_ISREG(Path(path).stat().st_mode):
        return None
    with open(path, "rb") as file:
        count, last = 0, b"\n"
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _json_lines(lines: Iterable[bytes], skipped: int = 0) -> Iterator[Record]:
    for number, line in enumerate(lines, start=skipped + 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Record(where, None, f"not UTF-8 (byte {error.start + 1})")
        except json.JSONDecodeError as error:
            yield Record(where, None, f"not valid JSON ({error.msg}, column {error.colno})")
        except (ValueError, RecursionError) as error:
            yield Record(where, None, f"not valid JSON ({error})")
        else:
            yield _record(where, row)


def _record(where: str, row: object) -> Record:
    if not isinstance(row, dict):
        return Record(where, None, f"wanted a JSON object, found {kind_of(row)}")
    if _is_deeper(row, DEEPEST):
        return Record(where, None, f"nested more than {DEEPEST} levels deep")
    return Record(where, row)


def _is_deeper(value: dict[str, Any] | list[Any], levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in inner if isinstance(one, (dict, list)))


def kind_of(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "an array"}
    return "null" if value is None else names.get(type(value), "an object")


def _json_source(name: str, data: bytes, skipped: int, lines_allowed: bool) -> Source:
    """A JSON document; or else, where allowed, JSON Lines under a name that does not say so."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        lines = data.split(b"\n")
        if lines_allowed and any(_is_row(line) for line in lines):
            return Source(name, _json_lines(lines, skipped), len(lines))
        raise EndoRewardError(f"{name} is not valid JSON ({_json_reason(error, skipped)})") from None
    rows = _rows_of(value, name)
    if not rows:
        raise EndoRewardError(f"{name} has no rows: there is nothing to score")
    return Source(name, (_record(f"row {n}", row) for n, row in enumerate(rows, start=1)), len(rows))


def _json_reason(error: BaseException, skipped: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, line {error.lineno + skipped} column {error.colno}"
    return str(error)


def _rows_of(value: object, name: str) -> list[Any]:
    """Rows of an array, of {"data": ...}, of an object of arrays (or pandas' index objects), or one row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise EndoRewardError(f"{name}: wanted an array or an object, found {kind_of(value)}")
    if not COLUMNS & value.keys() and isinstance(value.get("data"), (list, dict)):
        return _rows_of(value["data"], name)
    columns = {key: list(v.values()) if isinstance(v, dict) else v for key, v in value.items()}
    if not columns or not all(isinstance(v, list) and not is_messages(v) for v in columns.values()):
        return [value]
    lengths = {key: len(v) for key, v in columns.items()}
    if len(set(lengths.values())) > 1:
        raise EndoRewardError(f"{name}: its columns differ in length: {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def is_messages(value: object) -> bool:
    """Whether `value` is a chat: a list of {"role": ..., "content": ...}."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _csv(lines: Iterable[bytes], skipped: int, name: str) -> Iterator[Record]:
    # A byte that is not UTF-8 becomes a lone surrogate, so that it spoils its own row only.
    text = (line.decode("utf-8", "surrogateescape") for line in lines)
    header_line = next(text)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses a completion of 128 KiB
    number, line_number = 0, 1
    try:
        delimiter = max(",;\t", key=lambda d: len(COLUMNS & set(next(csv.reader([header_line], delimiter=d)))))
        reader = csv.reader(itertools.chain([header_line], text), delimiter=delimiter)
        header = [column.strip() for column in next(reader)]
        for number, fields in enumerate((f for f in reader if f), start=1):
            line_number = reader.line_num
            yield _csv_record(f"row {number} (ends on line {line_number + skipped})", header, fields)
    except csv.Error as error:
        raise EndoRewardError(f"{name} is not valid CSV (after line {line_number + skipped}: {error})") from None
    finally:
        csv.field_size_limit(limit)
    if not number:
        raise EndoRewardError(f"{name} has a header and no rows: there is nothing to score")


def _csv_record(where: str, header: list[str], fields: list[str]) -> Record:
    if len(fields) != len(header):
        return Record(where, None, f"{len(fields)} fields where the header has {len(header)}")
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        return Record(where, None, "not UTF-8")
    return _record(where, {column: _cell(column, text) for column, text in zip(header, fields, strict=True)})


def _cell(column: str, text: str) -> Any:
    """A cell: text, unless it spells out the list its column needs, as JSON or (pandas) as Python."""
    if column in COLUMNS and text.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and (column in LISTS or is_messages(value)):
                return value
    return text


def _parquet(stream: BinaryIO, name: str) -> Iterator[Record]:
    if importlib.util.find_spec("pyarrow") is None:
        raise EndoRewardError(f"{name} is Parquet: `pip install pyarrow` to read it, or save it as JSON Lines")
    from pyarrow import ArrowException, parquet

    data: Any = stream if stream.seekable() else io.BytesIO(stream.read())
    try:
        batches = parquet.ParquetFile(data).iter_batches(batch_size=256)
    except (ArrowException, OSError) as error:
        raise EndoRewardError(f"cannot read {name}: {error}") from None
    return _parquet_records(batches, name)


def _parquet_records(batches: Iterator[Any], name: str) -> Iterator[Record]:
    from pyarrow import ArrowException

    try:
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from (_record(f"row {number}", row) for number, row in enumerate(rows, start=1))
    except (ArrowException, OSError) as error:
        raise EndoRewardError(f"cannot read {name} to its end: {error}") from None
