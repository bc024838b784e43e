"""`endoreward show` and `endoreward plot`, with the embedded model."""

import json
import math
import re
import sys
from html import escape

import pytest
from rich.color import Color

from cli_harness import put, run
from endoreward_fast import EndoRewardModel
from endoreward_fast.command import show
from endoreward_fast.command.evaluate.plots import FEWEST, POINTS, Kind, picture
from endoreward_fast.command.flags.options import ModelFlags
from endoreward_fast.command.run import pipeline
from endoreward_fast.view.heatmap import Card, Row, Token
from endoreward_fast.view.palette import DARK, LEVELS, terminal_256
from sight import BLINDNESS, lab, luminance

ROW = {"prompt": "What is the capital of France?", "completions": ["Paris", "Rome <script>x</script>"]}
PAIRS = [{"prompt": f"What is {n} + 1?", "chosen": str(n + 1), "rejected": "wrong " * n} for n in range(1, 8)]
SIGNS = range(-LEVELS, LEVELS + 1)
ASKED = ("--prompt", ROW["prompt"], "--completion", "Paris", "--completion", "Rome <script>x</script>")


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("FORCE_COLOR", "NO_COLOR", "COLORTERM", "TERM"):
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


def test_show_centres_colours_at_0(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    out = run("show", *ASKED, "-q").stdout
    assert re.search(r"\x1b\[4;38;2;[\d;]+;48;2;168;79;8m", out)  # the most negative: orange, underlined
    assert "48;2;29;102;173m" in out and "[+" not in out


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"COLORTERM": "", "TERM": "xterm"}])
def test_a_terminal_without_colours_gets_numbers(monkeypatch, environment):
    """Sixteen colours are too few, because white is unreadable on their yellow."""
    for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", **environment}.items():
        monkeypatch.setenv(name, value)
    out = run("show", *ASKED, "-q").stdout
    assert "[+" in out and "48;" not in out


def test_a_file_gets_no_colours(monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    run("show", *ASKED, "-q", "-o", tmp_path / "out.txt")
    assert "48;" not in (tmp_path / "out.txt").read_text() and "[+" in (tmp_path / "out.txt").read_text()


def test_one_scale_on_the_terminal_too():
    from rich.console import Console

    console = Console(force_terminal=True, color_system="truecolor", width=80)
    cards = [Card("a", 4.0, [Token("x", "", 4.0)]), Card("b", 2.0, [Token("y", "", 2.0)])]
    with console.capture() as capture:
        show.print_rows([Row("", "", cards)], console, "truecolor")
    out = capture.get()
    assert "≤ -4.00" in out and "≥ +4.00" in out and "1 token" in out and "1 tokens" not in out
    for text, level in (("x", LEVELS), ("y", round(LEVELS / 2))):
        channels = ";".join(str(int(DARK.background(level)[i : i + 2], 16)) for i in (1, 3, 5))
        assert f"48;2;{channels}m{text}" in out


def test_256_colours_are_steps_of_the_same_hues():
    """White text has a contrast of 4.5 on each step, brightness grows away from 0, and the two hues look different to
    colour-blind readers."""
    steps = {level: Color.parse(f"color({terminal_256(level)})").get_truecolor().hex for level in SIGNS}
    for level, colour in steps.items():
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5, level
        if level:
            assert (lab(colour, "none")[2] > 0) == (level < 0)  # yellow against blue
            for kind in BLINDNESS:
                assert math.dist(lab(colour, kind), lab(steps[-level], kind)) > 20, (level, kind)
        if abs(level) > 1:
            assert luminance(colour) >= luminance(steps[level - 1 if level > 0 else level + 1])
    assert len(set(steps.values())) == 7


def test_a_terminal_of_256_colours_gets_256_colours(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = run("show", *ASKED, "-q").stdout
    assert "48;5;130m" in out and "48;5;25m" in out and "48;2;" not in out and "[+" not in out


def test_every_token_reaches_the_terminal(monkeypatch):
    text = "| name" + " " * 150 + "| value |"
    for colours in ("truecolor", ""):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLORTERM", colours)
        out = run("show", "--prompt", "p", "--completion", text, "-q").stdout
        assert " " * 150 in re.sub(r"\x1b\[[\d;]*m|\[[+-][\d.]+\]", "", out)


def test_show_prints_the_flags_of_a_row(tmp_path):
    path = put(tmp_path, {"prompt": "p", "completions": ["", "one two three four five"]})
    target, flags = tmp_path / "out.html", ("--max-length", 9, "--truncate", "completion", "-q")
    run("show", path, *flags, "--html", target)
    for said in (run("show", path, *flags).stdout, target.read_text()):
        assert (
            "the completion is empty: only the token that ends it" in said
            and "tokens were cut to fit the limit" in said
        )


def test_show_and_plot_say_how_scores_were_computed(tmp_path):
    target, flags = tmp_path / "out.html", ("--reduction", "mean", "--gamma", "0.5", "--system", "Answer in words.")
    path = put(tmp_path, *PAIRS)
    title = "pocket: mean of token rewards, gamma 0.5, system prompt 'Answer in words.'"
    assert title in run("show", path, *flags, "-q").stdout
    run("show", path, *flags, "--html", target, "-q")
    assert f"<h1>{escape(title)}</h1>" in target.read_text()
    run("plot", path, *flags, "-o", tmp_path / "out.svg", "-q")
    assert "mean of token rewards, gamma 0.5" in (tmp_path / "out.svg").read_text()
    assert "[...] is the reward of the token before it" in run("show", *ASKED, "-q").stdout
    assert ModelFlags(alpha=2.0, floor=0.1, gamma=0.9).described() == (
        "pocket: sum of token rewards, alpha 2, gamma 0.9, floor 0.1"
    )


def test_a_row_without_completions_says_so(tmp_path):
    path = put(tmp_path, {"prompt": "p", "completions": []})
    assert "no completion  no score" in run("show", path, "-q").stdout


def test_the_terminal_gets_no_control_characters_of_the_completions(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
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
        (("x.jsonl", "--prompt", "a"), "use one of them"),
        ((*ASKED, "--html", "a.html", "-o", "b.txt"), "use one of them"),
        ((*ASKED, "--html", "no/such/folder/a.html"), "cannot write"),
        (("in.jsonl", "--html", "in.jsonl"), "is the input"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_a_model_is_loaded(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, ROW)
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: pytest.fail("loaded a model"))
    said = run("show", *args, code=2).stderr.splitlines()
    assert len(said) == 1 and message in said[0]


# --- plot


def test_few_completions_give_no_correlation_and_no_means(tmp_path):
    target = tmp_path / "out.svg"
    run("plot", put(tmp_path, *PAIRS[:2]), "-o", target)
    assert "correlation" not in target.read_text() and "chosen and rejected: fewer than 5 have" in target.read_text()
    few = [{"prompt": "p", "completion": text} for text in ("", "a", "b", "c")]
    run("plot", put(tmp_path, *few), "-o", target, "--overwrite")
    assert "completions: fewer than 5 have a token" in target.read_text()
    run("plot", put(tmp_path, *PAIRS), "-o", target, "--overwrite")
    assert "fewer than" not in target.read_text()


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
    assert "completions: fewer than 5 have a token" in target.read_text()
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


def test_means_by_position_agree_with_numpy():
    import numpy as np

    kind = Kind()
    table = np.random.default_rng(0).normal(3.0, 2.0, (40, 6))
    lengths = [1 + i % 6 for i in range(37)] + [9] * 3
    for row, length in zip(table, lengths, strict=True):
        kind.add(0.0, [*row, 0.0, 0.0, 0.0][:length])
    assert kind.lengths == lengths
    points = kind.by_position()
    assert len(points) == 6  # only three completions reach further, fewer than FEWEST
    for position, mean, error in points:
        here = [row[int(position) - 1] for row, n in zip(table, lengths, strict=True) if n >= position]
        assert len(here) >= FEWEST
        assert mean == pytest.approx(np.mean(here))
        assert error == pytest.approx(np.std(here, ddof=1) / len(here) ** 0.5)


def test_grouped_positions_are_the_mean_of_all_their_rewards():
    import numpy as np

    kind = Kind()
    table = np.random.default_rng(1).normal(-1.0, 2.0, (11, 7))
    for row in table:
        kind.add(0.0, row)
    kind.add(0.0, [5.0] * 7)
    table = np.vstack([table, np.full(7, 5.0)])
    points = kind.by_position(3)
    assert [p for p, _, _ in points] == [2, 5, 7]
    for (_, mean, error), columns in zip(points, (slice(0, 3), slice(3, 6), slice(6, 7)), strict=True):
        here = table[:, columns].ravel()
        assert mean == pytest.approx(here.mean()) and error == pytest.approx(here.std(ddof=1) / len(here) ** 0.5)


def drawn(monkeypatch, title, *rewards):
    """Return the axes of the picture of completions with these rewards."""
    import matplotlib.figure

    figures, kept = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), kept(self, *a, **k))
    )
    kind = Kind()
    for row in rewards:
        kind.add(sum(row), row)
    picture({"chosen": kind, "rejected": kind}, title, ".svg")
    return figures[0].axes


