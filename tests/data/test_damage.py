"""Damaged, foreign and ambiguous files: an error names the place, and no wrong row is read."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import pytest

from endoreward_fast.data.files import open_source
from written import put, read


def table(*lines, delimiter=","):
    return "".join(line + "\n" for line in ("prompt,completion", *lines)).replace(",", delimiter)


# ---------------------------------------------------------------- CSV
@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["a,b", 'q,"never closed', *["p,c"] * 47], 3),
        (["a,b", '"never closed,c', *["p,c"] * 7], 3),
        (["a,b", 'q,"never closed', "p,c", 'p,"d"', "p,c"], 3),  # the mark of a later cell seems to close it
        (["a,b", 'q,"never closed', "p,c", 'p,"d ""e"" f"', "p,c"], 3),
        (["a,b", '"two\nlines","never closed', "p,c"], 4),
        (["a,b", 'q,"'], 3),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_quotation_mark_that_is_never_closed_is_located(lines, line, delimiter, tmp_path):
    found, error = read(tmp_path, "a.csv", table(*lines, delimiter=delimiter))
    assert found == [{"prompt": "a", "completion": "b"}]
    assert f"the quotation mark opened on line {line} is not closed" in error


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('p,"a"b', "text after the end of a quoted field (opened in column 3)"),
        ('"p" ,"a"', "text after the end of a quoted field (opened in column 1)"),
        ('p,5" pipe', "a quotation mark inside an unquoted field"),
        ('p, "a"', "a quotation mark inside an unquoted field"),
        ('p, "a, b"', "a quotation mark inside an unquoted field"),
        ("p,a\x00b", "a NUL character"),
        ("\ufeffp,a", "a second header or byte-order mark: files were joined here"),
        ("prompt,completion", "a second header or byte-order mark: files were joined here"),
        (",a", "prompt: the cell is empty: fill it, or remove the row"),
        ("p", "1 fields, but the header has 2"),
        ("p,a,b", "3 fields, but the header has 2"),
    ],
)
def test_a_damaged_csv_row_fails_alone(line, error, tmp_path):
    found, ended = read(tmp_path, "a.csv", table("a,b", line, "c,d"))
    assert ended is None and found[0] == {"prompt": "a", "completion": "b"}
    assert found[1].startswith(error) and found[2] == {"prompt": "c", "completion": "d"}


def test_well_formed_csv_rows_are_read(tmp_path):
    lines = ['"say ""hi""","a, b"', '"two\nlines",""', "p,", '"p","a"\r', "nan,None"]
    found, ended = read(tmp_path, "a.csv", table(*lines))
    assert ended is None
    assert [tuple(row.values()) for row in found] == [
        ('say "hi"', "a, b"), ("two\nlines", ""), ("p", ""), ("p", "a"), ("nan", "None"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ("prompt,completion,completion\np,a,b\n", "has two columns named 'completion': rename one"),
        ("prompt,completion, prompt\np,a,b\n", "has two columns named 'prompt': rename one"),
        ("prompt,,completion,\np,a,b,c\n", "has 2 columns without a name"),
        (b"prompt,completion,\xe9t\xe9\np,a,b\n", "is not UTF-8 (its header)"),
        ('"prompt,completion\np,a\n', "the quotation mark opened on line 1 is not closed"),
        ("prompt,completion\rp,a\rq,b\r", "has a carriage return (CR) without a line feed (LF): save it with LF"),
        ("prompt;answer,question\np;a,b\n", "',' and ';' may both separate its header"),
    ],
)
def test_an_ambiguous_csv_header_is_refused(data, error, tmp_path):
    found, ended = read(tmp_path, "a.csv", data)
    assert found == [] and error in ended


def test_one_column_without_a_name_is_the_pandas_index(tmp_path):
    found, _ = read(tmp_path, "a.csv", ",prompt,completion\n0,p,a\n")
    assert found == [{"": "0", "prompt": "p", "completion": "a"}]


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("completions", "['a' 'b']"),  # NumPy's format; Python would read ['ab']
        ("completions", "['a'\n 'b']"),
        ("completions", '["a", "b"'),
        ("messages", "[{'role': 'user', 'content': 'u'}\n {'role': 'assistant', 'content': 'a'}]"),
        ("chosen", "[{'content': 'u', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]"),
        ("completion", "[{'role': 'assistant', 'content': 'a'"),
    ],
)
def test_a_damaged_list_is_not_scored_as_text(column, cell, tmp_path):
    found, ended = read(tmp_path, "a.csv", f'prompt,{column}\np,"{cell.replace(chr(34), chr(34) * 2)}"\n')
    assert ended is None and found == [f"{column}: looks like a list, but is neither JSON nor a Python literal"]


