"""`reward_func(queries, prompts, labels)`, called as OpenRLHF 0.11.2 calls it, and by OpenRLHF if it is installed.

The calls follow SingleTurnAgentExecutor in openrlhf/utils/agent.py. It tokenizes the prompt without special tokens and
truncates it from the left to leave room. The query is prompt and response, decoded with special tokens. Each query is a
separate call in a thread. rewards[0], scores[0] and extra_logs go to `torch.tensor([...])`.
"""

import asyncio
import importlib.util
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.integrations.openrlhf import EndoReward
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.text.query import split_query
from reward_clients import Engine
from tiny_models import build, byte_tokenizer, sampled_rewards
from tiny_tokenizers import FRAGMENTS, LOSSLESS

INSTALLED = importlib.util.find_spec("openrlhf") is not None
PROMPT = "<|user|>What is 2 + 3?<|end|><|assistant|>"
FILE = """from endoreward_fast.integrations.openrlhf import EndoReward

reward_func = EndoReward("pocket")
"""


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(pocket_path()))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def oracle(pocket, tokenizer, prompt_ids, response):
    return sampled_rewards(pocket, prompt_ids, ids(tokenizer, response), {tokenizer.eos_token_id})


def test_rewards_equal_the_oracles(pocket, tokenizer):
    responses = ["5" + tokenizer.eos_token, "5 and", tokenizer.eos_token]
    found = EndoReward(pocket)([PROMPT + r for r in responses], [PROMPT] * 3, ["5"] * 3)
    rewards = [oracle(pocket, tokenizer, ids(tokenizer, PROMPT), r) for r in responses]
    assert set(found) == {"rewards", "scores", "extra_logs"}
    torch.testing.assert_close(found["rewards"], torch.stack([r.sum() for r in rewards]), rtol=1e-5, atol=5e-4)
    assert torch.equal(found["rewards"], found["scores"])
    token = torch.stack([r.mean() for r in rewards])
    torch.testing.assert_close(found["extra_logs"]["endo_reward_token"], token, rtol=1e-4, atol=5e-4)
    assert found["extra_logs"]["endo_reward_length"].tolist() == [len(r) for r in rewards]
    assert found["extra_logs"]["endo_reward_unscored"].eq(0).all()


def test_a_truncated_prompt_is_recognised(pocket, tokenizer):
    response, kept = "5" + tokenizer.eos_token, ids(tokenizer, PROMPT)[3:]
    query = tokenizer.decode([*kept, *ids(tokenizer, response)], skip_special_tokens=False)
    assert not query.startswith(PROMPT)
    found = EndoReward(pocket)([query], [PROMPT], [None])
    wanted = oracle(pocket, tokenizer, kept, response).sum().item()
    assert found["rewards"].item() == pytest.approx(wanted, abs=5e-4)


def test_a_query_that_starts_with_a_prompts_last_letters_is_unscored(pocket):
    reward = EndoReward(pocket)
    with pytest.warns(UserWarning, match="prompt"):
        found = reward(["n foo bar"], ["What is the question"], [None])
    assert found["extra_logs"]["endo_reward_unscored"].tolist() == [1]


def test_rewards_that_share_a_model_take_turns(pocket):
    """A hook reads the head's input: two concurrent forwards would each read the other's."""
    rewards = [EndoReward(pocket), EndoReward(pocket, alpha=2.0)]
    queries = [f"{PROMPT}{n}" for n in range(4)]
    wanted = [reward(queries, [PROMPT] * 4, [None] * 4)["rewards"] for reward in rewards]

    def ask(k):
        return k, rewards[k](queries, [PROMPT] * 4, [None] * 4)["rewards"]

    with ThreadPoolExecutor(8) as pool:
        for k, found in pool.map(ask, [0, 1] * 12):
            torch.testing.assert_close(found, wanted[k], rtol=1e-5, atol=1e-4)