def test_a_picture_of_long_and_of_one_token_completions_is_readable(monkeypatch):
    axes = drawn(monkeypatch, "/models/a$^^$c: sum", *([-1.0] * 700 for _ in range(6)))
    [line] = [line for line in axes[2].lines if line.get_label() == "chosen (6)"]
    assert len(line.get_xdata()) <= POINTS and max(line.get_xdata()) <= 700
    assert "12 at a time" in axes[2].get_title(loc="left")
    axes = drawn(monkeypatch, "t", *([float(i)] for i in range(6)))
    [line] = [line for line in axes[2].lines if line.get_label() == "chosen (6)"]
    assert line.get_marker() == "o" and len(line.get_xdata()) == 1
    for ticks in (axes[0].get_yticks(), axes[1].get_xticks(), axes[2].get_xticks()):
        assert all(float(tick).is_integer() for tick in ticks)


def test_a_picture_draws_scores_lengths_and_positions(monkeypatch):
    rewards = [[1.0, 2.0 + i] + [3.0] * i for i in range(FEWEST + 1)]
    scores, lengths, positions = drawn(monkeypatch, "t", *rewards)
    totals = [sum(row) for row in rewards]
    outline = scores.patches[0].get_xy()
    for end in (outline[:, 0].min(), outline[:, 0].max()):
        assert (
            end in (totals[0], totals[-1]) and outline[outline[:, 0] == end, 1].max() == 1
        )  # one score in each end bin
    dots = lengths.collections[0].get_offsets().tolist()
    assert dots == [[len(row), total] for row, total in zip(rewards, totals, strict=True)]
    mean, other, zero = positions.lines
    assert (mean.get_linestyle(), other.get_linestyle()) == ("-", "--")
    assert mean.get_xdata().tolist() == [1, 2, 3]  # exactly FEWEST completions reach the third
    assert mean.get_ydata().tolist() == pytest.approx([1.0, 4.5, 3.0])
    assert list(zero.get_ydata()) == [0, 0]


def test_token_rewards_in_json_lines_keep_their_columns(tmp_path):
    row = json.loads(run("score", put(tmp_path, {"prompt": "p", "completion": "q"}), "--per-token").stdout)
    assert list(row["token_rewards"]) == ["ids", "texts", "rewards", "logprobs", "values"]
