"""The heatmap's colours and HTML, without a browser, and the heatmaps that notebooks show."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from endoreward_fast import EndoRewardModel
from endoreward_fast.scoring.results import TokenTable
from endoreward_fast.types import TokenRewards
from endoreward_fast.view.heatmap import Card, Row, Token, best_of, fragment, limit_of_rows, page, visible
from endoreward_fast.view.notebook import tokens_of
from endoreward_fast.view.palette import DARK, LEVELS, LIGHT, level_of, limit_of
from sight import BLINDNESS, lab, luminance

SIGNS = range(1, LEVELS + 1)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_legible_on_every_level(theme):
    for level in range(-LEVELS, LEVELS + 1):
        dim, bright = sorted(luminance(c) + 0.05 for c in (theme.ink, theme.background(level)))
        assert bright / dim >= 4.5, level


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_underline_of_negative_rewards_is_visible_on_every_level(theme):
    for level in SIGNS:
        dim, bright = sorted(luminance(c) + 0.05 for c in (theme.line, theme.background(-level)))
        assert bright / dim >= 3, level


@pytest.mark.parametrize(("theme", "kind"), list(product([LIGHT, DARK], BLINDNESS)))
def test_colours_above_and_below_0_differ_under_every_colour_blindness(theme, kind):
    """CIE76 differences: 2.3 is just noticeable."""
    for level in SIGNS:
        assert math.dist(lab(theme.background(level), kind), lab(theme.background(-level), kind)) > 2.3 * level


def test_levels_are_centred_at_0_and_symmetrical():
    assert level_of(0.0, 4.0) == 0
    for reward in (1e-6, 0.4, 2.0, 4.0, 40.0, math.inf):
        assert level_of(reward, 4.0) == -level_of(-reward, 4.0) > 0
    assert [level_of(r, 4.0) for r in (1e-6, 2.0, 4.0, 40.0)] == [1, round(LEVELS / 2), LEVELS, LEVELS]
    assert level_of(math.nan, 4.0) is None


def test_one_outlier_does_not_set_the_scale():
    assert limit_of([1.0] * 99 + [1000.0]) == 1.0
    assert limit_of([-1.0, 1.0, -1.0, 1.0, -60.0]) == 3.0  # of five values, every quantile above 0.8 is the largest
    assert limit_of([-3.0, 1.0]) == 3.0
    assert limit_of([0.0] * 99 + [7.0]) == 7.0
    for nothing in ([], [0.0], [math.nan, math.inf]):
        assert limit_of(nothing) == 1.0


def test_last_tokens_do_not_set_the_scale_and_the_legend_says_so():
    """Nothing is subtracted after the last token: its reward is +17, where the others lie within 3."""
    tokens = [Token("a", "", 1.5), Token("b", "", -3.0), Token("<|end|>", "", 17.0, terminal=True)]
    card = [Row("", "", [Card("", 1.0, tokens)])]
    assert limit_of_rows(card) == 3.0
    html = fragment(card)
    assert "clipped, rewards range from -3.00 to +17.00" in html and "≥ +3.00" in html
    assert html.count("after the last token&#10;nothing is subtracted") == 1
    assert "clipped" not in fragment([Row("", "", [Card("", 1.0, tokens[:2])])])
    assert limit_of_rows([Row("", "", [Card("", 17.0, tokens[2:])])]) == 17.0


def rows(*texts, label="completion"):
    tokens = [Token(text, "#7", reward, -0.5, 2.0, 0.25) for text, reward in zip(texts, (1.5, -3.0, 0.0), strict=False)]
    return [Row("line 1", "a & b", [Card(label, -1.5, tokens)])]


HOSTILE = "</span><script>alert(1)</script>\"'&"


def test_every_text_is_escaped():
    texts = Row(
        HOSTILE, HOSTILE, [Card(HOSTILE, 1.0, [Token(HOSTILE, HOSTILE, 1.0), Token("", HOSTILE, 1.0)], HOSTILE)]
    )
    html = page([texts], HOSTILE)
    assert html.count("<script>") == 1  # its own
    assert "alert(1)</script>" not in html
    assert html.count("&lt;script&gt;") >= 9


def test_invisible_characters_are_escaped():
    assert visible("\x1b[31m\x00\u202e\ud800\x7f\r") == "\\x1b[31m\\x00\\u202e\\ud800\\x7f\\x0d"
    for kept in ("a b\n\tc", "é 中文", "\N{ROCKET}", "\U0001f468\u200d\U0001f469"):
        assert visible(kept) == kept
    page(rows("\ud800"), "\udc00").encode("utf-8")


def test_numbers_that_are_not_finite_are_shown():
    html = fragment([Row("", "", [Card("x", None, [Token("a", "", math.nan), Token("b", "", -math.inf)])])])
    assert "no score" in html and 'class="t nan"' in html and f'class="t n{LEVELS}"' in html
    assert "nan" in html and "-inf" in html


def test_one_scale_for_all_rows_and_one_best_among_several():
    assert limit_of_rows(rows("a") + rows("a", "b")) == 3.0
    cards = [Card("", score) for score in (None, 1.0, 3.0, 3.0)]
    assert best_of(cards) == 2  # the first of a tie
    assert best_of(cards[:2]) is best_of([]) is None


def test_the_best_card_is_marked_and_so_are_line_breaks_and_tabs():
    cards = [Card("first", 1.0), Card("second", 3.0, [Token("a\n\tb", "", 1.0)])]
    html = fragment([Row("", "", cards)])
    assert html.count("class=best") == html.count('class="badge"') == 1
    assert html.index('label">first<') < html.index("class=best") < html.index('label">second<')
    assert "1 token<" in html and "0 tokens<" in html
    assert html.count(">↵</s>\n") == html.count(">⇥</s>\t") == 1


def test_a_page_has_no_external_references():
    html = page(rows("a"), "t")
    for reference in ("http:", "https:", "//", "url(", "src=", "href=", "@import"):
        assert reference not in html, reference


# --- notebooks


def test_the_heatmap_of_one_row_shows_its_scored_tokens():
    reward = torch.tensor([[0.0, 1.5, 0.0, -2.5]], requires_grad=True)
    value = torch.tensor([[0.0, 3.0, 0.0, 4.0]])
    html = TokenRewards(reward, -value, value, None)._repr_html_()
    assert html.count('tabindex="0"') == 2
    assert "@1" in html and "@3" in html and "@2" not in html and "entropy" not in html
    assert "+1.5000" in html and "-2.5000" in html and "-1.00</span>" in html
    assert TokenRewards(reward[0], -value[0], value[0], value[0])._repr_html_().count("entropy") == 2


def test_a_token_of_reward_0_is_shown_and_each_number_is_named():
    fields = (torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, -3.0, -0.5]]), torch.tensor([[0.0, 3.0, 2.0]]))
    html = TokenRewards(*fields, torch.tensor([[0.0, 0.25, 0.75]]))._repr_html_()
    tips = [tip.split('"')[0].split("&#10;") for tip in html.split('role="group" aria-label="')[1:]]
    assert [[line.split()[-1] for line in tip] for tip in tips] == [
        ["@1", "+0.0000", "-3.0000", "+3.0000", "+0.2500"],
        ["@2", "+1.0000", "-0.5000", "+2.0000", "+0.7500"],
    ]
    assert [line.split()[0] for line in tips[0][1:]] == ["reward", "log-prob", "value", "entropy"]


def test_several_rows_have_no_heatmap():
    several = torch.zeros(2, 3)
    assert TokenRewards(several, several, several, None)._repr_html_() is None


def test_scores_per_token_are_heatmaps_with_texts_or_ids():
    scorer = EndoRewardModel.from_pretrained("pocket")
    sample = [{"prompt": "What is 2 + 3?", "completion": "5 <b>"}]
    result = scorer.score(sample, per_token=True, entropy=True)[0]
    html = result._repr_html_()
    assert "&lt;" in html
    assert html.count('tabindex="0"') == result.num_tokens == html.count("entropy")
    assert f"{result.score:+.2f}" in html
    assert "<b>" not in result.tokens._repr_html_().split("</i></b>")[1]
    plain = scorer.score(sample, per_token=True, texts=False)[0].tokens
    assert plain.entropies is None
    assert all(f'<small dir="ltr"> #{token} </small>' in plain._repr_html_() for token in plain.ids)
    assert scorer.score(sample)[0]._repr_html_() is None


def test_entropies_match_the_forward_pass():
    scorer = EndoRewardModel.from_pretrained("pocket")
    ids = scorer.tokenizer("Paris is the capital.", return_tensors="pt").input_ids
    row = {"prompt_ids": ids[0, :1].tolist(), "completion_ids": ids[0, 1:].tolist()}
    with torch.no_grad():
        expected = scorer(ids, entropy=True).entropy[0, 1:].tolist()
    for options in ({}, {"signals": "entropy"}):
        table = scorer.score([row], per_token=True, entropy=True, **options)[0].tokens
        assert table.entropies == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("completion", ["Paris", "12 + 3 = 15", "a"])
def test_the_last_token_is_marked_if_the_episode_ends_there(alpha, completion):
    scorer = EndoRewardModel.from_pretrained("pocket")
    ids = [scorer.tokenizer(text)["input_ids"] for text in ("What?", completion)]
    for ends in (True, False):
        row = {"prompt_ids": ids[0], "completion_ids": ids[1], "terminal": ends}
        [result] = scorer.score([row], per_token=True, alpha=alpha)
        if len(ids[1]) > 1 or alpha == 1:
            assert [t.terminal for t in tokens_of(result.tokens)] == [*[False] * (result.num_tokens - 1), ends]


def test_tokens_that_spell_one_character_are_merged():
    texts = ("a", "", "", "\N{ROCKET}", "b", "", "c", "", "", "", "", "é")
    n = len(texts)
    numbers = tuple(float(i) for i in range(n))
    table = TokenTable(tuple(range(n)), texts, numbers, tuple(-x for x in numbers), numbers, numbers)
    found = tokens_of(table)
    assert [t.text for t in found] == ["a", "\N{ROCKET}", "b", "", "c", "", "", "", "", "é"]
    rocket = found[1]
    assert (rocket.name, rocket.count, rocket.reward, rocket.logprob, rocket.value, rocket.entropy) == (
        *("#1 #2 #3", 3, 6.0, -6.0),
        *(1.0, 6.0),
    )
    assert "3 tokens, summed" in rocket.lines() and f"{n} tokens" in fragment([Row("", "", [Card("", 1.0, found)])])
    assert len(tokens_of(replace(table, texts=("",) * n))) == n


@pytest.mark.parametrize(
    ("texts", "merged"),
    [
        (("Hi", "", " \N{GRINNING FACE}", "!"), (1, 2, 1)),  # a space belongs to the emoji's first token
        (("(", "", "", " \N{CHECK MARK} ok"), (1, 3)),
        (("", "", "", "", "", "\N{ROCKET}\N{ROCKET}"), (6,)),  # a token ends one emoji and begins the next
        (("", "", "", "", "", "\N{ROCKET}"), (1,) * 6),  # six tokens are more than its bytes
        (("", " ", "ok"), (1, 1, 1)),
        (("", "", "\N{REPLACEMENT CHARACTER}"), (3,)),  # cut off inside a character
    ],
)
def test_tokens_without_text_belong_to_the_character_that_they_begin(texts, merged):
    ones = (1.0,) * len(texts)
    found = tokens_of(TokenTable(tuple(range(len(texts))), texts, ones, ones, ones))
    assert tuple(token.count for token in found) == merged


def test_an_emoji_is_one_token_of_the_heatmap():
    scorer = EndoRewardModel.from_pretrained("pocket")
    [result] = scorer.score([{"prompt": "Hi", "completion": "go \N{ROCKET} é"}], per_token=True)
    found = tokens_of(result.tokens)
    assert "\N{ROCKET}" in [t.text for t in found] and all(t.text for t in found)
    assert sum(t.count for t in found) == result.num_tokens > len(found)
    assert sum(t.reward for t in found) == pytest.approx(result.score, abs=1e-4)