def test_responses_get_the_tokens_that_were_sampled():
    """Llama 2's tokenizer adds a space before any text, so a response tokenized alone gains an unsampled token."""
    llama = LOSSLESS["llama-like"]
    scorer = EndoRewardModel(build(LlamaConfig, vocab_size=len(llama), max_position_embeddings=256), llama)
    generator = torch.Generator().manual_seed(0)
    pieces = [piece for piece in FRAGMENTS if piece.strip()]
    reward, wanted, queries, prompts = EndoReward(scorer), [], [], []
    for n in range(200):
        words = [pieces[i] for i in torch.randint(len(pieces), (6,), generator=generator)]
        prompt = (f"<|user|>the cat {n}<|end|><|assistant|>", f"Question: 12{n} cats?\nAnswer:", f"[INST] {n} [/INST]")[
            n % 3
        ]
        text = " " * (n % 3 > 0) + "".join(words[:3]) + " " + "".join(words[3:])
        whole = llama(prompt + text, add_special_tokens=False)["input_ids"]  # as a policy with this tokenizer samples
        before = llama(prompt, add_special_tokens=False)["input_ids"]
        assert whole[: len(before)] == before
        sampled = [*whole[len(before) :], llama.eos_token_id]
        query = llama.decode([*before, *sampled], skip_special_tokens=False)
        assert split_query(reward.reward.tokenizer, query, prompt) == (before, sampled)
        kept = before[2:]
        cut = llama.decode([*kept, *sampled], skip_special_tokens=False)
        assert split_query(reward.reward.tokenizer, cut, prompt) == (kept, sampled)
        if n < 8:
            queries.append(query)
            prompts.append(prompt)
            wanted.append(sampled_rewards(scorer, before, sampled, {llama.eos_token_id}).sum())
    found = reward(queries, prompts, [None] * 8)["rewards"]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=5e-4)


def test_unscored_completions_are_never_the_best_are_counted_and_warn_once(pocket, tokenizer):
    reward = EndoReward(pocket, unscored=-1e4)
    queries = [PROMPT, "something else", PROMPT + "5 " * pocket.max_positions, PROMPT + "5"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [reward(queries, [PROMPT] * 4, [None] * 4) for _ in range(2)][1]
    assert [r == -1e4 for r in found["rewards"].tolist()] == [True, True, True, False]
    assert found["rewards"].argmax() == 3 and EndoReward(pocket).reward.unscored == -1e6
    assert found["extra_logs"]["endo_reward_unscored"].tolist() == [1, 1, 1, 0]
    assert sorted(reward.reward.reasons.values()) == [2, 2, 2] and len(said) == 3


def test_a_score_not_above_unscored_is_unscored(pocket):
    """Hence no reward is below `unscored`, and the reward of an unscored completion is never the best."""
    reward = EndoReward(pocket, unscored=-20.0)
    with pytest.warns(UserWarning, match="not above unscored=-20"):
        found = reward([PROMPT, PROMPT + "zebra quartz " * 9, PROMPT + "5"], [PROMPT] * 3, [None] * 3)
    assert found["rewards"][:2].tolist() == [-20, -20] and found["rewards"][2] > -20
    assert found["extra_logs"]["endo_reward_unscored"].tolist() == [1, 1, 0]
    for odd in (0.0, 1.0, -float("inf"), float("nan"), "low"):
        with pytest.raises(EndoRewardError, match=r"unscored=.*finite number below 0"):
            EndoReward(pocket, unscored=odd)


def test_bad_input_is_refused_when_the_file_is_loaded(pocket):
    other = byte_tokenizer()
    other.name_or_path = "policy"
    with pytest.raises(
        EndoRewardError, match=r"the policy's vocabulary .policy, .* is not the reward model's .*pocket"
    ):
        EndoReward(pocket, other)
    with pytest.raises(EndoRewardError, match="gamma"):
        EndoReward(pocket, gamma=2.0)
    with pytest.raises(EndoRewardError, match=r"has no tokenizer: give one, EndoReward\(model, tokenizer\)"):
        EndoReward(EndoRewardModel(pocket.model))
    assert EndoReward(pocket, str(pocket_path())).reward.tokenizer.get_vocab() == pocket.tokenizer.get_vocab()


@pytest.mark.skipif(not INSTALLED, reason="OpenRLHF is not installed")
def test_openrlhfs_executor_accepts_the_rewards(pocket, tokenizer, tmp_path):
    """Cover its loader of the file, its threads, and the tensors it makes from the results."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    path = tmp_path / "reward.py"
    path.write_text(FILE)
    executor = SingleTurnAgentExecutor(str(path))
    responses = [ids(tokenizer, text) for text in ("5" + tokenizer.eos_token, "five", "5 and", "6")] * 4

    async def run(limit):
        params = SimpleNamespace(max_tokens=8, logprobs=None)
        calls = [executor.execute(PROMPT, "5", params, limit, tokenizer, Engine(r)) for r in responses]
        return await asyncio.gather(*calls)

    for limit in (64, len(ids(tokenizer, PROMPT)) + 8 - 2):  # complete, and truncated by two tokens
        for response, output in zip(responses, asyncio.run(run(limit)), strict=True):
            prompt = output["observation_tokens"][: output["action_ranges"][0][0]]
            wanted = sampled_rewards(pocket, prompt, response, {tokenizer.eos_token_id}).sum()
            torch.testing.assert_close(torch.tensor([output["reward"]]), wanted[None], rtol=1e-5, atol=5e-4)
            assert output["scores"] == output["reward"]
            assert all(value.numel() == 1 for value in output["extra_logs"].values())
