"""A made-up scorer for the real command, and helpers that run the command in this process."""

import json
from dataclasses import dataclass

from typer.testing import CliRunner

from endoreward_fast.command.cli import app


@dataclass(frozen=True)
class Tokens:
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Score:
    score: float | None
    flags: tuple[str, ...] = ()
    error: str | None = None
    tokens: Tokens | None = None
    signals: dict[str, float] | None = None
    signal_errors: dict[str, str] | None = None
    num_tokens: int = 0


class LengthScorer:
    """Scores a completion with minus its length, in reverse order. "LONG..." gets an error and "NAN" the score NaN."""

    def __init__(self):
        self.options = {}
        self.stop_after = None

    def encode(self, rows, **options):
        return rows

    def iter_scores(self, rows, *, on_tokens=None, per_token=False, **options):
        self.options = options
        for count, i in enumerate(reversed(range(len(rows)))):
            if count == self.stop_after:
                raise KeyboardInterrupt
            text = rows[i]["completion"]
            on_tokens(len(text))
            if text.startswith("LONG"):
                yield i, Score(None, error="9 tokens, the model takes 8 (see --truncate)")
            elif text == "NAN":
                yield i, Score(float("nan"))
            else:
                tokens = Tokens((-1.0,) * len(text)) if per_token else None
                signals = dict.fromkeys(options.get("signals", ()), 1.0)
                flags = () if text else ("empty",)
                yield i, Score(-float(len(text)), flags, tokens=tokens, signals=signals, num_tokens=len(text))


def run(*args, code=0, **kw):
    """Run the command in this process and check its exit code: `code`, or one of a tuple."""
    result = CliRunner().invoke(app, [str(a) for a in args], **kw)
    allowed = code if isinstance(code, tuple) else (code,)
    assert result.exit_code in allowed, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    return result


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def put(folder, *rows, name="in.jsonl"):
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


PAIR = {"id": 7, "prompt": "p", "completion": "abc"}
