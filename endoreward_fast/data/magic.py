"""Recognise files in unsupported formats by their first bytes, and say how to convert them."""

from __future__ import annotations

import re

from ..errors import EndoRewardError

HEAD = 512
"""number of first bytes to look at"""
SAVE = "save it as JSON Lines, CSV or Parquet"
MAGIC = (
    (b"\xfd7zXZ\x00", "xz-compressed", "unpack it with `xz -d`, or pack it with gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it with `zstd -d`, or pack it with gzip"),
    (b"\x04\x22\x4d\x18", "lz4-compressed", "unpack it with `lz4 -d`, or pack it with gzip"),
    (b"\x1f\x9d", "compressed by compress", "unpack it with `uncompress`, or pack it with gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with `7z x`"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it with `unrar x`"),
    (b"\x1f\x8b", "gzipped twice", "unpack it once with `gunzip`"),
    (b"ARROW1", "an Arrow (Feather) file", "save it as Parquet: pandas.read_feather(...).to_parquet(...)"),
    (b"FEA1", "a Feather file", "save it as Parquet: pandas.read_feather(...).to_parquet(...)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "save it as Parquet: datasets.Dataset.from_file(...).to_parquet(...)"),
    (b"PARE", "an encrypted Parquet file", "save it without encryption"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Word file", "save it as CSV (UTF-8)"),
    (b"\x93NUMPY", "a NumPy array", SAVE),
    (b"SQLite format 3\x00", "an SQLite database", "write the rows of its table as CSV: `sqlite3 -csv -header`"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", SAVE),
    (b"Obj\x01", "an Avro file", SAVE),
    (b"GGUF", "a GGUF model, not data", "pass models with --model"),
    (b"%PDF-", "a PDF", SAVE),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
)  # fmt: skip
INSIDE_ZIP = (
    (b"xl/", "an Excel workbook (.xlsx)", "save its sheet as CSV (UTF-8)"),
    (b"opendocument.spreadsheet", "an OpenDocument spreadsheet (.ods)", "save its sheet as CSV (UTF-8)"),
    (b"word/", "a Word document (.docx)", SAVE),
    (b"opendocument", "an OpenDocument file", SAVE),
    (b".npy", "a NumPy archive (.npz)", SAVE),
    (b"data.pkl", "a PyTorch file", SAVE),
)  # fmt: skip
PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body|\?xml|!--)", re.IGNORECASE)
UTF_32 = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def refuse_foreign(head: bytes, name: str) -> None:
    """Raise EndoRewardError if `head`, the first bytes of a file, belong to an unsupported format."""
    if (found := _format(head)) is not None:
        what, advice = found
        raise EndoRewardError(f"{name} is {what}: {advice}")


def _format(head: bytes) -> tuple[str, str] | None:
    """Return (format, advice) of an unsupported format, or None if it may be text or Parquet."""
    for start, what, advice in MAGIC:
        if head.startswith(start):
            return what, advice
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        inside = ((what, advice) for mark, what, advice in INSIDE_ZIP if mark in head)
        return next(inside, ("a ZIP archive or an office document", "unpack it with `unzip`, or save its sheet as CSV"))
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return "bzip2-compressed", "unpack it with `bzip2 -d`, or pack it with gzip"
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it with `tar -xf`"
    if re.match(rb"\x80[\x02-\x05]", head):
        return "a Python pickle", SAVE
    if re.match(rb"ORC[^\t\n\r -~]", head) or (head[:3] == b"ORC" and b"\x00" in head):
        return "an ORC file", SAVE
    if head[8:10] == b'{"' and b"\x00" in head[3:8]:
        return "a safetensors file (a model's weights), not data", "pass models with --model"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"
    if PAGE.match(head):
        return (
            "an HTML or XML page, not the data itself",
            "download the file itself (on a hub, use the link to the raw file)",
        )
    if head.startswith(UTF_32):
        return "UTF-32", "save it as UTF-8"
    if head.startswith(UTF_16):
        return "UTF-16", "save it as UTF-8"
    if b"\x00" in head[:4]:
        return "UTF-16, UTF-32 or binary", "save it as text in UTF-8"
    return None
