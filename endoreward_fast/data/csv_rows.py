"""Read rows of CSV and TSV with Python's csv module in strict mode, and reject the damage that it accepts."""

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

from ..errors import EndoRewardError
from .json_rows import COLUMNS, GIVEN, LISTS, TERMINAL, loads, of_pairs
from .records import Record, is_messages, record

DELIMITERS = ",;\t"
PROMPTS = ("prompt", "question")
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
BOM = "\ufeff"


class _Lines:
    """Hands lines to csv.reader and keeps the lines of the current row."""

    def __init__(self, lines: Iterator[str], first: int) -> None:
        self._lines = lines
        self.number = first - 1
        """number of the last line read"""
        self.start = first
        """number of the row's first line"""
        self.row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.row.append(line)
        return line

    def next_row(self) -> None:
        """Begin the next row."""
        self.start, self.row = self.number + 1, []


def csv_rows(lines: Iterable[bytes], skipped: int, name: str) -> Iterator[Record]:
    """Yield a Record per row. Raises EndoRewardError at damage after which the next row cannot be found."""
    # A byte that is not UTF-8 becomes a lone surrogate, so that only its own row fails.
    text = (line.decode("utf-8", "surrogateescape") for line in lines)
    first = next(text)
    source = _Lines(itertools.chain([first], text), skipped + 1)
    delimiter = _delimiter(first, name)
    limit = csv.field_size_limit(sys.maxsize)  # the default rejects completions above 128 KiB
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
    """Return the delimiter that gives most columns with a known name. EndoRewardError if two give equally many."""
    known = {}
    for delimiter in DELIMITERS:
        if delimiter in header:
            known[delimiter] = len(COLUMNS & {cell.strip().strip('"') for cell in header.split(delimiter)})
    most = max(known.values(), default=0)
    best = [delimiter for delimiter, count in known.items() if count == most]
    if most and len(best) > 1:
        raise EndoRewardError(f"{name}: {best[0]!r} and {best[1]!r} may both separate its header: use one of them")
    return best[0] if best else DELIMITERS[0]


def _header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if any(not _is_utf8(cell) for cell in header):
        raise EndoRewardError(f"{name} is not UTF-8 (its header): save it as UTF-8")
    if twice := next((cell for n, cell in enumerate(header) if cell in header[:n]), None):
        raise EndoRewardError(f"{name} has two columns named {twice!r}: rename one")
    if header.count("") > 1:  # pandas leaves one without a name: its index
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
    """Return a regular expression for one well-formed field."""
    return rf'(?:"[^"]*(?:""[^"]*)*"|[^"{delimiter}]*)'


def _well_formed(text: str, delimiter: str) -> bool:
    field = _field(delimiter)
    return '"' not in text or re.fullmatch(f"{field}(?:{delimiter}{field})*", text.rstrip("\r\n")) is not None


def _opened(text: str, delimiter: str) -> int:
    """Return the index in `text` of the opening quotation mark that is not closed correctly."""
    whole = re.match(f"(?:{_field(delimiter)}{delimiter})*", text)
    return whole.end() if whole else 0


def _damage_within(source: _Lines, delimiter: str) -> str | None:
    """Return the error of a row of one line if the next line must begin a row, else None."""
    if len(source.row) != 1 or source.row[0].count('"') % 2:
        return None
    column = _opened(source.row[0], delimiter) + 1
    return f"text after the end of a quoted field (opened in column {column}): double the quotation marks inside it"


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
        return Record(where, None, "a NUL character: the file is damaged here")
    if not _well_formed("".join(source.row), delimiter):
        problem = "a quotation mark inside an unquoted field: quote the field, and double the mark"
        return Record(where, None, problem)
    if len(fields) != len(header):
        return Record(where, None, f"{len(fields)} fields, but the header has {len(header)}")
    if fields[0].startswith(BOM) or [field.strip() for field in fields] == header:
        return Record(where, None, "a second header or byte-order mark: files were joined here")
    row = dict(zip(header, fields, strict=True))
    for column in PROMPTS:
        if row.get(column) == "":
            return Record(where, None, f"{column}: the cell is empty: fill it, or remove the row")
    try:
        return record(where, {column: cell(column, text) for column, text in row.items()})
    except EndoRewardError as error:
        return Record(where, None, str(error))


def cell(column: str, text: str) -> Any:
    """Return the value of a cell: text, or the list or object that it writes as JSON or (pandas) as Python.

    Raises EndoRewardError if it begins like a list and is damaged: as text, it would be scored as another answer.
    """
    begins, stripped = text.lstrip()[:1], text.strip()
    if column == TERMINAL:
        return {"": None, "true": True, "1": True, "false": False, "0": False}.get(stripped.lower(), text)
    if column in GIVEN:
        value = value_in(text) if stripped else None
        if value is None and stripped not in ("", "null", "None"):
            raise EndoRewardError(f"{column}: wanted a list or an object, found neither JSON nor a Python literal")
        return value
    if column not in COLUMNS or begins != "[":
        return text
    value = value_in(text)
    if isinstance(value, list) and (column in LISTS or is_messages(value)):
        return value
    if column in LISTS or (value is None and MESSAGES.match(text)):
        raise EndoRewardError(f"{column}: looks like a list, but is neither JSON nor a Python literal")
    return text


def value_in(text: str) -> list[Any] | dict[str, Any] | None:
    """Return the list or object that `text` writes out, or None."""
    for parse in (loads, _python):
        try:
            value = parse(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(value, (list, dict)):
            return value
    return None


def _python(text: str) -> Any:
    """Parse a Python literal. A dict with a repeated key becomes an `Ambiguous`.

    Raises ValueError for adjacent strings, because NumPy writes ['a' 'b'] and Python reads ['ab']; and for a comment,
    because Python would ignore the rest.
    """
    strings = False
    for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and strings):
            raise ValueError("a comment, or two adjacent strings")
        if token.type not in (tokenize.NL, tokenize.NEWLINE):
            strings = token.type == tokenize.STRING
    ast.literal_eval(text.strip())  # raises ValueError if it is not a literal
    return _of_node(ast.parse(text.strip(), mode="eval").body)


def _of_node(node: Any) -> Any:
    if isinstance(node, ast.Dict):
        keys = (ast.literal_eval(key) for key in node.keys if key is not None)
        return of_pairs(list(zip(keys, map(_of_node, node.values), strict=True)))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_of_node(one) for one in node.elts]
    return ast.literal_eval(node)
