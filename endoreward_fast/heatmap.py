"""Tokens coloured by their reward: in a terminal, and as one self-contained page.

Blue above 0 and orange below, which the common kinds of colour blindness tell apart, on a scale that is centred at 0
and the same for everything shown; negative tokens are underlined besides. What a token says stands in its tooltip, for
a pointer and for the keyboard alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from .scoring import TokenTable
    from .types import TokenRewards

POSITIVE, NEGATIVE = (33, 102, 172), (179, 88, 6)
STRONGEST = 0.75  # how far a token's background goes from the page's towards its colour
QUANTILE = 0.98  # of all |rewards|: the scale's end, so that one outlier does not leave the rest pale


@dataclass(frozen=True)
class Shown:
    """One completion with its rewards."""

    title: str
    """what it is, in a line: its prompt, say"""
    score: float
    tokens: TokenTable


def scale_of(shown: Sequence[Shown]) -> float:
    """The reward that has the strongest colour; 1 where there is none."""
    sizes = sorted(abs(r) for one in shown for r in one.tokens.rewards)
    return (sizes[min(len(sizes) - 1, int(QUANTILE * len(sizes)))] if sizes else 0.0) or 1.0


def strength(reward: float, scale: float) -> float:
    """From -1 to 1."""
    return max(-1.0, min(1.0, reward / scale))


def to_rich(one: Shown, scale: float) -> Text:
    """The completion in a terminal's colours: white on as much of the colour as the reward is strong."""
    from rich.text import Text

    text = Text()
    for token, reward in zip(one.tokens.texts, one.tokens.rewards, strict=True):
        part = strength(reward, scale)
        tone = POSITIVE if part >= 0 else NEGATIVE
        red, green, blue = (round(30 + (c - 30) * abs(part)) for c in tone)
        text.append(_visible(token), style=f"white on #{red:02x}{green:02x}{blue:02x}")
    return text


def to_html(shown: Sequence[Shown], heading: str = "Endogenous rewards") -> str:
    """One page, nothing fetched, no script: completions side by side, each token with a tooltip."""
    scale = scale_of(shown)
    body = "\n".join(_article(one, scale) for one in shown)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>{escape(heading)}</h1>
<p class="scale"><span>{-scale:+.1f}</span><i></i><span>0</span><b></b><span>{scale:+.1f}</span>
reward of a token, nats; hold the pointer over a token, or press Tab</p>
<main>
{body}
</main>
</body>
</html>
"""


def fragment(one: Shown) -> str:
    """One completion as HTML for a page that is there already: a notebook's output."""
    return f'<div class="endoreward"><style>{STYLE}</style>{_article(one, scale_of([one]))}</div>'


def of_rewards(rewards: TokenRewards) -> str | None:
    """A notebook's view of the rewards of one row, (1, T) or (T,): tokens by their place; None for several rows."""
    from .scoring import TokenTable

    if rewards.reward.dim() > 2 or (rewards.reward.dim() == 2 and len(rewards.reward) != 1):
        return None
    fields = [None if f is None else f.detach().flatten().tolist() for f in rewards]
    # Off the mask everything is 0, and on it a log-probability of exactly 0 has a value beside it.
    places = [t for t, numbers in enumerate(zip(*(f for f in fields if f is not None), strict=True)) if any(numbers)]
    reward, logprob, value, entropy = (() if f is None else tuple(f[t] for t in places) for f in fields)
    table = TokenTable(tuple(places), tuple(f"{t} " for t in places), reward, logprob, value, entropy)
    return fragment(Shown("token rewards, by place", sum(reward), table))


def _article(one: Shown, scale: float) -> str:
    tokens = "".join(_token(one.tokens, i, scale) for i in range(len(one.tokens.ids)))
    title, score = escape(one.title), f"{one.score:.2f}"
    head = f'<article aria-label="{title}, score {score}"><h2>{title}</h2>'
    return f'{head}<p class="score">{score}</p><p>{tokens}</p></article>'


def _token(table: TokenTable, i: int, scale: float) -> str:
    part = strength(table.rewards[i], scale)
    side = "pos" if part >= 0 else "neg"
    facts = [
        f"reward {table.rewards[i]:+.3f}", f"log-probability {table.logprobs[i]:.3f}", f"value {table.values[i]:.3f}",
    ]  # fmt: skip
    facts += [f"entropy {table.entropies[i]:.3f}"] if table.entropies else []
    text = table.texts[i] or f"[{table.ids[i]}]"
    tip = escape(" · ".join(facts), quote=True)
    return (
        f'<span class="t {side}" tabindex="0" style="--s:{abs(part) * STRONGEST * 100:.0f}%" '
        f'aria-label="{escape(_visible(text), quote=True)}: {tip}" data-tip="{tip}">{escape(_visible(text))}</span>'
    )


def _visible(token: str) -> str:
    """The token, with what has no width made visible; a line break stays one."""
    return token.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", "⏎\n") if token else "∅"


STYLE = f"""
:root {{ color-scheme: light dark; --page: #ffffff; --ink: #1c2127; --soft: #5b6570; --line: #d6dbe0;
  --pos: rgb{POSITIVE}; --neg: rgb{NEGATIVE}; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #14181d; --ink: #eef1f4; --soft: #9aa5b1; --line: #333b44; --pos: #2f7fd1; --neg: #c4660c; }}
}}
body {{ margin: 2rem; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.25rem; }}
h2 {{ font-size: .9rem; font-weight: 500; color: var(--soft); margin: 0; overflow-wrap: anywhere; }}
main, .endoreward {{ display: grid; gap: 1rem; }}
main {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }}
article {{ border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }}
.score {{ font-size: 1.5rem; margin: .25rem 0; font-variant-numeric: tabular-nums; }}
.scale {{ color: var(--soft); font-size: .85rem; }}
.scale i, .scale b {{ display: inline-block; width: 6rem; height: .7rem; margin: 0 .4rem; }}
.scale i {{ background: linear-gradient(to left, transparent, color-mix(in oklab, var(--neg) 75%, transparent)); }}
.scale b {{ background: linear-gradient(to right, transparent, color-mix(in oklab, var(--pos) 75%, transparent)); }}
.t {{ position: relative; white-space: pre-wrap; border-radius: .2rem; padding: .1rem 0; cursor: default;
  font-family: ui-monospace, monospace; line-height: 1.9; }}
.pos {{ background: color-mix(in oklab, var(--pos) var(--s), transparent); }}
.neg {{ background: color-mix(in oklab, var(--neg) var(--s), transparent); text-decoration: underline dotted; }}
.t:hover, .t:focus {{ outline: 2px solid var(--ink); z-index: 1; }}
.t:hover::after, .t:focus::after {{ content: attr(data-tip); position: absolute; left: 0; top: 100%; z-index: 2;
  width: max-content; max-width: 20rem; padding: .3rem .5rem; border-radius: .3rem; background: var(--ink);
  color: var(--page); font: 13px/1.4 system-ui, sans-serif; white-space: normal; pointer-events: none; }}
""".strip()
