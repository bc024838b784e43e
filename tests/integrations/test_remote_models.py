"""A URL in the place of a model's name, in every adapter: the same rewards as with the model in this process."""

import asyncio
import os
import pickle
import subprocess
import sys
import threading
import traceback
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from cli_harness import put, run
from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.integrations import openrlhf, verl
from endoreward_fast.integrations.batched import BatchedReward
from endoreward_fast.integrations.prime_rl import EndoScoring
from endoreward_fast.integrations.skyrl import EndoGenerator
from endoreward_fast.integrations.slime import custom_rm
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.remote.address import TOKEN
from endoreward_fast.remote.client import RemoteModel
from endoreward_fast.remote.wire import MODEL, VOCABULARY
from endoreward_fast.scoring.sampled import generated_row
from stub_server import stub_server
from tiny_models import byte_tokenizer
from trainer_contracts import (
    Algorithm,
    Generated,
    episodes,
    generator_input,
    generator_output,
    sample,
    slime_args,
    trace,
)
from verl_contract import config, streamed

RESPONSES = [([5, 6, 7], [9, 10, 1]), ([5, 6], [14, 15]), ([16], [1]), ([5, 6], [])]


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(pocket_path()))


@pytest.fixture(scope="module")
def running(pocket):
    with stub_server(pocket) as stub:
        yield stub


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    running.faults, running.posts, running.gets = [], [], []
    return running


def rewards_of(reward):
    asked = [reward.submit(generated_row(p, r, reward.ends)) for p, r in RESPONSES]
    return [one.result(30) for one in asked]


def same(found, wanted):
    """Check numbers, nested in any way, but for the rounding of another batch."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-3)


# --- BatchedReward, on which verl, OpenRLHF, slime, SkyRL and prime-rl stand


def test_rewards_are_those_of_the_model_in_this_process(server, pocket, tokenizer):
    with pytest.warns(UserWarning, match="the completion is empty"):
        wanted = rewards_of(BatchedReward(pocket, tokenizer, gamma=0.9, alpha=2.0))
    for model in (server.url, RemoteModel(server.url)):
        reward = BatchedReward(model, tokenizer, gamma=0.9, alpha=2.0)
        assert reward.ends == {tokenizer.eos_token_id}
        with pytest.warns(UserWarning, match="the completion is empty"):
            found = rewards_of(reward)
        for one, other in zip(found, wanted, strict=True):
            same([one.score, *one.tokens, *one.rewards], [other.score, *other.tokens, *other.rewards])
            assert one.error == other.error


def test_requests_of_one_reward_are_in_flight_together(server, tokenizer):
    together, arrived = threading.Barrier(3), threading.Semaphore(0)

    def wait(handler):
        arrived.release()
        together.wait(10)

    reward = BatchedReward(RemoteModel(server.url, concurrency=3), tokenizer)
    server.faults, server.busiest = [wait] * 3, 0
    asked = []
    for _ in range(3):  # each begins a request of its own, because the earlier ones wait in the server
        asked.append(reward.submit(generated_row([5], [6, 7], reward.ends)))
        assert arrived.acquire(timeout=10)
    assert all(one.result(30).error is None for one in asked) and server.busiest == 3


def test_a_servers_error_is_raised_by_each_future(server, tokenizer):
    reward = BatchedReward(server.url, tokenizer)
    server.faults = [lambda handler: handler.answer(500, {"error": "a bug"})]
    with pytest.raises(EndoRewardError, match=f"{server.url}: 500: a bug"):
        reward.submit(generated_row([5], [6], reward.ends)).result(30)


def test_a_forked_process_gets_rewards_and_so_does_one_that_gets_a_pickle(server, tokenizer):
    reward = BatchedReward(server.url, tokenizer)
    row = generated_row([5], [6, 7], reward.ends)
    wanted = reward.submit(row).result(30).score
    assert pickle.loads(pickle.dumps(reward)).submit(row).result(30).score == wanted
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if reward.submit(row).result(30).score == wanted else 1)
        except BaseException:
            traceback.print_exc()
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_ends_while_a_server_does_not_answer(server):
    asked, over = threading.Event(), threading.Event()

    def wait(handler):
        asked.set()
        over.wait(60)

    server.faults = [wait]
    code = f"""
from endoreward_fast.integrations.batched import BatchedReward
BatchedReward({server.url!r}).submit({{"prompt_ids": [5], "completion_ids": [6]}})
import sys; sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert asked.wait(60)
        process.stdin.close()
        try:
            assert process.wait(20) == 0
        finally:
            over.set()


def test_rewards_of_all_tokens_arrive_whatever_the_server_truncates(server, tokenizer):
    reward = BatchedReward(server.url, tokenizer)
    assert len(reward.submit(generated_row([5], [6, 7], reward.ends)).result(30).tokens) == 2
    assert server.posts[-1][1]["truncate"] is None


def test_another_vocabulary_is_refused_by_name(server):
    with pytest.raises(EndoRewardError, match=r"the policy's vocabulary \(.*\) is not the reward model's \(pocket, "):
        BatchedReward(server.url, byte_tokenizer())
    assert server.gets == [MODEL, VOCABULARY]


def test_the_vocabulary_is_not_asked_for_without_a_tokenizer(server):
    assert BatchedReward(server.url).tokenizer is None and server.gets == [MODEL]


def test_the_servers_batches_are_its_own(server, tokenizer):
    with pytest.raises(EndoRewardError, match="max_tokens_per_batch is the server's own option"):
        BatchedReward(server.url, tokenizer, max_tokens_per_batch=100)


