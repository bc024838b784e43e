"""EndoRewardManager and compute_score, called as verl 0.9.1 calls them, and by verl if it is installed.

verl needs transformers below 5.11, so the usual environment lacks it. There, only the recorded calls are tested.
"""

import asyncio
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.integrations import verl as integration
from endoreward_fast.integrations.verl import EndoRewardManager, TokenScore, compute_score
from endoreward_fast.model.checkpoint import pocket_path
from tiny_models import byte_tokenizer, sampled_rewards
from verl_contract import INSTALLED, colocated, config, streamed

PATH = str(pocket_path())
REAL = pytest.param(True, marks=pytest.mark.skipif(not INSTALLED, reason="verl is not installed"), id="verl")
SOURCES = [pytest.param(False, id="recorded"), REAL]


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PATH)


@pytest.fixture(scope="module")
def samples(tokenizer):
    """A complete, a truncated and a one-token response. The tokenizer would split none of their texts like this."""
    eos = tokenizer.eos_token_id
    return [([5, 6, 7, 8], [9, 10, 11, eos]), ([12, 13], [14, 15]), ([16, 17, 18], [eos])]


def manager(tokenizer, **options):
    """Build a manager as load_reward_manager does."""
    return EndoRewardManager(
        config=config(PATH, options), tokenizer=tokenizer, compute_score=None, reward_router_address=None,
        reward_model_tokenizer=None,
    )  # fmt: skip


def together(manager, parts):
    """Score all parts concurrently, as compute_score_batch does."""

    async def ask():
        return await asyncio.gather(*(manager.run_single(data) for data in parts))

    return asyncio.run(ask())


@pytest.mark.parametrize("real", SOURCES)
@pytest.mark.parametrize("layout", ["padded right", "padded left", "streamed"])
def test_token_scores_equal_the_oracles(layout, real, pocket, tokenizer, samples):
    batch = colocated(samples, left=layout == "padded left", real=real)
    if layout == "streamed":
        parts = [streamed([(p, r)], real=real) for p, r in samples]
    else:
        parts = [batch[i : i + 1] for i in range(len(batch))]
    answers = together(manager(tokenizer), parts)
    found = EndoRewardManager.assemble_rm_scores(batch, [a["reward_score"] for a in answers])
    assert found.shape == batch.batch["responses"].shape and found.dtype == torch.float32
    for row, (prompt, response) in enumerate(samples):
        wanted = sampled_rewards(pocket, prompt, response, {tokenizer.eos_token_id})
        torch.testing.assert_close(found[row, : len(response)], wanted, rtol=1e-5, atol=2e-4)
        assert found[row, len(response) :].eq(0).all()
        info = answers[row]["reward_extra_info"]
        assert answers[row]["reward_score"] == pytest.approx(wanted.sum().item(), abs=5e-4)
        assert info["endo_reward/token"] == pytest.approx(wanted.mean().item(), abs=2e-4)
        assert (info["endo_reward/length"], info["endo_reward/unscored"]) == (len(response), 0)


@pytest.mark.parametrize("real", SOURCES)
def test_the_last_output_of_a_rollout_is_scored(real, pocket, tokenizer, samples):
    """verl pads prompt and response together, so the mask does not show where the last response starts."""
    [answer] = together(manager(tokenizer), [streamed(samples, real=real)])
    wanted = sampled_rewards(pocket, *samples[-1], {tokenizer.eos_token_id})
    assert answer["reward_score"].tokens == pytest.approx(wanted.tolist(), abs=2e-4)


@pytest.mark.parametrize("options", [{"reduction": "mean"}, {"gamma": 0.5, "floor": 0.3}], ids=str)
def test_token_scores_add_up_to_the_reduced_score(options, tokenizer, samples):
    parts = [streamed([sample]) for sample in samples]
    plain, asked = (together(manager(tokenizer, **o), parts) for o in ({}, options))
    weights = {"mean": lambda h, n: 1 / n}.get(options.get("reduction"), lambda h, n: max(0.5**h, 0.3))
    for a, b in zip(plain, asked, strict=True):
        n = len(a["reward_score"].tokens)
        wanted = [r * weights(h, n) for h, r in enumerate(a["reward_score"].tokens)]
        assert b["reward_score"].tokens == pytest.approx(wanted, rel=1e-4)
        assert b["reward_score"] == pytest.approx(sum(wanted), rel=1e-4)


def test_a_token_score_works_as_a_number():
    """The streamed path runs rm_scores[..., length - 1] = torch.tensor(scores)."""
    score = TokenScore(1.5)
    score.tokens = (0.5, 1.0)
    assert torch.tensor([score, 2.0]).tolist() == [1.5, 2.0]
    sent = pickle.loads(pickle.dumps(score))  # Ray sends it from the worker to the trainer
    assert (sent, sent.tokens) == (1.5, (0.5, 1.0))
    batch = colocated([([1], [2, 3, 4]), ([1], [2])])
    assert EndoRewardManager.assemble_rm_scores(batch, [-1.0, 2.0]).tolist() == [[0, 0, -1], [2, 0, 0]]


