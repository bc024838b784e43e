"""The page in a real browser: what it draws, how it reacts to keyboard and mouse; that it loads and runs nothing."""

import pytest

import browser
from endoreward_fast.view.heatmap import Card, Row, Token, fragment, page
from endoreward_fast.view.palette import DARK, LEVELS, LIGHT

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here (Debian: chromium)")

TEXTS = (
    "Paris",
    " is",
    " <script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">",
    "\n",
    "<|end|>",
)
REWARDS = (4.0, -2.0, -4.0, 0.0, 1.0)
TOKENS = [
    Token(text, f"#{i}", r, -0.5 - i, 2.0 + i, 0.25 * i) for i, (text, r) in enumerate(zip(TEXTS, REWARDS, strict=True))
]
ROWS = [
    Row("line 1", "Where? <b>&amp;", [Card("chosen", -1.0, TOKENS), Card("rejected", -7.5, TOKENS[1:3] * 40)]),
    Row("line 2", "Again", [Card("completion", None, (), "no <i>score</i>")]),
]
TIP = "(e => getComputedStyle(e, '::after'))(document.querySelectorAll('.t')[{}])"
SHOWN = f"{TIP}.content != 'none' && {TIP}.display"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "out.html"
    path.write_text(page(ROWS, "Token rewards"), encoding="utf-8")
    return path


def shown(tab, i):
    return tab.run(SHOWN.format(i, i)) == "block"


def test_text_is_displayed_verbatim_and_nothing_is_loaded_or_run(tab, drawn):
    tab.open(drawn)
    assert tab.requests == [drawn.as_uri()]
    assert tab.console == []
    assert tab.run("document.title") == "Token rewards"
    text = tab.run("document.querySelector('.tokens').textContent")
    assert text.replace("↵", "") == "".join(TEXTS)
    assert tab.run("document.querySelectorAll('img, .tokens script, .prompt b').length") == 0
    assert tab.run("document.querySelector('.prompt').textContent") == "Where? <b>&amp;"
    assert tab.run("document.querySelector('.note').textContent") == "no <i>score</i>"


def test_an_injected_script_does_not_run(tab, drawn, tmp_path):
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(drawn.read_text().replace("</body>", "<script>document.title = 'run'</script></body>"))
    tab.open(spoiled)
    assert tab.run("document.title") == "Token rewards"


def test_an_injected_image_is_not_fetched(tab, drawn, tmp_path):
    spoiled = tmp_path / "fetching.html"
    spoiled.write_text(drawn.read_text().replace("</body>", f"<img src='{drawn.as_uri()}?stolen'></body>"))
    tab.open(spoiled)
    assert any("Content Security Policy" in said and "stolen" in said for said in tab.console), tab.console


def rgb(colour):
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_follow_reward_and_theme(tab, drawn, dark):
    tab.open(drawn, dark=dark)
    theme = DARK if dark else LIGHT
    for i, level in enumerate((LEVELS, -round(LEVELS / 2), -LEVELS, 0)):
        style = f"getComputedStyle(document.querySelectorAll('.t')[{i}])"
        assert tab.run(f"{style}.backgroundColor") == rgb(theme.background(level)), i
        assert tab.run(f"{style}.color") == rgb(theme.ink)
        assert (tab.run(f"{style}.boxShadow") != "none") == (level < 0), i


def test_a_notebooks_theme_takes_precedence_over_the_systems(tab, tmp_path):
    path = tmp_path / "notebook.html"
    path.write_text(f'<meta charset="utf-8"><body data-jp-theme-light="false">{fragment(ROWS)}', encoding="utf-8")
    tab.open(path)
    assert tab.run("getComputedStyle(document.querySelector('.t')).backgroundColor") == rgb(DARK.background(LEVELS))

    light = tmp_path / "light.html"
    light.write_text(f'<meta charset="utf-8"><body data-jp-theme-light="true">{fragment(ROWS)}', encoding="utf-8")
    tab.open(light, dark=True)
    assert tab.run("getComputedStyle(document.querySelector('.t')).backgroundColor") == rgb(LIGHT.background(LEVELS))


