"""`endoreward show` and `endoreward plot`, with the embedded model."""

import json
import re
import sys

import pytest

from cli_harness import put, run
from endoreward_fast import EndoRewardModel, pipeline
from endoreward_fast.plots import FEWEST, Kind

ROW = {"prompt": "What is the capital of France?", "completions": ["Paris", "Rome <script>x</script>"]}
PAIRS = [{"prompt": f"What is {n} + 1?", "chosen": str(n + 1), "rejected": "wrong " * n} for n in range(1, 8)]
ASKED = ("--prompt", ROW["prompt"], "--completion", "Paris", "--completion", "Rome <script>x</script>")


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("FORCE_COLOR", "NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


def test_show_without_colours_gives_numbers(tmp_path):
    expected = EndoRewardModel.from_pretrained("pocket").score(
        [{"prompt": ROW["prompt"], "completion": c} for c in ROW["completions"]], per_token=True
    )
    out = run("show", put(tmp_path, ROW), "-q").stdout
    assert out == run("show", *ASKED, "-q").stdout.replace("command line", "line 1")
    assert "\x1b" not in out
    printed = [float(n) for n in re.findall(r"\[([+-]\d+\.\d\d)\]", out)]
    assert printed == pytest.approx([r for e in expected for r in e.tokens.rewards], abs=0.006)
    heads = re.findall(r"^completion (\d)  (\S+)  (\d+) tokens(  best)?$", out, re.M)
    assert [(n, score, best) for n, score, _, best in heads] == [
        ("1", f"{expected[0].score:+.2f}", "  best"),
        ("2", f"{expected[1].score:+.2f}", ""),
    ]


def test_show_in_colour_centres_it_at_0(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    out = run("show", *ASKED, "-q").stdout
    assert re.search(r"\x1b\[4;38;2;[\d;]+;48;2;168;79;8m", out)  # the most negative: orange, underlined
    assert "48;2;29;102;173m" in out and "[+" not in out


def test_the_terminal_gets_no_control_characters_of_the_completions(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = run("show", "--prompt", "a\x1b[2J", "--completion", "b\x1b]0;title\x07[bold]", "-q").stdout
    without_colours = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "\x1b" not in without_colours and "\x07" not in without_colours
    assert "\\x1b[2J" in without_colours and "\\x1b]0;title\\x07[bold]" in without_colours


def test_show_writes_a_page_with_all_four_numbers(tmp_path):
    target = tmp_path / "out.html"
    result = run("show", put(tmp_path, ROW, *PAIRS[:1]), "--html", target)
    html = target.read_text()
    assert result.stdout == "" and "scored 2 of 2 rows" in result.stderr
    assert "&lt;" in html and "<script>x" not in html
    assert html.count("entropy ") == html.count("value ") == html.count("log-prob ") == html.count('tabindex="0"') > 8
    assert all(f'class="label">{name}<' in html for name in ("completion 1", "completion 2", "chosen", "rejected"))


def test_rows_of_every_shape_and_rows_that_fail(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids = {"prompt_ids": [5, 6], "completion_ids": [7, 8]}
    path = put(
        tmp_path,
        {"messages": chat},
        ids,
        "{",
        {"prompt": "p", "completion": "word " * 99},
        {"prompt": "p", "completion": ""},
    )
    result = run("show", path, "--max-length", 60, code=2)
    assert "user: Hi" in result.stdout and "2 token ids" in result.stdout
    assert result.stdout.count("no score") == 2
    assert "line 3" in result.stderr and "line 4" in result.stderr


def test_show_says_that_it_stops_at_twenty_rows(tmp_path):
    path = put(tmp_path, *({"prompt": "p", "completion": str(n)} for n in range(30)))
    result = run("show", path)
    assert result.stdout.count("tokens") == 20 and "--limit" in result.stderr
    assert run("show", path, "--limit", 21, "-q").stdout.count("tokens") == 21


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "FILE, or --prompt"),
        (("--prompt", "a"), "at least one --completion"),
        (("--completion", "a"), "FILE, or --prompt"),
        (("x.jsonl", "--prompt", "a"), "name one of them"),
        ((*ASKED, "--html", "a.html", "-o", "b.txt"), "name one of them"),
        ((*ASKED, "--html", "no/such/folder/a.html"), "cannot write"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_a_model_is_loaded(args, message, monkeypatch):
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: pytest.fail("loaded a model"))
    said = run("show", *args, code=2).stderr.splitlines()
    assert len(said) == 1 and message in said[0]


# --- plot


def test_plot_draws_png_and_the_same_svg_twice(tmp_path):
    path = put(tmp_path, *PAIRS)
    png, svgs = tmp_path / "out.png", [tmp_path / "a.svg", tmp_path / "b.svg"]
    run("plot", path, "-o", png)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for svg in svgs:
        run("plot", path, "-o", svg, "-q")
    assert svgs[0].read_bytes() == svgs[1].read_bytes()
    text = svgs[0].read_text()
    for said in ("chosen (7)", "rejected (7)", "Length bias: correlation -", "by position"):
        assert said in text, said


def test_plot_of_single_completions_and_of_one_row(tmp_path):
    target = tmp_path / "out.svg"
    run("plot", put(tmp_path, {"prompt": "p", "completion": "q"}), "-o", target)
    assert "completions (1)" in target.read_text()
    assert "correlation" not in target.read_text()


def test_plot_refuses_in_one_line(tmp_path, monkeypatch):
    path = put(tmp_path, *PAIRS)
    assert ".png or .svg" in run("plot", path, "-o", tmp_path / "out.pdf", code=2).stderr
    nothing = put(tmp_path, {"prompt": "p", "completion": "word " * 50}, name="long.jsonl")
    target = tmp_path / "none.png"
    assert "nothing to draw" in run("plot", nothing, "--max-length", 9, "-o", target, code=2).stderr
    assert not target.exists()
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: pytest.fail("loaded a model"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = run("plot", path, "-o", tmp_path / "out.png", code=2).stderr.splitlines()
    assert len(said) == 1 and "pip install matplotlib" in said[0]


def test_means_by_position_are_numpys():
    import numpy as np

    kind = Kind()
    table = np.random.default_rng(0).normal(3.0, 2.0, (40, 6))
    lengths = [1 + i % 6 for i in range(37)] + [9] * 3
    for row, length in zip(table, lengths, strict=True):
        kind.add(0.0, [*row, 0.0, 0.0, 0.0][:length])
    assert kind.lengths == lengths
    points = kind.by_position()
    assert len(points) == 6  # three reach further, fewer than FEWEST
    for position, mean, error in points:
        here = [row[position - 1] for row, n in zip(table, lengths, strict=True) if n >= position]
        assert len(here) >= FEWEST
        assert mean == pytest.approx(np.mean(here))
        assert error == pytest.approx(np.std(here, ddof=1) / len(here) ** 0.5)


def test_json_lines_per_token_stay_as_they_were(tmp_path):
    row = json.loads(run("score", put(tmp_path, {"prompt": "p", "completion": "q"}), "--per-token").stdout)
    assert list(row["token_rewards"]) == ["ids", "texts", "rewards", "logprobs", "values"]