def test_text_in_brackets_is_text(tmp_path):
    found, _ = read(tmp_path, "a.csv", 'prompt,completion\np,"[see ""x""]"\np,[{ok}]\n')
    assert [row["completion"] for row in found] == ['[see "x"]', "[{ok}]"]


def test_rows_before_the_damage_come_before_the_file_is_read_to_its_end(tmp_path):
    rows = iter(open_source(str(put(tmp_path, "a.csv", table(*["p,c"] * 9999, 'p,"x')))).records)
    assert next(rows).row == {"prompt": "p", "completion": "c"}


# ---------------------------------------------------------------- JSON
@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"prompt": "p", "prompt": "q", "completion": "c"}', "the key 'prompt' occurs twice in one object: keep one"),
        ('{"messages": [{"role": "user", "role": "assistant", "content": "c"}]}', "the key 'role' occurs twice"),
        ('{"prompt": "p", "completion": "c"} {"prompt": "q"}', "not valid JSON (Extra data"),
        ('\ufeff{"prompt": "p", "completion": "c"}', "not valid JSON (Unexpected UTF-8 BOM"),
        ('{"prompt": "p", "completion": "c', "not valid JSON ("),
        ('{"prompt": "p", "completion": "a\x00"}', "not valid JSON (Invalid control character"),
        ("{'prompt': 'p', 'completion': 'c'}", "not valid JSON"),
    ],
)
def test_a_damaged_json_line_fails_alone(line, error, tmp_path):
    good = json.dumps({"prompt": "p", "completion": "c"})
    found, ended = read(tmp_path, "a.jsonl", f"{good}\n{line}\n{good}\n")
    assert ended is None and found[1].startswith(error) and isinstance(found[0], dict) and isinstance(found[2], dict)


PANDAS = {"prompt": {"0": "a", "1": "b"}, "completion": {"1": "y", "0": "x"}}


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        (PANDAS, [{"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "y"}]),
        ({"data": [{"prompt": "a", "completion": "x"}], "schema": {"fields": []}, "splits": ["train"]},
         [{"prompt": "a", "completion": "x"}]),
        ({"prompt": "p", "completion": "c", "meta": {"0": 1}}, [{"prompt": "p", "completion": "c", "meta": {"0": 1}}]),
    ],
)  # fmt: skip
def test_rows_of_a_json_document(value, rows, tmp_path):
    assert read(tmp_path, "a.json", json.dumps(value)) == (rows, None)


ROW = '{"prompt": "p", "completion": "c"}'


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (json.dumps({"prompt": {"0": "a", "1": "b"}, "completion": {"0": "x", "2": "y"}}), "has row '1'"),
        (json.dumps({"prompt": {"0": "a", "1": "b"}, "completion": {"0": "x"}}), "has row '1'"),
        ('{"prompt": {"0": "a", "0": "b"}, "completion": {"0": "x"}}', "the key '0' occurs twice"),
        ('{"prompt": ["a"], "completion": ["x"], "prompt": ["b"]}', "the key 'prompt' occurs twice"),
        (f'{{"data": [{ROW}], "test": [{ROW}]}}', 'has rows under "data" and under "test"'),
        (f"[{ROW}]\n[{ROW}]\n", "not valid JSON (Extra data"),
        (f"[{ROW}] trailing", "not valid JSON (Extra data"),
        (f"[{ROW},\n{ROW}", "not valid JSON (Expecting"),
        (f'{{\n"prompt": "p",\n"meta":\n{ROW}\n', "not valid JSON (Expecting"),
        (b'[{"prompt": "caf\xe9", "completion": "c"}]', "is not UTF-8 (line 1): save it as UTF-8"),
    ],
)
def test_a_damaged_json_document_is_refused(data, error, tmp_path):
    found, ended = read(tmp_path, "a.json", data)
    assert found == [] and error in ended


def test_a_repeated_key_fails_its_row_only(tmp_path):
    found, ended = read(tmp_path, "a.json", f'[{ROW}, {{"prompt": "p", "prompt": "q"}}, {ROW}]')
    assert ended is None and found[1].startswith("the key 'prompt' occurs twice") and found[0] == found[2]


# ---------------------------------------------------------------- gzip and Parquet
@pytest.mark.parametrize("tail", [b"garbage", b"{}\n", gzip.compress(b"more\n", mtime=0)[:-6]])
def test_rows_before_garbage_behind_a_gzip_are_read(tail, tmp_path):
    found, ended = read(tmp_path, "a.jsonl.gz", gzip.compress(f"{ROW}\n".encode() * 3, mtime=0) + tail)
    assert len([row for row in found if isinstance(row, dict)]) == 3 and "cannot read" in ended


