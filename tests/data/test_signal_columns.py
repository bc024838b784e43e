"""The columns that signals need, through `eval` and `score`: their shapes, their errors, and --resume."""

import json

import pytest

from cli_harness import put, run
from endoreward_fast import EndoRewardModel
from endoreward_fast.data.columns import plan
from endoreward_fast.signals import SIGNALS
from tiny_models import save_two_words

OF_ROW = [name for name, signal in SIGNALS.items() if signal.needs and not signal.needs_reference]
PAIR = {
    "prompt": "What is 2 + 2?", "chosen": "2 + 2 = 4", "rejected": ["2 + 2 = 5", "it is 44"],
    "answer_span": {"chosen": "4", "rejected": ["5", [6, 8]]}, "reference_answer": 4, "privileged": "Solution: 4",
}  # fmt: skip
BARE = {"prompt": "What is 3 + 1?", "chosen": "4", "rejected": "7"}
GIVEN = {"prompt": PAIR["prompt"], "reference_answer": "4", "privileged": "Solution: 4"}
SPANS = {"2 + 2 = 4": "4", "2 + 2 = 5": "5", "it is 44": "44"}
SAMPLES = [{**GIVEN, "completion": text, "answer_span": span} for text, span in SPANS.items()]


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.mark.parametrize(
    ("row", "spans"),
    [
        (PAIR, ["4", "5", [6, 8]]),
        (PAIR | {"answer_span": "4"}, ["4"] * 3),
        (PAIR | {"answer_span": [0, 1]}, [[0, 1]] * 3),
        (PAIR | {"answer_span": 4}, ["4"] * 3),
        (PAIR | {"answer_span": 10**400, "chosen": 10**400}, [str(10**400)] * 3),
        (PAIR | {"answer_span": {"chosen": "4"}}, [{"chosen": "4"}] * 3),
        ({"prompt": "p", "completions": ["a", "b"], "answer_span": ["a", "b"]}, ["a", "b"]),
        ({"prompt": "p", "completions": ["a", "b"], "answer_span": [0, 1]}, [[0, 1]] * 2),
        ({"prompt": "p", "completions": ["a", "b"], "answer_span": [[0, 1], "b"]}, [[0, 1], "b"]),
        ({"question": "p", "answer": "a", "answer_span": "a"}, ["a"]),
        ({"prompt_ids": [1], "completion_ids": [2, 3], "answer_span": [0, 1]}, [[0, 1]]),
        (PAIR | {"answer_span": ""}, [None] * 3),
    ],
)
def test_a_column_has_the_shape_of_the_scores_or_belongs_to_every_sample(row, spans):
    assert [sample.get("answer_span") for sample in plan(row).samples] == spans


def test_two_numbers_are_a_span_but_also_two_answers():
    row = {"prompt": "p", "completions": ["a", "b"], "reference_answer": [4, 5], "answer_span": [0, 1]}
    assert [(s["reference_answer"], s["answer_span"]) for s in plan(row).samples] == [("4", [0, 1]), ("5", [0, 1])]


def test_messages_belong_to_every_sample():
    hint = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    task = plan({"prompt": "p", "completions": ["a", "b"], "privileged": hint})
    assert [sample["privileged"] for sample in task.samples] == [hint] * 2


def test_eval_prints_signals_of_the_rows_that_have_their_columns(pocket, tmp_path):
    found = json.loads(run("eval", put(tmp_path, PAIR, BARE), "--signals", "all", "--json", "-q").stdout)
    wanted = pocket.score(SAMPLES, signals=OF_ROW)
    for name in OF_ROW:
        (row,) = found["methods"][name]["scores"]
        assert [*row["chosen"], *row["rejected"]] == pytest.approx([s.signals[name] for s in wanted], abs=1e-3), name
        assert found["methods"][name]["files"][0]["rows"] == 1
    assert len(found["methods"]["logprob"]["scores"]) == 2
    shown = run("eval", put(tmp_path, PAIR, BARE), "--signals", "all", "--judge", "verifier", "-q").stdout
    assert all(f"    {name} " in shown for name in (*OF_ROW, "judge, verifier")) and "the column" not in shown
    failed = {"prompt": "a b " * 60, "chosen": "4", "rejected": "5"}
    limit = ["--max-length", "100", "-q"]
    shown = run("eval", put(tmp_path, BARE, failed), "--signals", "all", *limit, code=2).stdout
    assert not any(f"    {name} " in shown for name in OF_ROW) and "they need the columns answer_span and" in shown


