"""Reading real files: formats, encodings, damage, and the usual column names."""

import gzip
import importlib.util
import io
import json
import pickle
import sys
from pathlib import Path

import pytest

from endoreward_fast.data.columns import MissingColumns, arrange, plan
from endoreward_fast.data.files import DEEPEST, open_source
from endoreward_fast.errors import EndoRewardError
from written import put

ROWS = [{"prompt": "p é", "completion": "c\u2028d"}, {"prompt": "q", "completion": "e\nf"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
RM_BENCH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "rm-bench"


def read(path, limit=None):
    return list(open_source(str(path), limit).records)


def rows(path):
    records = read(path)
    assert [r.error for r in records] == [None] * len(records)
    return [r.row for r in records]


FORMATS = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "lines.txt": LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "blank.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n\n"),
    "no-newline-at-end.jsonl": LINES.rstrip(b"\n"),
    "packed.jsonl.gz": gzip.compress(LINES, mtime=0),
    "packed-without-saying-so.jsonl": gzip.compress(LINES, mtime=0),
    "array.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "array": json.dumps(ROWS),
    "data.json": json.dumps({"data": ROWS}),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "pandas.json": json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}),
    "comma.csv": '"prompt",completion\r\np é,c\u2028d\r\nq,"e\nf"\r\n',
    "bom.csv": b"\xef\xbb\xbf" + 'prompt,completion\np é,c\u2028d\nq,"e\nf"\n'.encode(),
    "semicolon.csv": 'prompt;completion\np é;c\u2028d\nq;"e\nf"\n',
    "tab.tsv": 'prompt\tcompletion\np é\tc\u2028d\nq\t"e\nf"\n',
    "csv-by-content": 'prompt,completion\np é,c\u2028d\nq,"e\nf"\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    assert rows(put(tmp_path, name, FORMATS[name])) == ROWS