def test_a_notebook_has_room_for_the_last_tooltip(tab, tmp_path):
    path = tmp_path / "cell.html"
    cell = f'<div id="cell" style="overflow: auto">{fragment(ROWS[:1])}</div>'
    path.write_text(f'<!DOCTYPE html><meta charset="utf-8">{cell}', encoding="utf-8")
    tab.open(path, width=500)
    tab.run("document.querySelector('article:last-child .t:last-child').focus()")
    assert tab.run("(cell => cell.scrollHeight <= cell.clientHeight)(document.getElementById('cell'))")


def test_printing_keeps_the_colours_of_the_light_theme(tab, drawn):
    tab.open(drawn, dark=True)
    tab.theme(True, "print")
    style = "getComputedStyle(document.querySelector('.t'))"
    assert tab.run(f"[{style}.backgroundColor, {style}.color, {style}.printColorAdjust]") == [
        rgb(LIGHT.background(LEVELS)),
        rgb(LIGHT.ink),
        "exact",
    ]


def test_tab_reaches_every_token_and_shows_its_numbers(tab, drawn):
    tab.open(drawn)
    assert not shown(tab, 0)
    for i in range(len(TOKENS)):
        tab.press("Tab")
        assert tab.run(f"document.activeElement === document.querySelectorAll('.t')[{i}]")
        assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert shown(tab, i) and (i == 0 or not shown(tab, i - 1))
    name = tab.run("document.querySelectorAll('.t')[1].getAttribute('aria-label')")
    assert [line.split() for line in name.splitlines()[1:]] == [
        ["reward", "-2.0000"],
        ["log-prob", "-1.5000"],
        ["value", "+3.0000"],
        ["entropy", "+0.2500"],
    ]
    assert "attr(" not in tab.run(f"{TIP.format(4)}.content") and "+1.0000" in tab.run(f"{TIP.format(4)}.content")


def span_of_tip(tab, i):
    """Return (top of the i-th token's tooltip, its bottom, height of the window)."""
    top = f"""(tip => {{
      const box = document.querySelectorAll('.t')[{i}].getBoundingClientRect();
      return [box.bottom + parseFloat(tip.marginTop) + new DOMMatrix(tip.transform).m42, parseFloat(tip.height)];
    }})({TIP.format(i)})"""
    start, height = tab.run(top)
    return start, start + height, tab.run("innerHeight")


def test_a_tooltip_stays_in_the_window_and_off_its_token(tab, drawn):
    for height in (360, 460, 560):
        tab.open(drawn, height=height)
        for i in (0, 20, len(TOKENS) + 79):  # the last token: the page cannot scroll further down
            tab.run(f"document.querySelectorAll('.t')[{i}].focus()")
            start, end, room = span_of_tip(tab, i)
            box = tab.run(f"document.querySelectorAll('.t')[{i}].getClientRects()[0].toJSON()")
            assert start >= 0 and end <= room, (height, i)
            assert end <= box["top"] + 8 or start >= box["bottom"] - 8, (height, i)
        tab.open(drawn, height=height)
        tab.run("scrollTo(0, 0)")
        near = "[...document.querySelectorAll('.t')].findLastIndex(t => t.getBoundingClientRect().bottom < innerHeight)"
        i = tab.run(near)
        box = tab.run(f"document.querySelectorAll('.t')[{i}].getClientRects()[0].toJSON()")
        tab.point(box["left"] + 2, box["top"] + 6)
        start, end, room = span_of_tip(tab, i)
        assert shown(tab, i) and start >= 0 and end <= room, (height, i)
        tab.point(1, 1)


def test_a_run_of_spaces_stays_in_its_card(tab, tmp_path):
    path = tmp_path / "table.html"
    tokens = [Token(text, "", -1.0) for text in ("| name", *[" " * 16] * 9, " | value |")]
    path.write_text(page([Row("", "", [Card("a", 1.0, tokens), Card("b", 1.0, tokens)])], "t"), encoding="utf-8")
    tab.open(path, width=700)
    out = "t => [...t.getClientRects()].some(r => r.right > t.closest('article').getBoundingClientRect().right)"
    assert tab.run(f"[...document.querySelectorAll('.t')].filter({out}).length") == 0