def test_a_reference_model_with_another_vocabulary_is_one_clear_line(tmp_path):
    flags = ["--signals", "prefix-value", "--reference-model", save_two_words(tmp_path / "model"), "-q"]
    said = run("eval", put(tmp_path, BARE), *flags, code=2).stderr
    assert "is not the reference model's" in said and said.count("\n") == 1, said


def test_a_named_signal_is_an_error_of_the_rows_without_its_columns(tmp_path):
    wrong = PAIR | {"answer_span": "9"}
    result = run("eval", put(tmp_path, PAIR, BARE, wrong), "--signals", "answer-probability", "--json", code=2)
    (file,) = json.loads(result.stdout)["methods"]["answer-probability"]["files"]
    assert (file["scored"], file["skipped"]) == (1, 2)
    assert "line 2: answer-probability: needs the row's `answer_span`: the final answer's text in the" in result.stderr
    assert "line 3: answer-probability: answer_span: '9' is not in the completion: give a text" in result.stderr
    assert "scored 3 of 3 rows" in result.stderr


@pytest.mark.parametrize("names", ["all", "answer-logprob"])
def test_a_completion_without_the_column_of_the_others_is_an_error_of_the_row(names, tmp_path):
    rows = put(tmp_path, PAIR, PAIR | {"answer_span": {"chosen": "4", "rejected": ["5", None]}})
    result = run("eval", rows, "--signals", names, "--json", "-q", code=2)
    (file,) = json.loads(result.stdout)["methods"]["answer-logprob"]["files"]
    assert (file["scored"], file["skipped"]) == (1, 1)
    said = "answer_span: give all of them one" if names == "all" else "needs the row's `answer_span`"
    assert said in file["errors"][0] and "line 2: answer-logprob: " in result.stderr and said in result.stderr


@pytest.mark.parametrize(("command", "row"), [("score", SAMPLES[0]), ("eval", BARE | {"answer_span": "4"})])
def test_strict_stops_at_a_row_without_what_a_named_signal_needs(command, row, tmp_path):
    rows = put(tmp_path, row | {"answer_span": "9"}, SAMPLES[0] | BARE)
    said = run(command, rows, "--signals", "answer-logprob", "--strict", "-q", code=2).stderr
    assert "line 1: answer-logprob: answer_span: '9' is not in the completion" in said and "(--strict: stopped" in said


def test_score_writes_signals_beside_the_score_and_resumes_with_the_same_ones(pocket, tmp_path):
    rows, out = put(tmp_path, *SAMPLES, SAMPLES[0] | {"answer_span": "9"}), tmp_path / "out.jsonl"
    run("score", rows, "--signals", ",".join(("entropy", *OF_ROW)), "-o", out, "-q")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = pocket.score(SAMPLES, signals=["entropy", *OF_ROW])
    for line, one in zip(lines, wanted, strict=False):
        assert line["signals"] == pytest.approx(one.signals, abs=1e-3) and "signal_errors" not in line
        assert line["score"] == pytest.approx(one.score, abs=1e-3)
    assert (
        list(lines[3]["signals"]) == ["entropy", "privileged-log-ratio"]
        and list(lines[3]["signal_errors"]) == OF_ROW[:5]
    )
    whole = out.read_text()
    out.write_text("".join(line + "\n" for line in whole.splitlines()[:2]))
    said = run("score", rows, "--signals", "entropy", "-o", out, "--resume", "-q", code=2).stderr
    assert "was made with signals='entropy," in said and "not 'entropy'" in said
    run("score", rows, "--signals", ",".join(("entropy", *OF_ROW)), "-o", out, "--resume", "-q")
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["answer_span"] for line in again] == [line["answer_span"] for line in lines]
    assert again[2]["signals"] == pytest.approx(lines[2]["signals"], abs=1e-3)
    said = run("score", out, "-o", tmp_path / "twice.jsonl", "-q")
    assert "signals" in json.loads((tmp_path / "twice.jsonl").read_text().splitlines()[0]), said


@pytest.mark.parametrize("name", ["log-ratio", "certainty"])
def test_score_refuses_signals_that_it_cannot_give(name, tmp_path):
    said = {
        "log-ratio": "--signals log-ratio compares two models: `endoreward eval` takes the second with",
        "certainty": "--signals must be all, or some of endogenous, ",
    }[name]
    result = run("score", put(tmp_path, *SAMPLES), "--signals", name, "-q", code=2)
    assert said in result.stderr and result.stderr.count("\n") == 1