@pytest.mark.parametrize("data", [LINES, gzip.compress(LINES, mtime=0), json.dumps(ROWS).encode()])
def test_standard_input(data, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    source = open_source("-")
    assert source.name == "standard input"
    assert [r.row for r in source.records] == ROWS


def test_a_stream_is_read_no_further_than_asked(tmp_path):
    path = put(tmp_path, "a.jsonl", LINES + b"{broken\n" * 3)
    source = open_source(str(path), limit=2)
    assert [r.error for r in source.records] == [None, None]
    assert source.total == 2
    assert open_source(str(path)).total == 5


def test_one_object_is_one_row(tmp_path):
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for row in ({"prompt": "p", "completions": ["a", "b"]}, {"prompt": chat[:1], "completion": chat[1:]}):
        assert rows(put(tmp_path, "one.json", json.dumps(row, indent=1))) == [row]
    assert rows(put(tmp_path, "two.json", json.dumps({"messages": [chat, chat]}))) == [{"messages": chat}] * 2


def test_malformed_lines_are_named_and_fail_alone(tmp_path):
    bad = [b"{oops", b'"text"', b'{"prompt": "\xff"}', b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"]
    path = put(tmp_path, "a.jsonl", LINES + b"\n".join(bad) + b"\n" + LINES)
    records = read(path)
    assert [r.row for r in records if r.row] == ROWS * 2
    assert [r.where for r in records if r.error] == [f"line {n}" for n in range(3, 8)]
    errors = [r.error for r in records if r.error]
    assert errors[0].startswith("not valid JSON (Expecting property name")
    assert errors[1] == "wanted a JSON object, found a string"
    assert errors[2] == "not UTF-8 (byte 13)"
    assert all(e.startswith("not valid JSON") for e in errors[3:])


def test_lines_are_counted_from_the_top_of_the_file(tmp_path):
    records = read(put(tmp_path, "a.jsonl", b"\n \n" + LINES + b"\n{oops\n"))
    assert [r.where for r in records] == ["line 3", "line 4", "line 6"]


def test_a_bad_first_line_fails_alone(tmp_path):
    for name in ("a.jsonl", "a.json", "a.txt"):
        records = read(put(tmp_path, name, b"{oops\n" + LINES))
        assert [r.where for r in records if r.error] == ["line 1"]
        assert [r.row for r in records if r.row] == ROWS


def test_csv_rows_that_do_not_fit_the_header(tmp_path):
    long = "x" * 200_000  # above the csv module's default limit
    path = put(tmp_path, "a.csv", b"prompt,completion\np,c,d\np,\xff\np\np," + long.encode() + b"\n")
    records = read(path)
    assert [r.error for r in records] == [
        "3 fields, but the header has 2",
        "not UTF-8",
        "1 fields, but the header has 2",
        None,
    ]
    assert records[0].where == "row 1 (ends on line 2)"
    assert records[3].row["completion"] == long


def test_csv_cells_may_hold_lists(tmp_path):
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    cells = {
        "completions": (json.dumps(["a", "b"]), ["a", "b"]),
        "responses": (repr(["it's", "b"]), ["it's", "b"]),
        "messages": (json.dumps(chat), chat),
        "chosen": (repr(chat), chat),
        "completion": ("[1, 2]", "[1, 2]"),
        "note": ("[1, 2]", "[1, 2]"),
        "answer": ("[see below]", "[see below]"),
    }
    text = ",".join(cells) + "\n" + ",".join('"' + cell.replace('"', '""') + '"' for cell, _ in cells.values())
    assert rows(put(tmp_path, "a.csv", text)) == [{name: value for name, (_, value) in cells.items()}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty: there is nothing to score"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"prompt,completion\n", "has a header and no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b"{}x", "not valid JSON (Extra data, line 1 column 3)"),
        ("a.json", b"\n[1,\n2", "not valid JSON (Expecting ',' delimiter, line 3"),
        ("a.json", b"[\n{}\n{}\n]", "not valid JSON"),
        ("a.json", b"3", "wanted an array or an object, found a number"),
        ("a.json", json.dumps({"prompt": ["a"], "completion": []}), "differ in length: {'prompt': 1, 'completion': 0}"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "cannot read"),
        ("a.jsonl.gz", b"\x1f\x8bnothing", "cannot read"),
    ],
)
def test_unreadable_files_say_why_in_one_line(name, data, message, tmp_path):
    with pytest.raises(EndoRewardError) as caught:
        read(put(tmp_path, name, data))
    assert message in str(caught.value)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(EndoRewardError, match=r"no such file: .*nowhere\.jsonl"):
        open_source(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(EndoRewardError, match=r"cannot read .*: Is a directory"):
        open_source(str(tmp_path))


def test_parquet_rows_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        assert rows(path) == ROWS
        long = pyarrow.Table.from_pylist([{"prompt": str(i), "completion": "c" * i} for i in range(2000)])
        parquet.write_table(long, path, row_group_size=100)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(EndoRewardError, match=r"cannot read .*a\.parquet: "):
            read(path)
        path.write_bytes(whole[:9000] + bytes(500) + whole[9500:])
        with pytest.raises(EndoRewardError, match=r"cannot read .*a\.parquet to its end: "):
            read(path)
    else:
        path.write_bytes(b"PAR1" + bytes(20))
        with pytest.raises(EndoRewardError, match="is Parquet: to read it, `pip install pyarrow`"):
            read(path)


def test_nulls_that_parquet_fills_into_tool_calls_are_left_out(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": [2]}}}]
    messages = [{"role": "user", "content": None}, {"role": "assistant", "content": None, "tool_calls": calls}]
    tools = [{"name": "f", "parameters": {"a": {"type": "int"}}}, {"name": "g", "parameters": {"b": {"enum": [1]}}}]
    path = tmp_path / "calls.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages, "tools": tools}]), path)
    (row,) = rows(path)
    assert row["messages"][1]["tool_calls"] == calls and row["tools"] == tools
    assert row["messages"][0]["content"] is None


USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "samples", "layout"),
    [
        ({"prompt": "p", "completion": "c"}, [("p", "c")], 0),
        ({"question": "p", "answer": 42}, [("p", "42")], 0),
        ({"prompt": "p", "response": 1.5}, [("p", "1.5")], 0),
        ({"prompt": "p", "completion": ""}, [("p", "")], 0),
        ({"prompt": [USER], "completion": "c"}, [([USER], "c")], 0),
        ({"prompt": "u", "completion": [ASSISTANT]}, [([USER], [ASSISTANT])], 0),
        ({"prompt": "p", "completions": ["a", "b"]}, [("p", "a"), ("p", "b")], [0, 1]),
        ({"prompt": "p", "completions": []}, [], []),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, [("p", "a"), ("p", "b")], {"chosen": 0, "rejected": 1}),
        (
            {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"]},
            [("p", "a"), ("p", "b"), ("p", "c")],
            {"chosen": [0], "rejected": [1, 2]},
        ),
        (  # UltraFeedback: a text prompt, and whole conversations
            {"prompt": "u", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            [([USER], [ASSISTANT]), ([USER], [OTHER])],
            {"chosen": 0, "rejected": 1},
        ),
        (  # the prompt repeated as messages
            {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [OTHER]},
            [([USER], [ASSISTANT]), ([USER], [OTHER])],
            {"chosen": 0, "rejected": 1},
        ),
        (  # the implicit prompt of chats
            {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            [([USER], [ASSISTANT]), ([USER], [OTHER])],
            {"chosen": 0, "rejected": 1},
        ),
        (  # two equal conversations still have a last turn to score
            {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
            [([USER], [ASSISTANT]), ([USER], [ASSISTANT])],
            {"chosen": 0, "rejected": 1},
        ),
        (  # the implicit prompt of texts, cut at a word's start
            {"chosen": "Human: hi Assistant: there", "rejected": "Human: hi Assistant: then so"},
            [("Human: hi Assistant:", " there"), ("Human: hi Assistant:", " then so")],
            {"chosen": 0, "rejected": 1},
        ),
    ],
)
def test_columns_become_samples(row, samples, layout):
    before = json.dumps(row)
    task = plan(row)
    assert [(s["prompt"], s["completion"]) for s in task.samples] == samples
    assert task.layout == layout
    assert json.dumps(row) == before


def test_messages_and_token_ids_go_through_as_they_are():
    ids = {"prompt_ids": [1, 2], "completion_ids": []}
    for row in ({"messages": [USER, ASSISTANT]}, {**ids, "terminal": False}):
        assert plan({**row, "id": 3}).samples == (row,)
    assert plan(ids).samples == ({**ids, "terminal": True},)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": None}, "completion: wanted text or messages, found null"),
        ({"prompt": "p", "completion": True}, "completion: wanted text or messages, found true or false"),
        ({"prompt": "p", "completion": ["a"]}, "completion: wanted text or messages, found an array"),
        ({"prompt": None, "completion": "c"}, "prompt: wanted text"),
        ({"prompt": "p", "completion": "\ud83d"}, "completion: character 1 is half of a surrogate pair"),
        ({"prompt": "p", "completions": "a"}, "completions: wanted an array of completions, found a string"),
        ({"prompt": "p", "completions": ["a", {}]}, r"completions\[1\]: wanted text"),
        ({"prompt": "p", "chosen": [], "rejected": ["a"]}, "chosen: wanted at least one completion"),
        ({"prompt": "p", "chosen": ["a"], "rejected": [None]}, r"rejected\[0\]: wanted text"),
        ({"messages": [ASSISTANT, USER]}, "the last turn must be the assistant's, found 'user'"),
        ({"messages": "u"}, "messages: wanted an array of"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\].content: wanted text"),
        ({"chosen": "a b", "rejected": [ASSISTANT]}, "must both be text or both be messages"),
        ({"chosen": "one", "rejected": "two"}, "no common start"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [USER, OTHER]}, "the last turn must be"),
        ({"prompt_ids": [1], "completion_ids": ["a"]}, "completion_ids: wanted an array of token ids"),
    ],
)
def test_cells_that_cannot_be_scored_are_named_with_a_reason(row, message):
    with pytest.raises(EndoRewardError, match=message) as caught:
        plan(row)
    assert not isinstance(caught.value, MissingColumns)


