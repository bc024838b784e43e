"""The tables of docs/scale.md that follow from the cost formulas, for a terminal and as Markdown."""

from dataclasses import replace

from bench.cost.formulas import MODELS, Batch, Decoder, cost, find

Table = tuple[list[str], list[list[str]]]
"""(headings, rows)"""
TYPICAL = Batch(rows=8, length=1024, scored=512)
"""8192 tokens, the default limit of a batch; prompts and completions of equal length"""


def shapes_table(models: tuple[Decoder, ...] = MODELS, batch: Batch = TYPICAL) -> Table:
    headings = [
        "model", "body, GFLOP a token", "head, GFLOP a state", "head's share", "if all is scored", "weights read, GB",
        "head's, GB", "eager's logits, GB", "ours, MB",
    ]  # fmt: skip
    rows = []
    for model in models:
        found, all_scored = cost(model, batch), cost(model, replace(batch, scored=batch.length - 1))
        rows.append([
            model.name, _fmt(found.body / batch.tokens / 1e9), _fmt(found.head / batch.states / 1e9),
            _percent(found.head_share), _percent(all_scored.head_share), _fmt(found.weight_bytes / 1e9),
            _fmt(found.head_bytes / 1e9), _fmt(found.eager_bytes / 1e9), _fmt(found.workspace_bytes / 1e6),
        ])  # fmt: skip
    return headings, rows


def growth_table(model: Decoder = find("Qwen2.5-7B"), batch: Batch = TYPICAL) -> Table:  # noqa: B008 - frozen
    """Show how the cost changes when one size changes."""
    twice_as_wide = replace(model, hidden=2 * model.hidden, heads=2 * model.heads, mlp=2 * model.mlp)
    changes = [
        ("as it is", cost(model, batch)),
        ("twice the rows", cost(model, replace(batch, rows=2 * batch.rows))),
        ("twice T", cost(model, replace(batch, length=2 * batch.length, scored=2 * batch.scored))),
        ("32 times T, one row", cost(model, Batch(1, 32 * batch.length, 32 * batch.scored))),
        ("a quarter as many scored", cost(model, replace(batch, scored=batch.scored // 4))),
        ("twice V", cost(replace(model, vocab=2 * model.vocab), batch)),
        ("twice D, H and F", cost(twice_as_wide, batch)),
        ("twice the layers", cost(replace(model, layers=2 * model.layers), batch)),
        ("each of 8 ranks", cost(model, batch, ranks=8)),
        ("each of 8 vocabulary shards", cost(model, batch, shards=8)),
    ]
    headings = [
        "", "body, TFLOP", "of it attention", "head, TFLOP", "head's share", "weights read, GB", "eager's logits, GB",
        "ours, MB", "sent, MB",
    ]  # fmt: skip
    rows = [
        [
            name, _fmt(c.body / 1e12), _percent(c.attention / c.body), _fmt(c.head / 1e12), _percent(c.head_share),
            _fmt(c.weight_bytes / 1e9), _fmt(c.eager_bytes / 1e9), _fmt(c.workspace_bytes / 1e6),
            _fmt(c.wire_bytes / 1e6),
        ]
        for name, c in changes
    ]  # fmt: skip
    return headings, rows


def markdown(table: Table) -> str:
    headings, rows = table
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def show(title: str, table: Table) -> None:
    """Print a table to the terminal."""
    from rich.console import Console
    from rich.table import Table as Drawn

    headings, rows = table
    drawn = Drawn(title=title)
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if i else "left", no_wrap=not i, min_width=9)
    for cells in rows:
        drawn.add_row(*cells)
    console = Console()
    console.width = max(console.width, 132)
    console.print(drawn)


def _fmt(value: float) -> str:
    """Format with three significant digits."""
    return "0" if not value else f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