def test_concurrent_calls_share_forwards(tokenizer, samples, monkeypatch):
    asked = []
    score = EndoRewardModel.score
    monkeypatch.setattr(
        EndoRewardModel, "score", lambda self, rows, **o: asked.append(len(rows)) or score(self, rows, **o)
    )
    together(manager(tokenizer), [streamed([samples[i % 3]]) for i in range(40)])
    assert sum(asked) == 40 and len(asked) <= 10


def own_tokens(pocket, tokenizer, prompt, response, own):
    """Return the rewards of the policy's tokens, 0 for all others. V(s') counts after all but a last turn."""
    ends = {tokenizer.eos_token_id} if own[-1] else set()
    return sampled_rewards(pocket, prompt, response, ends) * torch.tensor(own)


@pytest.mark.parametrize("turns", [None, 2, 4])
@pytest.mark.parametrize("layout", ["padded right", "padded left", "streamed"])
def test_only_the_policys_tokens_are_scored(layout, turns, pocket, tokenizer, samples):
    """Only response_mask decides, whatever number of turns verl reports."""
    eos = tokenizer.eos_token_id
    answered = [([5, 6, 7, 8], [9, eos, 20, 21, 22, 11, eos]), ([12, 13], [14, eos, 23, eos]), ([3], [30, 31, eos])]
    owns = [[1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1]]  # the second was truncated after the tool's answer
    batch = colocated(answered, left=layout == "padded left", own=owns)
    if layout == "streamed":
        parts = [streamed([sample], own=[own]) for sample, own in zip(answered, owns, strict=True)]
    else:
        parts = [batch[i : i + 1] for i in range(len(batch))]
    for part in parts:
        part.non_tensor_batch.pop("__num_turns__", None)
        if turns is not None:
            part.non_tensor_batch["__num_turns__"] = np.array([turns])
    answers = together(manager(tokenizer), parts)
    found = EndoRewardManager.assemble_rm_scores(
        batch, [pickle.loads(pickle.dumps(a["reward_score"])) for a in answers]
    )
    for row, ((prompt, response), own) in enumerate(zip(answered, owns, strict=True)):
        wanted = own_tokens(pocket, tokenizer, prompt, response, own)
        torch.testing.assert_close(found[row, : len(response)], wanted, rtol=1e-5, atol=2e-4)
        assert found[row, len(response) :].eq(0).all()
        assert answers[row]["reward_score"] == pytest.approx(wanted.sum().item(), abs=5e-4)
        assert answers[row]["reward_extra_info"]["endo_reward/length"] == sum(own)
    numbers = EndoRewardManager.assemble_rm_scores(batch, [1.0, 2.0, 3.0])  # on the policy's last token
    assert numbers.nonzero().tolist() == [[0, 6], [1, 1], [2, 2]]


def test_a_score_of_another_response_raises(tokenizer, samples):
    score = TokenScore(1.0)
    score.tokens = (1.0, 2.0)
    with pytest.raises(EndoRewardError, match="response 0 has 3 tokens, and its score 2"):
        EndoRewardManager.assemble_rm_scores(colocated([([1], [2, 3, 4])]), [score])


