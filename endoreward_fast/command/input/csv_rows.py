"""Rows of CSV and TSV. Python's csv module reads them, strictly; what it lets pass besides is looked for here."""

from __future__ import annotations

import ast
import csv
import io
import itertools
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from typing import Any

from ...errors import EndoRewardError
from .json_rows import COLUMNS, GIVEN, LISTS, TERMINAL, loads, of_pairs
from .records import Record, is_messages, record

DELIMITERS = ",;\t"
PROMPTS = ("prompt", "question")
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
BOM = "\ufeff"


class _Lines:
    """Hands lines to csv.reader, and keeps those of the row that is being read."""

    def __init__(self, lines: Iterator[str], first: int) -> None:
        self._lines = lines
        self.number = first - 1
        """of the last line read"""
        self.start = first
        """where the row begins"""
        self.row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.row.append(line)
        return line

    def next_row(self) -> None:
        """Another row begins."""
        self.start, self.row = self.number + 1, []


def csv_rows(lines: Iterable[bytes], skipped: int, name: str) -> Iterator[Record]:
    """A Record per row. EndoRewardError, after the rows before it, where nothing says where the next one begins."""
    # A byte that is not UTF-8 becomes a lone surrogate, so that it spoils its own row only.
    text = (line.decode("utf-8", "surrogateescape") for line in lines)
    first = next(text)
    source = _Lines(itertools.chain([first], text), skipped + 1)
    delimiter = _delimiter(first, name)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses a completion of 128 KiB
    number = 0
    try:
        reader = csv.reader(source, delimiter=delimiter, strict=True)
        header = _header(next(reader), name)
        source.next_row()
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if (damage := _damage_within(source, delimiter)) is None:
                    raise EndoRewardError(_damage_beyond(source, delimiter, name, error)) from None
                number += 1
                yield Record(_where(number, source), None, damage)
            else:
                if fields is None:
                    break
                if fields:
                    number += 1
                    yield _csv_record(_where(number, source), header, fields, source, delimiter)
            source.next_row()
    except csv.Error as error:
        raise EndoRewardError(_damage_beyond(source, delimiter, name, error)) from None
    finally:
        csv.field_size_limit(limit)
    if not number:
        raise EndoRewardError(f"{name} has a header and no rows: there is nothing to score")


def _where(number: int, source: _Lines) -> str:
    return f"row {number} (ends on line {source.number})"


def _delimiter(header: str, name: str) -> str:
    """The one of DELIMITERS that makes most columns of a known name. EndoRewardError: two do, differently."""
    known = {}
    for delimiter in DELIMITERS:
        if delimiter in header:
            known[delimiter] = len(COLUMNS & {cell.strip().strip('"') for cell in header.split(delimiter)})
    most = max(known.values(), default=0)
    best = [delimiter for delimiter, count in known.items() if count == most]
    if most and len(best) > 1:
        raise EndoRewardError(f"{name}: its header may be separated by {best[0]!r} or by {best[1]!r}: keep one of them")
    return best[0] if best else DELIMITERS[0]


def _header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if any(not _is_utf8(cell) for cell in header):
        raise EndoRewardError(f"{name} is not UTF-8 (its header): save it as UTF-8")
    if twice := next((cell for n, cell in enumerate(header) if cell in header[:n]), None):
        raise EndoRewardError(f"{name} has two columns named {twice!r}: rename one")
    if header.count("") > 1:  # one is what pandas calls its index
        raise EndoRewardError(f"{name} has {header.count('')} columns without a name: name them")
    return header


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- quotation marks
def _field(delimiter: str) -> str:
    """A pattern of one well-formed field."""
    return rf'(?:"[^"]*(?:""[^"]*)*"|[^"{delimiter}]*)'


def _well_formed(text: str, delimiter: str) -> bool:
    field = _field(delimiter)
    return '"' not in text or re.fullmatch(f"{field}(?:{delimiter}{field})*", text.rstrip("\r\n")) is not None


def _opened(text: str, delimiter: str) -> int:
    """Where in `text` the quotation mark stands that was opened and not closed as it should be."""
    whole = re.match(f"(?:{_field(delimiter)}{delimiter})*", text)
    return whole.end() if whole else 0


