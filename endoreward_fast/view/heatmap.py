"""Token rewards as HTML: a page that loads nothing from the network (`page`), or a fragment for notebooks (`fragment`).

The input is plain numbers; nothing here imports torch. All text from a model or a file passes through `visible` and
html.escape. A token's tooltip is its aria-label, which CSS shows on hover and on focus. The page's script places the
tooltip below the token, or above it near the bottom of the window, and moves the focus with the arrow keys. Every
number can be read without the script.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .palette import DARK, LEVELS, LIGHT, level_of, limit_of

# Not escaped by `visible`. The zero-width joiners are invisible, but emoji and several scripts are built with them.
KEPT = "\n\t\u00a0\u3000\u200c\u200d"


@dataclass(frozen=True)
class Token:
    """One scored token, or several tokens that spell one character together."""

    text: str
    """the text of the token; if empty, `name` is shown between spaces"""
    name: str
    """id or position of the token"""
    reward: float
    logprob: float | None = None
    value: float | None = None
    entropy: float | None = None
    count: int = 1
    """number of tokens merged into this one"""
    terminal: bool = False
    """whether the episode ends after it: V(s') = 0"""

    def lines(self) -> str:
        """Return the tooltip, with one line for each number that is not None."""
        numbers = ("reward", self.reward), ("log-prob", self.logprob), ("value", self.value), ("entropy", self.entropy)
        known = [f"{name:<9}{number(value, 4):>10}" for name, value in numbers if value is not None]
        together = [f"{self.count} tokens, summed"] if self.count > 1 else []
        last = ["after the last token", "nothing is subtracted"] if self.terminal else []
        return "\n".join((f"{quoted(self.text)} {self.name}".strip(), *known, *together, *last))


@dataclass(frozen=True)
class Card:
    """One completion."""

    label: str
    score: float | None
    tokens: Sequence[Token] = ()
    note: str | None = None
    """why it has no score, or another remark"""


@dataclass(frozen=True)
class Row:
    """Completions of one prompt."""

    title: str
    prompt: str
    cards: Sequence[Card]


def limit_of_rows(rows: Iterable[Row]) -> float:
    """Return one colour scale for all of `rows`, so that their colours can be compared.

    Terminal tokens are left out unless all are terminal: V(s') is not subtracted from their rewards, which are so much
    larger that all other tokens would look pale.
    """
    tokens = _tokens(rows)
    return limit_of(token.reward for token in [t for t in tokens if not t.terminal] or tokens)


def clipped(rows: Iterable[Row], limit: float) -> str | None:
    """Describe the range of the rewards if some lie beyond the scale; else return None."""
    rewards = [token.reward for token in _tokens(rows) if math.isfinite(token.reward)]
    if not any(abs(reward) > limit for reward in rewards):
        return None
    return f"colours are clipped, rewards range from {number(min(rewards))} to {number(max(rewards))}"


def _tokens(rows: Iterable[Row]) -> list[Token]:
    return [token for row in rows for card in row.cards for token in card.tokens]


def best_of(cards: Sequence[Card]) -> int | None:
    """Return the index of the highest score, the first one if several tie; None if fewer than two have a score."""
    scored = [(card.score, -i) for i, card in enumerate(cards) if card.score is not None]
    return -max(scored)[1] if len(scored) > 1 else None


def number(value: float, digits: int = 2) -> str:
    """Format `value` with its sign, so that colour is not the only mark of the sign."""
    return f"{value:+.{digits}f}" if math.isfinite(value) else f"{value:+}"


def visible(text: str) -> str:
    """Escape the characters of `text` that are invisible or change how the rest is displayed.

    These are control characters, marks that reverse the writing direction, and lone surrogates. Line breaks, tabs and
    spaces stay.
    """
    return "".join(c if c.isprintable() or c in KEPT else _code(c) for c in text)


def quoted(text: str) -> str:
    """Return `text` on one line between quotes; "" for ""."""
    shown = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    return f"“{shown}”" if text else ""


def _code(char: str) -> str:
    point = ord(char)
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def page(rows: Sequence[Row], title: str) -> str:
    """Return a whole HTML document. Its Content-Security-Policy forbids all loading and all scripts but its own."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(visible(title))}</title>\n<style>\n:root {{ color-scheme: light dark }}\n"
        f"body {{ margin: 0; background: light-dark(#f4f5f7, #0d0f13) }}\n</style>\n</head>\n<body>\n"
        f"{fragment(rows, title)}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def fragment(rows: Sequence[Row], title: str | None = None) -> str:
    """Return the heatmap as one <div> without the script, for `_repr_html_`."""
    limit = limit_of_rows(rows)
    heading = f"<h1>{escape(visible(title))}</h1>\n" if title else ""
    body = "\n".join(_row(row, limit) for row in rows)
    # Notebooks clip a cell's output at its border, so the last line's tooltip needs padding below it.
    kind = "endoreward" if title else "endoreward alone"
    legend = _legend(limit, clipped(rows, limit))
    return f'<div class="{kind}">\n<style>\n{_style()}</style>\n{heading}{legend}\n{body}\n</div>'


def counted(tokens: Sequence[Token]) -> str:
    """Return the number of tokens with its unit, such as "3 tokens"."""
    count = sum(token.count for token in tokens)
    return f"{count} token{'' if count == 1 else 's'}"


def _legend(limit: float, note: str | None) -> str:
    steps = "".join(f'<i class="{_class(level)}"></i>' for level in range(-LEVELS, LEVELS + 1))
    name = f"Reward of a token, from {number(-limit)} and less (orange, underlined) to {number(limit)} and more (blue)"
    return (
        f'<div class="legend" role="img" aria-label="{name}"><div>≤ {number(-limit)}<b>{steps}</b>'
        f"≥ {number(limit)}</div><span>reward of a token; underlined below 0{f'; {note}' if note else ''}</span></div>"
    )


def _row(row: Row, limit: float) -> str:
    best = best_of(row.cards)
    head = f"<h2>{escape(visible(row.title))}</h2>" if row.title else ""
    prompt = f'<div class="prompt" dir="auto">{escape(visible(row.prompt))}</div>' if row.prompt else ""
    cards = "\n".join(_card(card, limit, i == best) for i, card in enumerate(row.cards))
    return f'<section>{head}{prompt}\n<div class="cards">\n{cards}\n</div></section>'


def _card(card: Card, limit: float, best: bool) -> str:
    score = "no score" if card.score is None else number(card.score)
    badge = '<b class="badge">best</b>' if best else ""
    head = (
        f'<header><span class="label">{escape(visible(card.label))}</span>{badge}'
        f'<span class="score">{score}</span><span class="count">{counted(card.tokens)}</span></header>'
    )
    note = f'<p class="note">{escape(visible(card.note))}</p>' if card.note else ""
    tokens = "".join(_token(token, limit) for token in card.tokens)
    return (
        f'<article{" class=best" if best else ""}>{head}{note}<div class="tokens" dir="auto">{tokens}</div></article>'
    )


def _token(token: Token, limit: float) -> str:
    shown = escape(visible(token.text)) or f'<small dir="ltr"> {escape(visible(token.name))} </small>'
    shown = shown.replace("\n", '<s aria-hidden="true">↵</s>\n').replace("\t", '<s aria-hidden="true">⇥</s>\t')
    tip = escape(token.lines()).replace("\n", "&#10;")
    level = _class(level_of(token.reward, limit))
    return f'<span class="t {level}" tabindex="0" role="group" aria-label="{tip}">{shown}</span>'


def _class(level: int | None) -> str:
    if level is None:
        return "nan"
    return f"{'p' if level > 0 else 'n' if level < 0 else 'z'}{abs(level) or ''}"


def _style() -> str:
    """Return the stylesheet with the colours of both themes. A notebook's theme takes precedence over the system's."""
    levels = range(-LEVELS, LEVELS + 1)
    colours = [(f".{_class(n)}", "background", LIGHT.background(n), DARK.background(n)) for n in levels]
    colours += [("", "--ink", LIGHT.ink, DARK.ink), ("", "--paper", LIGHT.zero, DARK.zero)]
    colours += [("", "--below", LIGHT.line, DARK.line)]
    return STYLE + "".join(f".endoreward {of} {{ {what}: light-dark({a}, {b}) }}\n" for of, what, a, b in colours)


STYLE = """\
.endoreward { color-scheme: light dark; forced-color-adjust: none; print-color-adjust: exact;
  --muted: light-dark(#5b6470, #a3acb8); --line: light-dark(#d5d9df, #353b45);
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: light-dark(#f4f5f7, #0d0f13);
  padding: 1.25rem; box-sizing: border-box }
.endoreward.alone { padding-bottom: 9.5rem }
[data-jp-theme-light="true"] .endoreward { color-scheme: light }
[data-jp-theme-light="false"] .endoreward { color-scheme: dark }
.endoreward h1 { font-size: 1.25rem; margin: 0 0 .75rem }
.endoreward h2 { font-size: .85rem; font-weight: 600; color: var(--muted); margin: 0 0 .4rem }
.endoreward .legend, .endoreward .legend div { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center }
.endoreward .legend { color: var(--muted); font-size: .85rem; font-variant-numeric: tabular-nums }
.endoreward .legend div { flex-wrap: nowrap; white-space: nowrap; max-width: 100% }
.endoreward .legend b { display: flex; border: 1px solid var(--line); border-radius: 3px; overflow: hidden }
.endoreward .legend b, .endoreward .legend i { flex: 0 1 auto; min-width: 0 }
.endoreward .legend i { width: .8rem; height: .9rem; box-sizing: border-box }
.endoreward section { margin-top: 1.5rem }
.endoreward .prompt { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow: auto;
  border-left: 3px solid var(--line); padding: .1rem .8rem; margin-bottom: 1.1rem }
.endoreward .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .9rem }
.endoreward article { position: relative; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem 1rem; min-width: 0 }
.endoreward article.best { border-color: var(--ink) }
.endoreward .badge { position: absolute; top: -.75em; left: .9rem; font: 600 .75rem/1.5 system-ui, sans-serif;
  padding: 0 .5em; border-radius: 1em; background: var(--ink); color: var(--paper) }
.endoreward header { display: flex; gap: .8rem; align-items: baseline; margin-bottom: .5rem }
.endoreward .label { font-weight: 600; flex: 1; overflow-wrap: anywhere }
.endoreward .score { font-weight: 600; font-variant-numeric: tabular-nums }
.endoreward .count, .endoreward .note { color: var(--muted); font-size: .85rem }
.endoreward .note { margin: 0 0 .5rem }
.endoreward .tokens { white-space: break-spaces; overflow-wrap: anywhere; line-height: 1.9; tab-size: 4 }
.endoreward .t { border-radius: 3px; padding: .12em 0; margin-right: 1px; cursor: default;
  scroll-margin-bottom: 11rem }
.endoreward .t s, .endoreward .t small { text-decoration: none; font-size: .85em }
.endoreward [class*=" n"]:not(.nan), .endoreward i[class^="n"] { box-shadow: inset 0 -2px var(--below) }
.endoreward .nan { outline: 1px dashed var(--muted) }
.endoreward .t:focus, .endoreward .t:hover { outline: 2px solid var(--ink); outline-offset: 1px }
.endoreward .t:focus::after, .endoreward .t:hover::after { content: attr(aria-label); display: block;
  position: absolute; left: var(--x, 0); margin-top: .45rem; z-index: 9; box-sizing: border-box; max-width: 100%;
  white-space: pre-wrap;
  font: 12.5px/1.5 ui-monospace, monospace; text-decoration: none; background: var(--ink); color: var(--paper);
  border-radius: 6px; padding: .5rem .7rem; box-shadow: 0 4px 14px #0006; pointer-events: none; direction: ltr }
.endoreward .tokens:has(.t:hover) .t:focus:not(:hover)::after { content: none }
.endoreward .t.up::after { transform: translateY(calc(-100% - 2.9em)) }
.endoreward .quiet .t::after { content: none !important }
@media print {
  .endoreward { color-scheme: light !important }
  .endoreward .prompt { max-height: none }
  .endoreward header, .endoreward h2 { break-after: avoid }
}
"""

SCRIPT = """
const TIP = 165;  /* pixels that a tooltip takes */
const token = event => event.target.closest && event.target.closest('.endoreward .t');
const below = event => {
  const t = token(event);
  if (!t) return;
  const card = t.closest('article'), room = card.clientWidth - 200;
  const at = t.getClientRects()[0].left - card.getBoundingClientRect().left;
  card.classList.remove('quiet');
  card.style.setProperty('--x', Math.max(0, Math.min(at, room)) + 'px');
  const box = t.getBoundingClientRect();
  t.classList.toggle('up', innerHeight - box.bottom < TIP && box.top > TIP);
};
document.addEventListener('mouseover', below);
document.addEventListener('focusin', below);
document.addEventListener('keydown', event => {
  const t = token(event);
  if (!t) return;
  if (event.key === 'Escape') t.closest('article').classList.add('quiet');
  const all = [...document.querySelectorAll('.endoreward .tokens')].filter(e => e.firstElementChild);
  const own = t.parentElement, at = all.indexOf(own), leftwards = getComputedStyle(own).direction == 'rtl';
  const next = {
    ArrowRight: leftwards ? t.previousElementSibling : t.nextElementSibling,
    ArrowLeft: leftwards ? t.nextElementSibling : t.previousElementSibling,
    ArrowDown: all[at + 1]?.firstElementChild, ArrowUp: all[at - 1]?.firstElementChild,
    Home: own.firstElementChild, End: own.lastElementChild,
  }[event.key];
  if (next && !event.ctrlKey && !event.altKey && !event.metaKey) { next.focus(); event.preventDefault(); }
});
"""