def test_a_repeated_parquet_column_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    out = io.BytesIO()
    columns = [pyarrow.array([text]) for text in "pab"]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "completion", "completion"]), out)
    assert read(tmp_path, "a.parquet", out.getvalue()) == ([], read(tmp_path, "a.parquet", out.getvalue())[1])
    assert "has two columns named 'completion': rename one" in read(tmp_path, "a.parquet", out.getvalue())[1]


# ---------------------------------------------------------------- other formats
def zipped(*names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            if name == "mimetype":  # the one part that an OpenDocument file does not compress
                file.writestr(name, "application/vnd.oasis.opendocument.spreadsheet", zipfile.ZIP_STORED)
            else:
                file.writestr(name, "x")
    return out.getvalue()


def tarred():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.jsonl"))
    return out.getvalue()


FOREIGN = {
    "a.xlsx": (zipped("[Content_Types].xml", "_rels/.rels", "xl/workbook.xml"), "an Excel workbook (.xlsx): save its"),
    "a.ods": (zipped("mimetype"), "an OpenDocument spreadsheet (.ods)"),
    "a.docx": (zipped("[Content_Types].xml", "word/document.xml"), "a Word document (.docx)"),
    "a.npz": (zipped("x.npy"), "a NumPy archive (.npz)"),
    "a.zip": (zipped("a.jsonl"), "a ZIP archive or an office document: unpack it with `unzip`"),
    "a.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an old Excel or Word file"),
    "a.jsonl.xz": (lzma.compress(b"{}"), "xz-compressed: unpack it with `xz -d`"),
    "a.jsonl.bz2": (bz2.compress(b"{}"), "bzip2-compressed: unpack it with `bzip2 -d`"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd" + bytes(9), "zstd-compressed: unpack it with `zstd -d`"),
    "a.jsonl.lz4": (b"\x04\x22\x4d\x18" + bytes(9), "lz4-compressed"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(9), "a 7z archive"),
    "a.tar": (tarred(), "a tar archive: unpack it with `tar -xf`"),
    "a.arrow": (b"ARROW1\x00\x00" + bytes(99), "an Arrow (Feather) file: save it as Parquet"),
    "b.arrow": (b"\xff\xff\xff\xff\x10\x00\x00\x00", "an Arrow stream: save it as Parquet"),
    "a.feather": (b"FEA1" + bytes(99), "a Feather file: save it as Parquet"),
    "a.npy": (b"\x93NUMPY\x01\x00", "a NumPy array"),
    "a.pkl": (pickle.dumps([{"prompt": "p"}]), "a Python pickle"),
    "a.sqlite": (b"SQLite format 3\x00" + bytes(99), "an SQLite database"),
    "a.safetensors": ((80).to_bytes(8, "little") + b'{"w": {}}', "a safetensors file (a model's weights), not data"),
    "a.gguf": (b"GGUF\x03\x00\x00\x00", "a GGUF model, not data"),
    "a.pdf": (b"%PDF-1.7\n", "a PDF"),
    "a.orc": (b"ORC\x0a\x03\x00\x00", "an ORC file"),
    "a.avro": (b"Obj\x01\x04", "an Avro file"),
    "a.h5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "page.jsonl": (b"\n<!DOCTYPE html>\n<html>", "an HTML or XML page, not the data itself: download the file"),
    "page.csv": (b"<html><body>", "an HTML or XML page"),
    "a.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "utf16.jsonl": (f"{ROW}\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
    "utf16le.jsonl": (f"{ROW}\n".encode("utf-16-le"), "UTF-16, UTF-32 or binary"),
    "utf16be.csv": (table("p,a").encode("utf-16-be"), "UTF-16, UTF-32 or binary"),
    "utf32.csv": (table("p,a").encode("utf-32"), "UTF-32: save it as UTF-8"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(b"{}")), "gzipped twice"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_format_is_named(name, packed, tmp_path):
    data, message = FOREIGN[name]
    found, ended = read(tmp_path, name, gzip.compress(data) if packed else data)
    assert found == [] and f"{name} is {message}" in ended
    assert ": " in ended.split(" is ", 1)[1]  # and what to do


def test_text_that_begins_like_another_format_is_text(tmp_path):
    for name in ("ORC", "GGU", "Obj", "PAR", "BZh9"):
        found, ended = read(tmp_path, "a.csv", f"{name},prompt,completion\n1,p,a\n")
        assert ended is None and found == [{name: "1", "prompt": "p", "completion": "a"}]