def test_arrow_keys_move_the_focus_and_escape_hides_the_tooltip(tab, drawn):
    tab.open(drawn)
    for key, at in (("Tab", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        tab.press(key)
        assert tab.run(f"document.activeElement === document.querySelectorAll('.t')[{at}]"), key
    assert shown(tab, 1)
    tab.press("Escape")
    assert not shown(tab, 1)
    tab.press("ArrowRight")
    assert shown(tab, 2)


def test_keys_move_between_completions(tab, drawn):
    tab.open(drawn)
    tab.press("Tab")
    last, second = len(TOKENS) - 1, len(TOKENS)
    for key, at in (("End", last), ("ArrowDown", second), ("End", second + 79), ("ArrowDown", second + 79),
                    ("Home", second), ("ArrowUp", 0)):  # fmt: skip
        tab.press(key)
        assert tab.run(f"document.activeElement === document.querySelectorAll('.t')[{at}]"), key


def test_arrow_keys_follow_the_writing_direction(tab, tmp_path):
    path = tmp_path / "hebrew.html"
    tokens = [Token(text, "#7", 1.0) for text in ("\u05e9\u05dc", "\u05d5\u05dd", "")]
    path.write_text(page([Row("", "", [Card("", 1.0, tokens)])], "t"), encoding="utf-8")
    tab.open(path)
    lefts = tab.run("[...document.querySelectorAll('.t')].map(t => t.getBoundingClientRect().left)")
    assert lefts == sorted(lefts, reverse=True)
    for key, at in (("Tab", 0), ("ArrowLeft", 1), ("ArrowLeft", 2), ("ArrowRight", 1)):
        tab.press(key)
        assert tab.run(f"document.activeElement === document.querySelectorAll('.t')[{at}]"), key
    assert tab.run(f"{TIP.format(1)}.direction") == "ltr"
    assert tab.run("getComputedStyle(document.querySelector('small')).direction") == "ltr"


def test_the_scale_fits_a_narrow_page(tab, tmp_path):
    path = tmp_path / "huge.html"
    path.write_text(page([Row("", "", [Card("", -12345.0, [Token("a", "", -12345.0)])])], "t"), encoding="utf-8")
    tab.open(path, width=320)
    assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    low, high = tab.run("[...document.querySelectorAll('.legend i')].map(i => i.getBoundingClientRect().top)")[
        :: LEVELS * 2
    ]
    assert low == high


def test_hovering_hides_the_tooltip_of_the_focus(tab, drawn):
    tab.open(drawn)
    tab.press("Tab")
    x, y = tab.run(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelectorAll('.t')[1].getBoundingClientRect())"
    )
    tab.point(x, y)
    assert shown(tab, 1) and not shown(tab, 0)
    tab.point(1, 1)
    assert not shown(tab, 1)


def test_completions_are_side_by_side_and_stacked_on_a_narrow_page(tab, drawn):
    tops = "[...document.querySelectorAll('section:first-of-type article')].map(a => a.getBoundingClientRect().top)"
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    tab.open(drawn)
    first, second = tab.run(tops)
    assert first == second and tab.run(wide)
    assert tab.run("document.querySelector('.best .score').textContent") == "-1.00"
    tab.open(drawn, width=380)
    first, second = tab.run(tops)
    assert first < second
    for i in range(60):  # no tooltip overflows the page or is squeezed at its edge
        tab.run(f"document.querySelectorAll('.t')[{i}].focus()")
        assert tab.run(wide), i
        assert tab.run(f"parseFloat({TIP.format(i)}.width)") > 140, i


def test_a_screenshot_shows_the_colours(tab, drawn, tmp_path):
    import matplotlib.image

    tab.open(drawn)
    tab.picture(tmp_path / "page.png")
    pixels = (matplotlib.image.imread(tmp_path / "page.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for level in (LEVELS, -LEVELS):
        colour = [int(LIGHT.background(level)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - colour).max(1) <= 1).sum() > 200, level