# --- the adapters


def test_openrlhf(server, pocket, tokenizer):
    prompt = "<|user|>What is 2 + 3?<|end|><|assistant|>"
    asked = [prompt + "5", prompt + "6" + tokenizer.eos_token], [prompt] * 2
    found, wanted = openrlhf.EndoReward(server.url, tokenizer)(*asked), openrlhf.EndoReward(pocket)(*asked)
    same(found["rewards"].tolist(), wanted["rewards"].tolist())
    with pytest.raises(EndoRewardError, match="has no tokenizer: give one"):
        openrlhf.EndoReward(server.url)


def test_verl(server, pocket, tokenizer):
    def score(model):
        made = verl.EndoRewardManager(config(str(pocket_path()), {"model": model}), tokenizer)
        return [asyncio.run(made.run_single(streamed([one])))["reward_score"] for one in RESPONSES[:3]]

    for one, other in zip(score(server.url), score(pocket), strict=True):
        same([float(one), *one.tokens], [float(other), *other.tokens])


def test_verls_function_for_texts(server):
    def score(model):
        return verl.compute_score("x", "5", "5", {"prompt": "What is 2 + 3?"}, model=model)["score"]

    same(score(server.url), score("pocket"))
    verl._reward.cache_clear()  # test_verl.py counts what it keeps


def test_slime(server):
    def score(model):
        samples = [sample(prompt, response) for prompt, response in RESPONSES[:3]]
        return asyncio.run(custom_rm(slime_args(model), samples))

    same(score(server.url), score("pocket"))


def test_skyrl(server, pocket, tokenizer):
    rows = [(prompt, response, [1] * len(response)) for prompt, response in RESPONSES[:2]]

    def score(model):
        inner = Generated(generator_output(rows, [0.0] * 2))
        return asyncio.run(EndoGenerator(inner, model, tokenizer).generate(generator_input(["a", "b"])))["rewards"]

    for one, other in zip(score(server.url), score(pocket), strict=True):
        same(one, other)


def test_prime_rl(server, pocket):
    class Endo(EndoScoring, Algorithm):
        pass

    def score(model):
        made = Endo(SimpleNamespace(model=model, scale="none"), None)
        asyncio.run(made.setup())
        traces = [
            trace([(None, [5, 6], False), (0, [9, 10], True)]),
            trace([(None, [5, 6], False), (0, [14, 1], True)]),
        ]
        asyncio.run(made.score_group(episodes(traces)))
        return [node.advantages for one in traces for node in one.nodes if any(node.mask)]

    same(score(server.url), score(pocket))


def test_trl_reward(server, pocket, tokenizer):
    trl = pytest.importorskip("endoreward_fast.integrations.trl")
    texts = ["5", "6"]
    asked = ["What is 2 + 3?"] * 2, texts, [tokenizer(text)["input_ids"] for text in texts]
    same(trl.EndoReward(server.url, tokenizer)(*asked), trl.EndoReward(pocket, tokenizer)(*asked))
    with pytest.raises(EndoRewardError, match="max_tokens_per_batch is the server's"):
        trl.EndoReward(server.url, tokenizer, max_tokens_per_batch=8)
    with pytest.raises(EndoRewardError, match="prompts need a tokenizer"):
        trl.EndoReward(server.url)(*asked)


def test_grpo_trains_with_one_advantage_for_each_token(server, tokenizer, tmp_path):
    pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    from endoreward_fast.integrations.trl import EndoReward
    from trl_harness import Keeping, grpo

    settings = {"per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 1, "temperature": 3.0}
    trainer = grpo(Keeping, tmp_path, EndoReward(server.url, tokenizer), beta=0.0, **settings)
    trainer.train()
    assert trainer.batch["advantages"].shape == trainer.batch["completion_ids"].shape
    assert trainer.batch["advantages"].abs().sum() > 0
    assert trainer.state.log_history[0]["endo_reward/unscored"] == 0


def test_ray_data(server):
    pyarrow = pytest.importorskip("pyarrow")
    from endoreward_fast.integrations.ray import ScoreRows

    batch = pyarrow.Table.from_pylist([{"prompt": "What is 2 + 3?", "completion": "5"}, {"prompt": "?"}])
    found, wanted = (ScoreRows(model, reduction="mean")(batch).to_pylist() for model in (server.url, "pocket"))
    same(found[0]["score"], wanted[0]["score"])
    assert found[1]["score"] is None and found[1]["error"] == wanted[1]["error"]
    for given in ({"dtype": "float32"}, {"device": "cpu"}, {"source": {"revision": "v2"}}):
        with pytest.raises(EndoRewardError, match=f"{next(iter(given))}=.*: the server has loaded its model"):
            ScoreRows(server.url, **given)
    with pytest.raises(EndoRewardError, match="max_tokens_per_batch is the server's"):
        ScoreRows(server.url, max_tokens_per_batch=8)


# --- where a model has to be loaded


@pytest.mark.parametrize("url", ["http://any:secret@host:8000", "HTTPS://host/model"])
def test_a_model_is_not_loaded_from_a_url(url, tmp_path):
    with pytest.raises(EndoRewardError, match=r"not loaded from a URL.*RemoteModel") as error:
        EndoRewardModel.from_pretrained(url)
    assert "secret" not in str(error.value)
    said = run("score", put(tmp_path, {"prompt": "p", "completion": "c"}), "-m", url, code=2).stderr
    assert said.count("\n") == 1 and "--engine http --url URL" in said and "secret" not in said
