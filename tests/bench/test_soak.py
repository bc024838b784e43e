"""bench.soak: its checks of memory and output, and a short run of the real command."""

import json
import statistics

import pytest

from bench import soak
from bench.harness import timing


def series(memory):
    return [soak.Reading(seconds=i, rows=10 * i, mib=memory(i)) for i in range(1, 101)]


def test_growth_is_zero_for_flat_memory_and_positive_for_a_leak():
    assert soak.growth(series(lambda i: 500)) == 0
    saw = series(lambda i: 500 + 10 * (i % 5))  # memory rises and falls with each batch
    assert soak.growth(saw) == 0
    assert soak.growth(series(lambda i: 500 if i > 30 else 10 * i)) == 0  # warming up
    assert abs(soak.growth(series(lambda i: 500 + 10 * (i > 60)))) < soak.GROWTH  # one step, and no more
    leak = soak.growth(series(lambda i: 500 + 0.4 * i + 10 * (i % 5)))  # 20 MiB in the second half
    assert leak > soak.GROWTH and leak == pytest.approx(20 / 530, rel=0.2)
    assert soak.growth(series(lambda i: 500 - i)) < 0
    with pytest.raises(SystemExit, match="6 readings in the second half, at least 10 needed"):
        soak.growth(series(lambda i: 500)[:10])


def test_the_evidence_page_quotes_the_record_of_the_soak():
    text = " ".join((timing.RESULTS.parents[1] / "docs" / "evidence.md").read_text().split())
    run = json.loads((timing.RESULTS / "soak.json").read_text())["cases"][0]
    readings = [soak.Reading(**reading) for reading in run["readings"]]
    lowest = [
        min(r.mib for r in readings if tenth <= 10 * r.rows / run["rows"] < tenth + 1) for tenth in range(soak.TENTHS)
    ]
    assert run["wrong"] == [] and run["growth_of_second_half"] == soak.growth(readings) < soak.GROWTH
    typical = statistics.median(run["rows_per_s"])
    for said in (
        f"{run['rows']:,} short rows", f"{typical:.0f} rows", f"({typical * run['tokens'] / run['rows']:,.0f} tokens)",
        f"{run['mib']['last']:.0f} MiB at the end", "464.9 MiB in eight of its ten tenths",
    ):  # fmt: skip
        assert said in text
    assert lowest.count(464.9) == 8


def test_throughput_by_tenths():
    steady = soak.by_tenths(series(lambda i: 500))
    assert steady == pytest.approx([10] * 10)
    slower = [soak.Reading(seconds=(i / 10) ** 2, rows=10 * i, mib=1) for i in range(1, 101)]
    found = soak.by_tenths(slower)
    assert found == sorted(found, reverse=True) and found[0] > 5 * found[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows, None),
        (lambda rows: rows[:-1], "99 rows were written for 100"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "or in another order"),
        (lambda rows: [*rows, rows[-1]], "101 rows were written for 100"),
        (
            lambda rows: [row | {"score": row["score"] and row["score"] + 0.01} for row in rows],
            "scores differ by up to",
        ),
        (
            lambda rows: [row | {"score": None} if row["id"] == 3 else row for row in rows],
            "rows other than those without a completion have no score",
        ),
    ],
)
def test_mistakes_in_an_output_are_found(tmp_path, change, said):
    rows = soak.rows_of(100)
    assert len({row["id"] for row in rows}) == 100 and "completion" not in rows[99]
    from endoreward_fast import EndoRewardModel

    results = EndoRewardModel.from_pretrained("pocket").score(rows)
    written = change([row | {"score": result.score} for row, result in zip(rows, results, strict=True)])
    output = tmp_path / "out.jsonl"
    output.write_text("".join(json.dumps(row) + "\n" for row in written))
    found = soak.mistakes(rows, output)
    assert found == [] if said is None else said in found[0]


def test_a_short_run_of_the_command(tmp_path):
    run = soak.soak(400, ["--max-tokens-per-batch", "512"], every=0.02)
    assert [w for w in run["wrong"] if not w.startswith("memory")] == []  # too short a run to judge memory
    assert 200 < run["readings"][-1]["rows"] <= 400
    assert 100 < run["mib"]["last"] < 4000 and len(run["rows_per_s"]) == soak.TENTHS
    assert run["tokens"] > 400 * 5
    assert "400 rows --max-tokens-per-batch 512" in soak.sentence(run)
    assert soak.draw([run], tmp_path / "soak.png").stat().st_size > 10_000
