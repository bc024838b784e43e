"""What goes wrong when a policy is trained on its own rewards: statistics of a batch, and when a run has collapsed.

Nothing here needs a trainer; `monitor.py` feeds it from TRL's.
"""

import json
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

from ..errors import EndoRewardError

PREFIX = "collapse"
WINDOW = 5
JUDGED = ("reward", "entropy", "majority", "one_answer", "accuracy", "length", "truncated", "kl")
"""the values that a course reads"""


class Sampled(NamedTuple):
    """One completion. Texts are stored as 64-bit digests, which are equal on every process and cheap to gather."""

    prompt: int
    """digest of the prompt: completions with the same one are a group"""
    answer: int | None
    """digest of the answer; None if the completion has none"""
    text: int
    """digest of the whole completion"""
    length: int
    """number of tokens"""
    reward: float | None
    """None for a completion without a reward"""


def digest(value: Any) -> int:
    """Return 64 bits that depend on a text or on messages, alike in every process."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=_spelled)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _spelled(value: Any) -> str:
    """Return a text for an image or an array in a message. The repr of an image contains its address."""
    return blake2b(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else repr(value)


def last_text(completion: Any) -> str:
    """Return a completion's text. If it consists of messages, return that of the last one that no tool wrote."""
    if isinstance(completion, str):
        return completion
    written = [message for message in completion if message.get("role") != "tool"]
    content = written[-1].get("content") if written else None
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)


def measure(rows: Sequence[Sampled]) -> dict[str, float]:
    """Return statistics of a batch. A statistic without a value (no group of two, no variance) is left out.

    majority            share of a group's most frequent answer, mean over the groups (prompts) of two or more: the
                        majority ratio of PRIME-RL/TTRL. 0 for a group without any answer
    distinct            number of different completions of a group, divided by its size, mean over the same groups
    one_answer          share of the batch's most frequent answer, whatever the prompt; for two or more prompts
    no_answer           share of completions without an answer. Such completions agree with no other one
    reward              mean reward
    length_correlation  Pearson correlation of reward and length, each minus its group's mean, which is what group-
                        relative advantages see
    """
    if not rows:
        return {}
    groups = defaultdict(list)
    for row in rows:
        groups[row.prompt].append(row)
    several = [group for group in groups.values() if len(group) > 1]
    found = {"no_answer": sum(row.answer is None for row in rows) / len(rows)}
    if several:
        found["majority"] = _mean(_top_share(group) for group in several)
        found["distinct"] = _mean(len({row.text for row in group}) / len(group) for group in several)
    if len(groups) > 1:
        found["one_answer"] = _top_share(rows)
    scored = [row.reward for row in rows if row.reward is not None and math.isfinite(row.reward)]
    if scored:
        found["reward"] = _mean(scored)
    correlation = _correlation(several)
    return found if correlation is None else found | {"length_correlation": correlation}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _centred(values: Sequence[float]) -> list[float]:
    """Return the values minus their mean: exactly 0 if they are equal, which a rounded mean would not give."""
    middle = _mean(values) if min(values) < max(values) else values[0]
    return [value - middle for value in values]


def _top_share(rows: Sequence[Sampled]) -> float:
    counts = Counter(row.answer for row in rows if row.answer is not None)
    return max(counts.values(), default=0) / len(rows)


def _correlation(groups: Sequence[Sequence[Sampled]]) -> float | None:
    pairs: list[tuple[float, float]] = []
    for group in groups:
        known = [(r.reward, r.length) for r in group if r.reward is not None and math.isfinite(r.reward)]
        if known:
            pairs += zip(*map(_centred, zip(*known, strict=True)), strict=True)
    squares = [math.fsum(pair[k] ** 2 for pair in pairs) for k in (0, 1)]
    if min(squares, default=0.0) <= 0:
        return None
    return math.fsum(x * y for x, y in pairs) / math.sqrt(squares[0] * squares[1])


@dataclass(frozen=True)
class Limits:
    """The values at which a run counts as gone wrong. None: not watched.

    A sign of collapse counts only while the reward is not below its start, and only if the start was on the right side:
    entropy      below this share of its start
    majority     at or above this share of a group's completions
    one_answer   at or above this share of all completions, whatever the prompt
    accuracy     below this share of its start, if an accuracy is watched

    A limit counts whatever the reward does:
    shorter      mean length below this share of its start
    longer       mean length above this multiple of its start
    truncated    share of completions cut by the length limit, at or above
    kl           nats a token from the reference model, above

    Raises EndoRewardError for a value outside of its range.
    """

    entropy: float | None = 0.1
    majority: float | None = 0.99
    one_answer: float | None = 0.9
    accuracy: float | None = 0.5
    shorter: float | None = None
    longer: float | None = None
    truncated: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            low, high = (1.0, math.inf) if name == "longer" else (0.0, math.inf if name == "kl" else 1.0)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and low < value <= high and math.isfinite(value)):
                wanted = f"above {low:g}" if math.isinf(high) else f"in ({low:g}, {high:g}]"
                raise EndoRewardError(f"Limits({name}={value!r}): expected a number {wanted}, or None")