@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("score", {"text": "t", "label": 1}),
        ("score", {"completion": "no prompt"}),
        ("rank", {"prompt": "p", "completion": "c"}),
        ("eval", {"prompt": "p", "completions": ["c"]}),
        ("eval", {"chosen": ["a"], "rejected": ["b"]}),
        ("score", {}),
    ],
)
def test_missing_columns_name_the_wanted_and_the_found(command, row):
    with pytest.raises(MissingColumns) as caught:
        plan(row, command)
    assert "columns wanted: prompt" in str(caught.value)
    assert f"found: {', '.join(row) or 'none'}" in str(caught.value)


def test_arrange_gives_scores_the_shape_of_the_row():
    assert arrange({"chosen": [0, 1], "rejected": 2}, lambda i: i * 10) == {"chosen": [0, 10], "rejected": 20}


@pytest.mark.skipif(not RM_BENCH.exists(), reason="RM-Bench's files are not at ../shared/data/rm-bench")
@pytest.mark.parametrize(
    ("name", "count"), [("chat", 129), ("code", 228), ("safety-refuse", 284), ("safety-response", 157)]
)
def test_published_rm_bench_files_are_read(name, count):
    records = read(RM_BENCH / f"{name}_filtered.json")
    tasks = [plan(r.row, "eval") for r in records]
    assert len(tasks) == count
    assert all(t.layout == {"chosen": [0, 1, 2], "rejected": [3, 4, 5]} for t in tasks)
    assert tasks[0].samples[3]["completion"] == records[0].row["rejected"][0]


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_a_row_that_is_nested_too_deeply_fails_alone(tmp_path, name):
    """The limit is the same for one process and for several, which exchange rows by pickle."""
    fits, deeper = ("[" * levels + "]" * levels for levels in (DEEPEST - 1, DEEPEST))
    lines = [f'{{"prompt": "p", "completion": "c", "x": {x}}}' for x in (fits, deeper, '{"a": [1, {"b": 2}]}')]
    path = tmp_path / name
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]")
    found = list(open_source(str(path)).records)
    assert [record.error for record in found] == [None, f"nested more than {DEEPEST} levels deep", None]
    assert found[1].row is None and pickle.loads(pickle.dumps(found)) == found
