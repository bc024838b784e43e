"""The command with the embedded model: real scores, models that cannot be used, and the process around them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from endoreward_fast import EndoRewardModel
from endoreward_fast.command.cli import app
from endoreward_fast.command.facts import facts

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "endoreward_fast" / "pocket"
RM_BENCH = ROOT.parent / "shared" / "data" / "rm-bench"
ENV = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
ROWS = [
    {"prompt": "Question: What is 2 + 3?\nAnswer:", "completion": " 5", "id": 0},
    {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "completion": "5", "id": 1},
    {"prompt": "A", "completion": "", "id": 2},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}], "id": 3},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Patch the Hub's client, because it reads HF_HUB_OFFLINE only when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(*args, code=0, **kw):
    result = CliRunner().invoke(app, [str(a) for a in args], **kw)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_scores_agree_with_the_python_api(lines):
    out = rows_of(run("score", lines, "--per-token").stdout)
    expected = EndoRewardModel.from_pretrained("pocket").score(ROWS)
    assert [r["id"] for r in out] == [0, 1, 2, 3]
    assert [r["score"] for r in out] == pytest.approx([e.score for e in expected], rel=1e-4, abs=1e-4)
    assert out[2]["score"] < 0 and out[2]["flags"] == ["empty"] and len(out[2]["token_rewards"]["ids"]) == 1
    for row in out:
        assert sum(row["token_rewards"]["rewards"]) == pytest.approx(row["score"], abs=1e-3)
        assert len({len(column) for column in row["token_rewards"].values()}) == 1


def test_flags_change_the_score(lines):
    def first(*flags):
        return rows_of(run("score", lines, "-q", *flags).stdout)[1]["score"]

    plain = first()
    changed = [first(*f) for f in (("--alpha", 2), ("--reduction", "mean"), ("--gamma", 0.5), ("--system", "Sing."))]
    assert all(score != pytest.approx(plain, abs=1e-3) for score in changed)


def test_over_long_rows_are_refused_by_name_or_cut_on_request(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": "word " * n, "completion": "yes"}) + "\n" for n in (1, 100, 2)))
    result = run("score", path, "--max-length", 40, code=2)
    out = rows_of(result.stdout)
    assert [r["score"] is None for r in out] == [False, True, False]
    assert "40" in out[1]["error"] and "line 2: " in result.stderr
    out = rows_of(run("score", path, "--max-length", 40, "--truncate", "prompt").stdout)
    assert all(r["score"] is not None for r in out)
    assert "truncated" in out[1]["flags"] and "flags" not in out[0]


def test_rank_puts_a_likely_answer_first(tmp_path):
    path = tmp_path / "in.jsonl"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    path.write_text(json.dumps({"prompt": question, "completions": ["Qzvxk", "Paris", "Xwqvv"]}))
    assert rows_of(run("rank", path).stdout)[0]["best"] == "Paris"


def nan_weights(folder):
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def not_causal(folder):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=300)
    BertModel(config).save_pretrained(folder)


def more_tokens_than_the_head(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(2000)])
    tokenizer.save_pretrained(folder)


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_weights, "NaN"),
        (not_causal, "causal"),
        (more_tokens_than_the_head, "tokenizer has 3024 tokens but the model's output head only 1024"),
        (no_config, "config.json"),
    ],
)
def test_models_that_cannot_be_used_are_refused_in_one_line(spoil, message, lines, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("__pycache__"))
    spoil(folder)
    result = run("score", lines, "--model", folder, code=2)
    said = [line for line in result.stderr.splitlines() if line.startswith("endoreward: ")]
    assert len(said) == 1 and message.lower() in said[0].lower(), result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_a_missing_model_is_one_clear_line(lines):
    result = run("score", lines, "--model", "no-such-owner/no-such-model", code=2)
    assert "no-such-owner/no-such-model" in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_demo_measures_better_than_chance():
    text = run("demo").stdout
    measured = re.findall(r"^  (\S.*?) +([\d.]+)% +\[ *(\d+), *(\d+)\] +chance (\d+)%", text, re.MULTILINE)
    accuracies = {name: (float(low), float(chance)) for name, _, low, _, chance in measured}
    for name in ("swap words", "shuffle letters", "replace characters", "right answer first of four"):
        low, chance = accuracies[name]
        assert low > chance, (name, low)
    assert "demonstration" in text
    assert "endoreward demo --model smollm2" in text


def test_demo_asks_any_other_model_what_everybody_knows():
    """And shows its tokens: a real model was not trained on the built-in model's problems."""
    text = run("demo", "-m", POCKET, "-q").stdout
    tokens = re.findall(r"^    ('.*') +(-?\d+\.\d\d) +(-?\d+\.\d\d) +(-?\d+\.\d\d)$", text, re.MULTILINE)
    scores = [float(score) for score in re.findall(r"^    score +(-?\d+\.\d\d)$", text, re.MULTILINE)]
    assert len(scores) == 2 and sum(float(reward) for _, reward, *_ in tokens) == pytest.approx(sum(scores), abs=0.2)
    assert "What is the capital of France?" in text and f"  {len(facts())} trials" in text
    assert "toy" not in text and "held out" not in text


def test_facts_have_four_answers_of_like_length():
    quiz = facts()
    assert len(quiz) >= 20 and len({problem.question for problem in quiz}) == len(quiz)
    for problem in quiz:
        answers = (problem.answer, *problem.wrong)
        words = [len(answer.split()) for answer in answers]
        assert len({*answers}) == 4 and max(words) - min(words) <= 1, problem
        assert max(map(len, answers)) <= min(map(len, answers)) + 8 and len(problem.answer) < 40, problem


@pytest.mark.skipif(not RM_BENCH.exists(), reason="RM-Bench's files are not at ../shared/data/rm-bench")
def test_eval_reads_published_rm_bench():
    files = sorted(RM_BENCH.glob("*.json"))
    found = json.loads(run("eval", *files, "--limit", 1, "--json").stdout)
    assert [f["scored"] for f in found["files"]] == [1] * len(files)
    assert set(found["rm_bench"]["domains"]) == {"chat", "code", "safety"}
    assert found["tokens"] > 1000


# --- the process


def start(*args, **kw):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENV}
    # A shell starts background jobs with SIGINT ignored, and their children inherit that.
    kw["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-m", "endoreward_fast", *map(str, args)], **{**pipes, **kw})


def test_results_are_written_while_standard_input_is_open_and_survive_ctrl_c():
    with start("score", "-", "--max-tokens-per-batch", 16, stdin=subprocess.PIPE) as process:
        row = json.dumps({"prompt": "p", "completion": "some words " * 10}) + "\n"
        process.stdin.write(row * 400)  # fits into a pipe, but cannot all be scored before the signal arrives
        process.stdin.flush()
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        rest, err = process.stdout.read(), process.stderr.read()
        assert process.wait(60) == 130, err
    assert all(row["score"] < 0 for row in rows_of(first + rest))
    assert (first + rest).endswith("\n")
    assert "Traceback" not in err and "stopped early" in err


def test_a_closed_pipe_is_not_an_error(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text((json.dumps({"prompt": "p", "completion": "some words"}) + "\n") * 300)
    with start("score", path, "--max-tokens-per-batch", 64) as process:
        assert json.loads(process.stdout.readline())["score"] < 0
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 1
    assert "Traceback" not in err and "Exception ignored" not in err
