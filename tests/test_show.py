"""`endoreward show`: what the page says, what a real browser makes of it, the terminal, a notebook."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.image
import pytest
import torch

from cli_harness import put, run
from endoreward_fast import EndoRewardModel, TokenRewards
from endoreward_fast.heatmap import Shown, fragment, scale_of, strength, to_html, to_rich
from endoreward_fast.scoring import TokenTable

PROMPT = "What is the capital of France?"
EVIL = "<script>document.title='run'</script> & \"<b>\" 'x'"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")


class Tokens(HTMLParser):
    """The text of every token, what its attributes say, and every tag there is."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.tokens, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "span" and "tabindex" in dict(attrs)
        if self.inside:
            self.tokens.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1][1] += data


def shown(*rewards, texts=None):
    n = len(rewards)
    texts = texts or tuple(f"t{i}" for i in range(n))
    return Shown(
        "asked", sum(rewards), TokenTable(tuple(range(n)), tuple(texts), rewards, (-1.0,) * n, (2.0,) * n, (0.5,) * n)
    )


def test_the_page_shows_each_token_with_its_numbers(tmp_path):
    page = tmp_path / "out.html"
    run("show", "--prompt", PROMPT, "--completion", "Paris", "--completion", EVIL, "--html", page, "-q")
    found = Tokens(page.read_text())
    rows = [{"prompt": PROMPT, "completion": c} for c in ("Paris", EVIL)]
    results = EndoRewardModel.from_pretrained("pocket").score(rows, per_token=True)
    tables = [r.tokens for r in results]
    assert "".join(text for _, text in found.tokens) == "".join(t for table in tables for t in table.texts)
    numbers = [
        n for table in tables for n in zip(table.rewards, table.logprobs, table.values, table.entropies, strict=True)
    ]
    for (attributes, _), (reward, logprob, value, entropy) in zip(found.tokens, numbers, strict=True):
        facts = f"reward {reward:+.3f} · log-probability {logprob:.3f} · value {value:.3f} · entropy {entropy:.3f}"
        assert attributes["data-tip"] == facts and attributes["aria-label"].endswith(facts)
        assert attributes["tabindex"] == "0" and ("pos" in attributes["class"]) == (reward >= 0)
    assert "script" not in found.tags and "b" in found.tags and found.tags.count("article") == 2
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page.read_text())
    assert all(f"{r.score:.2f}" in page.read_text() for r in results)


def test_colours_are_centred_at_0_and_comparable():
    pair = [shown(1.0, -2.0), shown(4.0)]
    assert scale_of(pair) == 4.0 and scale_of([shown()]) == 1.0
    assert [strength(r, 4.0) for r in (-8.0, -2.0, 0.0, 4.0)] == [-1.0, -0.5, 0.0, 1.0]
    strengths = re.findall(r"t (pos|neg)\" tabindex=\"0\" style=\"--s:(\d+)%", to_html(pair))
    assert strengths == [("pos", "19"), ("neg", "38"), ("pos", "75")]
    styles = [str(span.style) for span in to_rich(shown(4.0, -4.0, 0.0), 4.0).spans]
    assert styles == ["white on #2166ac", "white on #b35806", "white on #1e1e1e"]


def test_what_has_no_width_is_made_visible():
    found = Tokens(to_html([shown(1.0, 1.0, 1.0, texts=("a\nb", "\t", ""))]))
    assert [text for _, text in found.tokens] == ["a⏎\nb", "⇥\t", "[2]"]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_real_browser(dark, tmp_path):
    """No script runs, the text is all there, and the colours are those of the scheme that is asked for."""
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(to_html([shown(5.0, 5.0, texts=("M" * 12, EVIL)), shown(-5.0, texts=("W" * 30,))]))
    scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=900,500",
        f"--user-data-dir={tmp_path}/u",
    ]
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert "<title>Endogenous rewards</title>" in dom.stdout
    assert [text for _, text in Tokens(dom.stdout).tokens] == ["M" * 12, EVIL, "W" * 30]
    subprocess.run(
        [*command, *scheme, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=60, check=True
    )
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).reshape(-1, 3)
    red, green, blue = pixels.T
    assert ((blue - red > 60) & (blue > green)).sum() > 500  # a blue token
    assert ((red - blue > 60) & (red > green)).sum() > 500  # and an orange one
    assert (pixels.mean(1) < 60).mean() > 0.5 if dark else (pixels.mean(1) > 200).mean() > 0.5


def test_the_terminal_shows_titles_scores_and_text(tmp_path):
    rows = [{"prompt": PROMPT, "completion": "Paris"}, {"prompt": "x"}, {"prompt": "y", "completions": ["a", "b"]}]
    result = run("show", put(tmp_path, *rows), "-q", code=2)
    assert result.stdout.count(PROMPT) == 1 and " Paris" in result.stdout and result.stdout.count("  y\n") == 2
    assert "line 2: " in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "what to show: FILE, or --prompt with --completion"),
        (["--prompt", "a"], "--prompt and --completion go together"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["nowhere.jsonl", "--prompt", "a", "--completion", "b"], "what to show"),
        (["--prompt", "a", "--completion", "b", "--limit", "0"], "--limit must be 1 or more"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, said):
    result = run("show", *arguments, code=2)
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_notebooks_show_one_row_as_a_heatmap():
    row = torch.tensor([[0.0, 1.5, -2.0]])
    rewards = TokenRewards(row, -row.abs(), row + 1, None)
    found = Tokens(rewards._repr_html_())
    assert [text for _, text in found.tokens] == ["0 ", "1 ", "2 "]  # a value of 1 tells the first from what is masked
    masked = TokenRewards(row, -row.abs(), row, row.abs())
    assert [text for _, text in Tokens(masked._repr_html_()).tokens] == ["1 ", "2 "]
    assert "entropy 2.000" in masked._repr_html_() and "entropy" not in rewards._repr_html_()
    assert TokenRewards(*(torch.zeros(2, 3),) * 3, None)._repr_html_() is None
    [result] = EndoRewardModel.from_pretrained("pocket").score([{"prompt": PROMPT, "completion": EVIL}], per_token=True)
    assert "<script" not in result._repr_html_() and result._repr_html_() == fragment(
        Shown("score", result.score, result.tokens)
    )