def test_unscored_completions_are_never_the_best_are_counted_and_warn_once(tokenizer, samples):
    ours = manager(tokenizer)
    parts = {
        "empty": streamed([([5], [])]),
        "the limit is": streamed([([5], [6] * ours.reward.scorer.max_positions)]),
        "no response_mask": streamed([samples[0]], turns=4),
        "leaves no token": streamed([samples[0]], own=[[0, 0, 0, 0]]),
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = together(ours, [*parts.values(), *parts.values(), streamed([samples[1]])])
    assert [a["reward_score"] for a in answers[:-1]] == [-1e6] * 8 and answers[-1]["reward_score"] > -1e6
    assert [a["reward_extra_info"]["endo_reward/unscored"] for a in answers] == [1] * 8 + [0]
    assert all(set(a["reward_extra_info"]) == set(answers[0]["reward_extra_info"]) for a in answers)
    assert sorted(ours.reward.reasons.values()) == [2, 2, 2, 2]
    messages = [str(w.message) for w in said]
    assert all(sum(word in m for m in messages) == 1 for word in parts), messages


def test_nan_rewards_are_never_the_best_and_are_counted(tokenizer, samples):
    ours = manager(tokenizer, unscored=-500)
    with torch.no_grad():
        ours.reward.scorer.model.get_input_embeddings().weight[samples[1][1][0]] = torch.nan
    with pytest.warns(UserWarning, match="NaN"):
        first, second = together(ours, [streamed([samples[0]]), streamed([samples[1]])])
    assert first["reward_score"] > -500 and second["reward_score"] == -500
    assert second["reward_extra_info"]["endo_reward/unscored"] == 1


def test_bad_input_raises_one_line(tokenizer):
    with pytest.raises(EndoRewardError, match=r"endo_reward\.temperature: expected one of model, alpha"):
        manager(tokenizer, temperature=2)
    with pytest.raises(EndoRewardError, match="alpha"):
        manager(tokenizer, alpha=-1.0)
    other = byte_tokenizer()
    other.name_or_path = "policy"
    with pytest.raises(
        EndoRewardError, match=r"the policy's vocabulary .policy, .* is not the reward model's .*pocket"
    ):
        manager(other)
    ours = manager(tokenizer)
    with pytest.raises(EndoRewardError, match=r"calls its reward manager as a function: install verl 0\.9"):
        ours(None, return_dict=True)
    data = streamed([([5], [6])])
    del data.batch["prompts"]
    with pytest.raises(EndoRewardError, match=r"gives its reward managers no prompts: install verl 0\.9"):
        together(ours, [data])


def test_compute_score_reads_the_prompt_from_the_dataset(pocket):
    """Call it as NaiveRewardManager does, with reward_kwargs merged in."""

    def ask(extra_info, **options):
        return compute_score(data_source="x", solution_str="5", ground_truth="5", extra_info=extra_info, **options)

    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    for prompt in (messages[0]["content"], messages):
        answer = ask({"prompt": prompt, "num_turns": 2}, model="pocket", reward_router_address=None)
        [wanted] = pocket.score([{"prompt": prompt, "completion": "5"}])
        assert answer["score"] == pytest.approx(wanted.score, abs=1e-4)
        assert answer["endo_reward/length"] == wanted.num_tokens
    assert ask({"prompt": messages}, model="pocket", reduction="mean")["score"] != answer["score"]
    assert integration._reward.cache_info().misses == 2
    with pytest.raises(EndoRewardError, match=r"extra_info has no 'prompt'.*EndoRewardManager"):
        ask({"question": "?"}, model="pocket")


def test_compute_score_loads_one_model_for_all_threads(monkeypatch):
    """NaiveRewardManager uses run_in_executor: the first calls arrive together, before the model is loaded."""
    loaded = []
    load = integration.BatchedReward
    monkeypatch.setattr(integration, "BatchedReward", lambda *a, **o: loaded.append(a) or load(*a, **o))
    integration._reward.cache_clear()
    together = threading.Barrier(8)

    def ask(_):
        together.wait()
        return compute_score("x", "5", "5", {"prompt": "What is 2 + 3?"}, model="pocket")["score"]

    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(ask, range(8)))
    assert len(loaded) == 1
    assert scores == pytest.approx([scores[0]] * 8, abs=1e-4)  # they may be in different batches


@pytest.mark.skipif(not INSTALLED, reason="verl is not installed")
@pytest.mark.parametrize("path", [None, "pkg://endoreward_fast.integrations.verl"])
def test_beside_a_reward_model_verl_calls_the_manager_only_with_a_custom_function(path, monkeypatch, samples):
    """RewardLoopWorker.compute_score asks the reward model unless custom_reward_function.path is set."""
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    async def reward_model(self, data):
        return {"reward_score": 7.0}

    monkeypatch.setattr(RewardLoopWorker, "compute_score_disrm", reward_model)

    async def ask():
        settings = config(PATH)
        settings.reward.reward_model = {"enable": True, "model_path": PATH}
        settings.reward.custom_reward_function = {"path": path, "name": "compute_score"}
        return await RewardLoopWorker(settings).compute_score(colocated(samples[:1], real=True))

    score = asyncio.run(ask())["reward_score"]
    assert isinstance(score, TokenScore) == (path is not None)


@pytest.mark.skipif(not INSTALLED, reason="verl is not installed")
def test_verls_own_reward_loop_assembles_token_scores(pocket, tokenizer, samples):
    """Cover its importlib loader, its workers on a local Ray, and its assembly of scores."""
    import ray
    from verl.experimental.reward_loop.reward_loop import RewardLoopManager

    ray.init(num_cpus=2, include_dashboard=False)
    try:
        found = RewardLoopManager(config(PATH)).compute_rm_score(colocated(samples, real=True))
    finally:
        ray.shutdown()
    for row, (prompt, response) in enumerate(samples):
        wanted = sampled_rewards(pocket, prompt, response, {tokenizer.eos_token_id})
        torch.testing.assert_close(found.batch["rm_scores"][row, : len(response)], wanted, rtol=1e-5, atol=2e-4)
    assert found.non_tensor_batch["endo_reward/length"].tolist() == [len(r) for _, r in samples]
