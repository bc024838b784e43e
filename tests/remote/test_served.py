"""RemoteModel, the adapters and the command against `endoreward serve`."""

import pytest

pytest.importorskip("fastapi", reason="the server needs FastAPI")

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardError
from endoreward_fast.integrations.openrlhf import EndoReward
from endoreward_fast.remote import transport
from endoreward_fast.remote.address import TOKEN
from endoreward_fast.remote.client import RemoteModel
from endoreward_fast.serving.limits import Limits
from remote_cases import OPTIONS, ROWS, close
from served import Gated, serving
from tiny_models import byte_tokenizer

SECRET = "a-token-of-many-letters"


@pytest.fixture(scope="module")
def pocket():
    return Gated.pocket()


@pytest.fixture(scope="module")
def running(pocket):
    limits = Limits(request_bytes=100_000, rows=40, tokens=2000, seconds=20)
    with serving(pocket, limits=limits, most_waiting=60, token=SECRET.encode()) as (asker, _):
        yield asker


@pytest.fixture
def remote(running, monkeypatch):
    monkeypatch.setattr(transport, "BACKOFF", 0.01)
    monkeypatch.setenv(TOKEN, SECRET)
    return RemoteModel(running.url)


@pytest.mark.parametrize("options", [{}, *OPTIONS])
def test_scores_are_those_of_the_model_in_this_process(remote, pocket, options):
    rows = ROWS[:10] if options else ROWS
    close(remote.score(rows, **options), pocket.score(rows, **options))


def test_token_rewards_and_signals_are_those_of_the_model_in_this_process(remote, pocket):
    options = {"per_token": True, "entropy": True, "signals": ["logprob", "answer-logprob"]}
    rows = [ROWS[0] | {"answer_span": "5"}, ROWS[6]]
    for one, other in zip(remote.score(rows, **options), pocket.score(rows, **options), strict=True):
        assert (one.tokens.ids, one.tokens.texts) == (other.tokens.ids, other.tokens.texts)
        for name in ("rewards", "logprobs", "values", "entropies"):
            assert getattr(one.tokens, name) == pytest.approx(getattr(other.tokens, name), abs=1e-4)
        assert one.signals == pytest.approx(other.signals, abs=1e-4) and one.signal_errors == other.signal_errors


def test_the_model_is_described(remote, pocket):
    assert remote.vocab_size == pocket.vocab_size and remote.max_positions == pocket.max_positions
    assert remote.eos_ids == {pocket.tokenizer.eos_token_id}
    assert remote.vocabulary().get_vocab() == pocket.tokenizer.get_vocab()


def test_rows_beyond_the_servers_tokens_and_queue_are_all_scored(remote, pocket):
    """2000 tokens in a request, so requests are halved; 60 rows in the queue, so some are refused with 429."""
    rows = [{"prompt_ids": [5 + n % 50] * 90, "completion_ids": [8, n % 60]} for n in range(150)]
    counted = []
    close(remote.score(rows, on_tokens=counted.append), pocket.score(rows))
    assert sum(counted) == 150 * 92


def test_an_error_of_a_row_does_not_name_its_place_in_a_request(remote):
    found = remote.score([{"messages": []}, ROWS[0], {"messages": [{"role": "user", "content": "?"}]}])
    assert found[0].error.startswith("messages: wanted an array") and found[1].error is None
    assert found[2].error.startswith("messages: the last turn must be the assistant's")


def test_errors_are_one_line(running, remote):
    with pytest.raises(EndoRewardError, match=f"^{running.url}: 401: .*: set {TOKEN} to the server's token$"):
        RemoteModel(running.url, "another")
    with pytest.raises(EndoRewardError, match="is not the reward model's"):
        EndoReward(running.url, byte_tokenizer())
    found = remote.score([{"prompt_ids": [5] * 3000, "completion_ids": [6]}])
    assert "413: 3001 tokens in one request" in found[0].error


@pytest.mark.parametrize("verb", ["score", "rank"])
def test_the_command_writes_what_the_local_engine_writes(running, remote, pocket, tmp_path, verb):
    path = put(tmp_path, *({"prompt": f"What is {n} + 3?", "completions": ["5", "six", ""]} for n in range(6)))
    flags = ("--per-token", "--date", "2026-01-02", "-q")
    local = rows_of(run(verb, path, *flags, "-m", "pocket").stdout)
    found = rows_of(run(verb, path, *flags, "--engine", "http", "--url", running.url).stdout)
    for one, other in zip(found, local, strict=True):
        name = "score" if verb == "score" else "scores"
        assert one.pop(name) == pytest.approx(other.pop(name), abs=1e-4)
        for ours, theirs in zip(one.pop("token_rewards"), other.pop("token_rewards"), strict=True):
            assert ours.pop("texts") == theirs.pop("texts") and ours.keys() == theirs.keys()
            assert all(ours[column] == pytest.approx(theirs[column], abs=1e-3) for column in ours)
        assert one == other