class Verdict(NamedTuple):
    """What a log says about the run."""

    collapsed: bool
    """whether a sign of collapse is there"""
    reasons: tuple[str, ...]
    """each sign or limit that was crossed, in words"""


class Course:
    """The course of a run's logs, and whether it has collapsed.

    Under an intrinsic reward, accuracy rises and then falls, while the reward is held (the "rise-then-fall" of arXiv
    2603.08660's abstract). A run has collapsed if its reward is at or above its start and a sign of `Limits` holds.
    The paper's Model Collapse Step is where "reward accuracy" collapses. In its code (PRIME-RL/TTRL, ttrl_utils.py),
    this is the share of completions whose intrinsic reward equals the reward by their labels. It needs rewards of 0 and
    1; here, accuracy takes its place. Entropy, majority and one_answer need no labels. They say that the policy has one
    answer left, right or wrong, so that the reward cannot tell completions apart any more.

    Values are means over the last `window` logs. The start is the mean over the first `window` logs, or `start`.
    Nothing is judged before the first `window` logs are complete.
    Raises EndoRewardError for a `start` with an unknown name or a value that is not finite.
    """

    def __init__(self, limits: Limits, window: int = WINDOW, start: Mapping[str, float] | None = None) -> None:
        self.limits, self.window = limits, window
        self.start: dict[str, float] = dict(start or {})
        for name, value in self.start.items():
            if name not in JUDGED:
                raise EndoRewardError(f"start[{name!r}]: expected one of {', '.join(JUDGED)}")
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise EndoRewardError(f"start[{name!r}]={value!r}: expected a finite number")
        self._first: dict[str, list[float]] = defaultdict(list)
        self._last: dict[str, deque[float]] = defaultdict(partial(deque, maxlen=window))

    def update(self, values: Mapping[str, float | None]) -> Verdict:
        """Add the values of a log and judge the run. A value of None, or NaN, is left out."""
        for name, value in values.items():
            if value is None or math.isnan(value):
                continue
            self._last[name].append(value)
            if name not in self.start:
                self._first[name].append(value)
                if len(self._first[name]) == self.window:
                    self.start[name] = _mean(self._first.pop(name))
        now = {
            name: _mean(last) for name, last in self._last.items() if name in self.start and len(last) == self.window
        }
        reward_held = "reward" in now and now["reward"] >= self.start["reward"]
        signs = tuple(self._signs(now)) if reward_held else ()
        return Verdict(bool(signs), (*signs, *self._limits(now)))

    def _signs(self, now: Mapping[str, float]) -> Iterable[str]:
        limits, start = self.limits, self.start
        for name in ("entropy", "accuracy"):
            share = getattr(limits, name)
            if share is not None and name in now and now[name] < share * start[name]:
                yield f"{name} fell from {start[name]:.3g} to {now[name]:.3g}, below {share:g} of its start"
        for name in ("majority", "one_answer"):
            bound = getattr(limits, name)
            if bound is not None and name in now and start[name] < bound <= now[name]:
                of = "of a prompt's completions" if name == "majority" else "of all completions, whatever the prompt,"
                yield f"{now[name]:.0%} {of} have the same answer, {start[name]:.0%} at the start"

    def _limits(self, now: Mapping[str, float]) -> Iterable[str]:
        limits, start = self.limits, self.start
        length = now.get("length")
        if length is not None and limits.shorter is not None and length < limits.shorter * start["length"]:
            yield f"completions shrank from {start['length']:.1f} to {length:.1f} tokens"
        if length is not None and limits.longer is not None and length > limits.longer * start["length"]:
            yield f"completions grew from {start['length']:.1f} to {length:.1f} tokens"
        if limits.truncated is not None and now.get("truncated", -1.0) >= limits.truncated:
            yield f"{now['truncated']:.0%} of completions are cut by the length limit"
        if limits.kl is not None and now.get("kl", 0.0) > limits.kl:
            yield f"KL to the reference is {now['kl']:.3g} nats a token, above {limits.kl:g}"
