"""`endoreward eval --signals --judge --reward-model`: each method gets its own scores, in JSON and in the tables."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from cli_harness import put, run
from endoreward_fast import EndoRewardModel
from endoreward_fast.command.flags.options import JUDGES as JUDGE_NAMES
from endoreward_fast.data.signal_columns import NEEDS
from endoreward_fast.data.signal_columns import SIGNALS as SIGNAL_NAMES
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.rivals.judges import JUDGES
from endoreward_fast.rivals.reward_model import RewardModel
from endoreward_fast.scoring.readings import KEYS
from endoreward_fast.signals import SIGNALS
from tiny_models import save_two_words

QUESTIONS = [("What is 2 + 2?", "4", ["5", "44"]), ("What is 3 + 1?", "4", ["three", "7"])]
PAIRS = [{"id": i, "prompt": q, "chosen": c, "rejected": r} for i, (q, c, r) in enumerate(QUESTIONS)]
NO_NEEDS = [name for name, signal in SIGNALS.items() if not signal.needs]
OF_TWO_MODELS = [name for name, signal in SIGNALS.items() if signal.needs_reference]


def samples():
    """Return (row, place) and scorer input of every completion. Judges compare within a `group`."""
    for n, (question, chosen, rejected) in enumerate(QUESTIONS):
        for completion in (chosen, *rejected):
            yield {"prompt": question, "completion": completion, "group": n}


def listed(found):
    """Return the scores of every completion in a method's part of the JSON, in the order of `samples`."""
    return [score for row in found["scores"] for score in (*row["chosen"], *row["rejected"])]


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, pocket):
    path = tmp_path_factory.mktemp("reward-model")
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(pocket.tokenizer), num_labels=1, pad_token_id=0, **size)
    LlamaForSequenceClassification(config).save_pretrained(path)
    pocket.tokenizer.save_pretrained(path)
    return str(path)


def test_the_command_knows_every_signal_and_judge_by_name():
    """options.py repeats the names, so that --help does not wait for torch."""
    assert tuple(SIGNALS) == SIGNAL_NAMES and tuple(JUDGES) == JUDGE_NAMES
    for name, signal in SIGNALS.items():
        columns = {key for need in signal.needs for key in KEYS.get(need, (need,))}
        assert set(NEEDS.get(name, ())) == columns, name


def test_every_method_gets_its_own_scores(pocket, reward_model, tmp_path):
    rivals = ["--judge", "all", "--reward-model", reward_model, "--reference-model", pocket_path()]
    found = json.loads(run("eval", put(tmp_path, *PAIRS), "--signals", "all", *rivals, "--json", "-q").stdout)
    rows = list(samples())
    wanted = pocket.score(rows, signals="all", reference=pocket)
    assert listed(found) == pytest.approx([s.score for s in wanted], abs=1e-4)
    methods = [name for name in SIGNALS if name in NO_NEEDS + OF_TWO_MODELS]
    assert list(found["methods"])[: len(methods)] == methods
    for name in methods:
        signals = [s.signals[name] for s in wanted]
        assert listed(found["methods"][name]) == pytest.approx(signals, rel=1e-4, abs=1e-4)
        assert name in OF_TWO_MODELS or len({round(s, 3) for s in signals}) > 3
    for name, judge in JUDGES.items():
        verdicts = [v.score for v in judge(pocket).score(rows)]
        assert listed(found["methods"][f"judge, {name}"]) == pytest.approx(verdicts, rel=1e-4, abs=1e-4)
    trained = [v.score for v in RewardModel.from_pretrained(reward_model, device="cpu").score(rows)]
    assert listed(found["methods"]["reward model"]) == pytest.approx(trained, rel=1e-4, abs=1e-5)
    for method in (found, *found["methods"].values()):
        above = [sum(c > r for c in row["chosen"] for r in row["rejected"]) / 2 for row in method["scores"]]
        assert method["files"][0]["accuracy"] == pytest.approx(sum(above) / 2)