def _damage_within(source: _Lines, delimiter: str) -> str | None:
    """What is wrong with a row of one line, if the next line begins a row whatever was meant; else None."""
    if len(source.row) != 1 or source.row[0].count('"') % 2:
        return None
    column = _opened(source.row[0], delimiter) + 1
    return (
        f"text after the end of a quoted field (its quotation mark opened in column {column}): double the marks in it"
    )


def _damage_beyond(source: _Lines, delimiter: str, name: str, error: csv.Error) -> str:
    text = "".join(source.row)
    at = _opened(text, delimiter)
    if text[at : at + 1] == '"':
        line = source.start + text.count("\n", 0, at)
        return f"{name}: the quotation mark opened on line {line} is not closed: close it, or double it if it is text"
    if re.search(r"\r(?!\n)", text):
        return f"{name}: line {source.number} has a carriage return (CR) without a line feed (LF): save it with LF"
    return f"{name} is not valid CSV (line {source.number}: {error})"


# ---------------------------------------------------------------- rows and cells
def _csv_record(where: str, header: list[str], fields: list[str], source: _Lines, delimiter: str) -> Record:
    if not _is_utf8("".join(fields)):
        return Record(where, None, "not UTF-8")
    if "\x00" in "".join(fields):
        return Record(where, None, "it holds a NUL character: the file is damaged there")
    if not _well_formed("".join(source.row), delimiter):
        problem = "a quotation mark inside a field that does not begin with one: quote the field, and double the mark"
        return Record(where, None, problem)
    if len(fields) != len(header):
        return Record(where, None, f"{len(fields)} fields where the header has {len(header)}")
    if fields[0].startswith(BOM) or [field.strip() for field in fields] == header:
        return Record(where, None, "a second header or byte-order mark: files were joined here")
    row = dict(zip(header, fields, strict=True))
    for column in PROMPTS:
        if row.get(column) == "":
            return Record(where, None, f"{column}: the cell is empty, and a missing value is no prompt")
    try:
        return record(where, {column: cell(column, text) for column, text in row.items()})
    except EndoRewardError as error:
        return Record(where, None, str(error))


def cell(column: str, text: str) -> Any:
    """A cell of a table: text, unless it spells out what its column needs, as JSON or (pandas) as Python.

    EndoRewardError: it begins as that and is damaged. Scored as text it would be another answer.
    """
    begins, stripped = text.lstrip()[:1], text.strip()
    if column == TERMINAL:
        return {"": None, "true": True, "1": True, "false": False, "0": False}.get(stripped.lower(), text)
    if column in GIVEN:
        value = _value(text) if stripped else None
        if value is None and stripped not in ("", "null", "None"):
            raise EndoRewardError(f"{column}: a list or an object is wanted, and this is neither JSON nor Python's")
        return value
    if column not in COLUMNS or begins != "[":
        return text
    value = _value(text)
    if isinstance(value, list) and (column in LISTS or is_messages(value)):
        return value
    if column in LISTS or (value is None and MESSAGES.match(text)):
        raise EndoRewardError(f"{column}: looks like a list, and is neither JSON nor a list of Python's")
    return text


def _value(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that `text` spells out, or None."""
    for parse in (loads, _python):
        try:
            value = parse(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(value, (list, dict)):
            return value
    return None


def _python(text: str) -> Any:
    """A Python literal, in which a dict with a key twice is an `Ambiguous`.

    ValueError for strings side by side (NumPy writes ['a' 'b'], which Python reads as ['ab']) and for a comment, behind
    which Python would read nothing.
    """
    strings = False
    for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and strings):
            raise ValueError("a comment, or two strings side by side")
        if token.type not in (tokenize.NL, tokenize.NEWLINE):
            strings = token.type == tokenize.STRING
    ast.literal_eval(text.strip())  # or a ValueError: it is none
    return _of_node(ast.parse(text.strip(), mode="eval").body)


def _of_node(node: Any) -> Any:
    if isinstance(node, ast.Dict):
        keys = (ast.literal_eval(key) for key in node.keys if key is not None)
        return of_pairs(list(zip(keys, map(_of_node, node.values), strict=True)))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_of_node(one) for one in node.elts]
    return ast.literal_eval(node)
