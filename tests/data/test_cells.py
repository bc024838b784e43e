"""Cells of tables: lists and objects that CSV and Parquet hold as text, and values that Python cannot hold."""

import io
import json

import pytest

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardError
from endoreward_fast.data.files import open_source
from endoreward_fast.text.encoding import encode_row
from written import read

CALLS = [{"name": "f", "parameters": {"a": 1}}]
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
SPELT = [
    ("tools", json.dumps(CALLS), CALLS), ("tools", str(CALLS), CALLS), ("tools", "", None), ("tools", " ", None),
    ("tools", "None", None), ("tools", "null", None), ("documents", "[{'title': 't'}]", [{"title": "t"}]),
    ("chat_template_kwargs", '{"a": true}', {"a": True}), ("chat_template_kwargs", "{'a': True}", {"a": True}),
    ("chat_template_kwargs", "", None), ("completion_mask", "[1, 0]", [1, 0]), ("completion_mask", "", None),
    ("terminal", "False", False), ("terminal", "true", True), ("terminal", "0", False), ("terminal", "", None),
    ("terminal", "no", "no"), ("messages", json.dumps(TURNS), TURNS), ("messages", str(TURNS), TURNS),
    ("chosen", json.dumps(TURNS), TURNS), ("completions", "['a', 'b']", ["a", "b"]), ("completion", "[x]", "[x]"),
    ("other", '[{"role": "user"}]', '[{"role": "user"}]'),
]  # fmt: skip
DAMAGED = [
    ("tools", "[{'a': 1, 'a': 2}]", "the key 'a' occurs twice in one object: keep one"),
    ("tools", '[{"a": 1, "a": 2}]', "the key 'a' occurs twice in one object: keep one"),
    ("messages", "[{'role': 'user', 'content': 'u', 'content': 'v'}]", "the key 'content' occurs twice"),
    ("messages", "[{'role': 'user', 'content': [{'x': ({'y': 1, 'y': 2},)}]}]", "the key 'y' occurs twice"),
    ("tools", "nan", "tools: wanted a list or an object"),
    ("tools", "f, g", "tools: wanted a list or an object"),
    ("chat_template_kwargs", "{'a': 1", "chat_template_kwargs: wanted a list or an object"),
    ("completion_mask", "[1, 0", "completion_mask: wanted a list or an object"),
    ("completions", "['a', # 'b'\n 'c']", "completions: looks like a list, but is neither"),
    ("messages", "[{'role': 'user', **{}}]", "messages: looks like a list"),
    ("messages", "[" * 3000, "messages: looks like a list"),
]


def table(kind, columns):
    if kind == "csv":
        import csv

        out = io.StringIO()
        csv.writer(out).writerows([list(columns), list(columns.values())])
        return out.getvalue()
    pyarrow = pytest.importorskip("pyarrow")
    return written(pyarrow.table({name: [text] for name, text in columns.items()}))


def written(columns):
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(columns, out)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(("column", "text", "value"), SPELT)
def test_a_cell_becomes_what_its_column_needs(kind, column, text, value, tmp_path):
    found, ended = read(tmp_path, f"a.{kind}", table(kind, {"prompt": "p", column: text}))
    assert ended is None and found == [{"prompt": "p", column: value}]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(("column", "text", "error"), DAMAGED)
def test_a_damaged_cell_is_an_error(kind, column, text, error, tmp_path):
    [found], ended = read(tmp_path, f"a.{kind}", table(kind, {"prompt": "p", column: text}))
    assert ended is None and isinstance(found, str) and error in found


def test_a_row_of_a_table_gives_the_same_samples_as_json(tmp_path):
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [3, 4], "terminal": False, "completion_mask": [0, 1]},
        {"prompt_ids": [1, 2], "completion_ids": [3, 4], "terminal": None, "completion_mask": None},
    ]
    lines = '"[1, 2]","[3, 4]",False,"[0, 1]"\n"[1, 2]","[3, 4]",,\n'
    (tmp_path / "a.csv").write_text(f"prompt_ids,completion_ids,terminal,completion_mask\n{lines}")
    found = rows_of(run("score", tmp_path / "a.csv", "-q").stdout)
    assert found == rows_of(run("score", put(tmp_path, *rows), "-q").stdout)
    assert found[0]["flags"] == ["bootstrapped"] and "flags" not in found[1]


@pytest.mark.parametrize("value", ["false", "", "x", 2, 0.5, float("nan"), [True], None])
def test_terminal_must_be_true_or_false(value):
    with pytest.raises(EndoRewardError, match="terminal: wanted true or false, found "):
        encode_row(None, {"prompt_ids": [1], "completion_ids": [2], "terminal": value})


# ---------------------------------------------------------------- Parquet
def parquet_of(**columns):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow, {"prompt": ["p", "q"], "completion": ["a", "b"], **columns}


def test_a_repeated_parquet_field_is_refused(tmp_path):
    pyarrow, columns = parquet_of()
    pair = pyarrow.StructArray.from_arrays([pyarrow.array(["1", "1"]), pyarrow.array(["2", "2"])], names=["x", "x"])
    nested = pyarrow.StructArray.from_arrays([pair], names=["in"])
    listed = pyarrow.ListArray.from_arrays([0, 1, 2], pair)
    for value in (pair, nested, listed):
        found, ended = read(tmp_path, "a.parquet", written(pyarrow.table({**columns, "s": value})))
        assert found == [] and "a.parquet has two fields named 'x' in one object: rename one" in ended


def test_a_parquet_value_that_python_cannot_hold_fails_its_row(tmp_path):
    pyarrow, columns = parquet_of()
    bytes_of = pyarrow.array([b"ok", b"\xff\xfe"]).buffers()
    odd = {
        "far": pyarrow.array([1, 10**15], pyarrow.timestamp("s")),
        "text": pyarrow.Array.from_buffers(pyarrow.string(), 2, bytes_of),
        "day": pyarrow.array([1, 2**31 - 1], pyarrow.date32()),
    }
    for name, values in odd.items():
        first, second = read(tmp_path, "a.parquet", written(pyarrow.table({**columns, name: values})))[0]
        assert first["prompt"] == "p" and second.startswith(f"{name}: cannot be read ("), (name, second)


def test_bytes_are_not_text(tmp_path):
    pyarrow, columns = parquet_of(completion=[b"a", b"b"])
    path = tmp_path / "a.parquet"
    path.write_bytes(written(pyarrow.table(columns)))
    assert "completion: wanted text or messages, found bytes" in run("score", path, code=2).stderr
    assert [record.row["completion"] for record in open_source(str(path)).records] == [b"a", b"b"]