def test_tables_have_a_line_for_each_method(pocket, tmp_path):
    # A row without a score has no signals either: it does not make them signals that some row could have had.
    broken = {"prompt": "No completion."}
    shown = run("eval", put(tmp_path, *PAIRS, broken), "--signals", "all", "--judge", "verifier", "-q", code=2).stdout
    lines = shown[shown.index("by method") :].splitlines()[1:]
    assert [line.split("  ")[2] for line in lines[: len(NO_NEEDS) + 1]] == [*NO_NEEDS, "judge, verifier"]
    assert all("%" in line and "2 rows" in line for line in lines[: len(NO_NEEDS) + 1])
    assert "log-ratio and prefix-value are left out: they need a second model (--reference-model).\n" in shown
    assert "answer-logprob, answer-probability are left out: they need the column answer_span.\n" in shown
    assert "privileged-log-ratio is left out: it needs the column privileged.\n" in shown


def test_eval_says_how_often_a_completion_is_read(pocket, reward_model, tmp_path):
    """A judge reads its question once with each possible reply."""
    pairs = put(tmp_path, *({**row, "rejected": row["rejected"][0]} for row in PAIRS))
    said = run("eval", pairs, "--signals", "all", "--judge", "all", "--reward-model", reward_model).stderr
    assert (
        "every completion is read more than once: 1 by the model; 1 by the judge, verifier; 1 by the judge, pointwise; "
        "2 for each rival by the judge, pairwise; 1 by the reward model"
    ) in said
    said = run("eval", pairs, "--signals", "all", "--reference-model", "pocket").stderr
    assert "more than once: 1 by the model; 1 by the reference model\n" in said
    assert "more than once" not in run("eval", pairs, "--signals", "entropy").stderr


def test_selected_signals_are_compared_and_rivals_include_the_score(pocket, tmp_path):
    path = put(tmp_path, *PAIRS)
    found = json.loads(run("eval", path, "--signals", "entropy,logprob", "--json", "-q").stdout)
    assert list(found["methods"]) == ["entropy", "logprob"]
    found = json.loads(run("eval", path, "--judge", "pointwise", "--json", "-q").stdout)
    assert list(found["methods"]) == ["endogenous", "judge, pointwise"]
    assert "methods" not in json.loads(run("eval", path, "--json", "-q").stdout)


def test_a_row_that_one_method_cannot_score_is_scored_by_the_others(pocket, tmp_path):
    """A judge's question is longer than the row, so it may exceed the limit alone."""
    long = {"prompt": "a b " * 60, "chosen": "4", "rejected": "5"}
    [row] = pocket.score([{"prompt": long["prompt"], "completion": "4"}])
    assert row.error is None
    limit = len(pocket.tokenizer(long["prompt"])["input_ids"]) + 20
    flags = ["--judge", "verifier", "--signals", "logprob", "--max-length", limit, "--json"]
    result = run("eval", put(tmp_path, *PAIRS, long), *flags, code=2)
    found = json.loads(result.stdout)
    counts = [(f["scored"], f["skipped"]) for m in (found, *found["methods"].values()) for f in m["files"]]
    assert counts == [(3, 0), (3, 0), (2, 1)]
    assert re.search(r"line 3: judge, verifier: \d+ tokens, the limit is", result.stderr), result.stderr
    assert "rows that another method could not score: 1 (exit code 2)" in result.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--signals", "entropy,certainty"], "--signals must be all, or some of endogenous, .*, got 'certainty'"),
        (["--signals", "log-ratio"], "--signals log-ratio compares two models: name the second with --reference-model"),
        (["--signals", "prefix-value"], "--signals prefix-value compares two models: name the second with"),
        (["--reference-model", "pocket"], "--reference-model needs --signals log-ratio or prefix-value"),
        (["--judge", "jury"], "--judge must be all, or some of verifier, pointwise, pairwise, got 'jury'"),
        (["--reward-model", "nowhere/at/all"], "nowhere/at/all"),
        (["--reward-model", "pocket"], "'pocket' is a .*ForCausalLM, which is not a reward model"),
        (["--signals", "log-ratio", "--reference-model", "./nowhere"], "nowhere': there is no such folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_clear_line(flags, said, tmp_path):
    result = run("eval", put(tmp_path, *PAIRS), *flags, "-q", code=2)
    assert re.search(said, result.stderr) and result.stderr.count("\n") == 1, result.stderr


def test_a_judge_whose_reply_is_no_token_is_one_clear_line(tmp_path):
    flags = ["--judge", "verifier", "--model", save_two_words(tmp_path / "model"), "-q"]
    result = run("eval", put(tmp_path, *PAIRS), *flags, code=2)
    assert "the model's tokenizer has no token for 'Yes'" in result.stderr and result.stderr.count("\n") == 1
