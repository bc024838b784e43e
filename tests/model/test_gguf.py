"""Models in one GGUF file: scored as the same weights in a folder, or refused in one line."""

import pytest
import torch

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.model import gguf_files
from tiny_models import ROWS, TOKENIZER

for package in ("gguf", "accelerate"):
    pytest.importorskip(package)
from tiny_gguf import llama, written  # noqa: E402


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama())


def test_scores_are_those_of_the_same_weights_elsewhere(file):
    expected = EndoRewardModel(llama().double(), TOKENIZER).score(ROWS)
    for name, options in ((file, {}), (str(file.parent), {"gguf_file": file.name})):
        loaded = EndoRewardModel.from_pretrained(name, device="cpu", **options)
        assert loaded.head.weight.dtype == torch.float32 and loaded.max_positions == 128
        assert TOKENIZER.decode([65]) == loaded.tokenizer.decode([65])
        for one, other in zip(loaded.score(ROWS), expected, strict=True):
            assert one.error is None and one.score == pytest.approx(other.score, rel=1e-4, abs=1e-3)


def test_tied_heads_and_dtypes(tmp_path):
    tied = llama(tie_word_embeddings=True)
    path = written(tmp_path / "tied.gguf", tied, left_out=("output.",))
    loaded = EndoRewardModel.from_pretrained(path, dtype="bf16", device="cpu")
    assert loaded.head.weight.dtype == torch.bfloat16
    expected = EndoRewardModel(tied.bfloat16(), TOKENIZER).score(ROWS[3:4])[0].score
    assert loaded.score(ROWS[3:4])[0].score == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("split", ["smollm", "starcoder", "gpt-2", None])
def test_digits_are_apart_before_merges_in_vocabularies_that_were_learnt_so(tmp_path, split):
    """White space before a digit has other tokens then: "\\n\\n" is one, and GPT-2's split makes two of it."""
    path = written(tmp_path / "tiny.gguf", llama(), merged="Ċ", split=split)
    assert gguf_files.split_of(path) == split
    scorer = EndoRewardModel.from_pretrained(path, device="cpu")
    spelt = [scorer.tokenizer.decode([token]) for token in scorer.tokenizer("a\n\n12").input_ids]
    apart = split in ("smollm", "starcoder")
    assert spelt == (["a", "\n\n", "1", "2"] if apart else ["a", "\n", "\n", "1", "2"])


def refused(path, said, **options):
    with pytest.raises(EndoRewardError, match=said) as caught:
        EndoRewardModel.from_pretrained(path, device="cpu", **options)
    assert "\n" not in str(caught.value) and (path.name in str(caught.value))


def test_what_is_wrong_with_a_file_is_one_line(file, tmp_path, monkeypatch):
    refused(written(tmp_path / "new.gguf", llama(), "starling9"), "starling9")
    refused(written(tmp_path / "clip.gguf", llama(), "clip"), "clip")
    refused(written(tmp_path / "part.gguf", llama(), left_out=("blk.1.attn_q", "output_norm")), "lacks 'model")
    whole = file.read_bytes()
    damaged = {"short": whole[:2000], "cut": whole[:-5000], "header": b"GGUF", "zeros": b"GGUF" + bytes(64)}
    for name, content in damaged.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        refused(tmp_path / f"{name}.gguf", "cannot be loaded")
    (tmp_path / "text.gguf").write_text("no GGUF")
    refused(tmp_path / "text.gguf", "not a GGUF file")
    refused(tmp_path / "absent.gguf", "no such file")
    refused(tmp_path, "no file 'absent.gguf'", gguf_file="absent.gguf")
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    refused(file, "gguf is not installed: pip install gguf")


def test_the_command_takes_its_path(file, tmp_path):
    row = {"prompt": "a", "completion": "b"}
    source, out = put(tmp_path, row), tmp_path / "out.jsonl"
    run("score", source, "-m", file, "-o", out, "-q")
    run("score", source, "-m", file, "-o", out, "-q", "--resume")
    [found] = rows_of(out.read_text())
    assert found["score"] == pytest.approx(EndoRewardModel.from_pretrained(file).score([row])[0].score, rel=1e-6)
