"""The functions that slime's options name: with recorded samples, and called by slime where it is installed.

slime is installed from its source and needs SGLang and Megatron to run, so the usual environment lacks it.
"""

import asyncio
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.integrations import slime as integration
from endoreward_fast.integrations.slime import advantages, custom_rm, log_rollout, post_process_rewards
from endoreward_fast.integrations.token_level import group_advantages
from endoreward_fast.model.checkpoint import pocket_path
from tiny_models import sampled_rewards
from trainer_contracts import SLIME, needs, sample, slime_args

PATH = str(pocket_path())
REAL = pytest.param(True, marks=needs(SLIME), id="slime")
SOURCES = pytest.mark.parametrize("real", [pytest.param(False, id="recorded"), REAL])
PER_TOKEN = "endoreward_fast.integrations.slime.advantages"


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.fixture(scope="module")
def eos(pocket):
    return pocket.tokenizer.eos_token_id


def samples(eos, real=False):
    """A complete, a cut and a two-turn response to one prompt, and one to another prompt."""
    rows = [
        ([5, 6], [7, 8, eos], None),
        ([5, 6], [9, 10], None),
        ([5, 6], [7, 11, 12, 13, eos], [1, 0, 0, 1, 1]),
        ([14], [15, eos], None),
    ]
    return [
        sample(p, r, real=real, loss_mask=mask, index=n, group_index=int(n == 3)) for n, (p, r, mask) in enumerate(rows)
    ]


def wanted(pocket, one):
    own = one.loss_mask or [1] * one.response_length
    prompt, response = one.tokens[: -one.response_length], one.tokens[-one.response_length :]
    ends = {pocket.tokenizer.eos_token_id} if own[-1] else ()
    return sampled_rewards(pocket, prompt, response, ends) * torch.tensor(own)


def ask(args, group, real=False):
    """Score a group as slime does with --group-rm, and give each sample its reward."""
    if real:
        from slime.rollout.rm_hub import batched_async_rm

        found = asyncio.run(batched_async_rm(args, group))
    else:
        found = asyncio.run(custom_rm(args, group))
    for one, reward in zip(group, found, strict=True):
        one.reward = reward
    return found


@SOURCES
def test_scores_and_token_rewards_equal_the_oracles_in_order(pocket, eos, real):
    group = samples(eos, real)
    found = ask(slime_args(PATH), group, real)
    for one, score in zip(group, found, strict=True):
        rewards = wanted(pocket, one)
        assert score == pytest.approx(rewards.sum().item(), abs=5e-4)
        kept = one.metadata["endo_reward"]
        torch.testing.assert_close(torch.tensor(kept["rewards"]), rewards, rtol=1e-4, atol=5e-4)
        assert kept["error"] is None and kept["length"] == sum(one.loss_mask or [1] * one.response_length)
    json.dumps([one.metadata for one in group])  # slime stores samples


@SOURCES
def test_single_samples_are_asked_for_at_the_same_time(pocket, eos, real):
    group = samples(eos, real)
    if real:
        from slime.rollout.rm_hub import async_rm
    else:
        async_rm = custom_rm

    async def together():
        return await asyncio.gather(*(async_rm(slime_args(PATH), one) for one in group))

    found = asyncio.run(together())
    assert found == pytest.approx([wanted(pocket, one).sum().item() for one in group], abs=5e-4)


def test_options_come_from_slimes_own_configuration(pocket, eos):
    options = {"model": "pocket", "reduction": "mean", "gamma": 0.5}
    args = slime_args("no/such/model", endo_reward=options)
    args.reward_key = "endo"
    [one] = group = samples(eos)[:1]
    [found] = ask(args, group)
    rewards = wanted(pocket, one) * torch.tensor([1.0, 0.5, 0.25]) / 3
    assert found == {"endo": pytest.approx(rewards.sum().item(), abs=5e-4)}
    assert one.get_reward_value(args) == found["endo"]
    for bad, words in (
        ({"gama": 1}, "endo_reward.gama: expected one of"),
        ({"scale": "batch"}, "'batch': expected one of group"),
        ("pocket", "endo_reward is a str: expected options, as in endo_reward: {model: NAME}"),
        ({"model": ["pocket"]}, "endo_reward.model is a list: expected a name or folder"),
    ):
        with pytest.raises(EndoRewardError, match=words):
            ask(slime_args(PATH, endo_reward=bad), group)


@pytest.mark.filterwarnings("ignore:a completion gets reward")
@SOURCES
def test_samples_without_a_reward_do_not_lose_the_others(pocket, eos, real):
    bad = [
        sample([5, 6], [], real=real),
        sample([5, 6], [7] * pocket.max_positions, real=real, status="truncated"),
        sample([5, 6], [10**6, eos], real=real),
        sample([5, 6], [7, 8], real=real, loss_mask=[0, 0]),
        sample([5, 6], [7, 8], real=real, loss_mask=[1]),
        sample([5, 6], [7, 8], real=real, multimodal_inputs={"images": [1]}),
    ]
    aborted = sample([5, 6], [7], real=real, status="aborted")
    good = samples(eos, real)[:3]
    found = ask(slime_args(PATH), [*bad, aborted, *good], real)
    assert found[:6] == [-1e6] * 6 and found[6] is None and aborted.metadata == {}
    assert found[7:] == pytest.approx([wanted(pocket, one).sum().item() for one in good], abs=5e-4)
    reasons = [one.metadata["endo_reward"]["error"] for one in bad]
    for reason, words in zip(
        reasons, ("empty", "limit is", "vocabulary", "no token", "1 entries for 2", "images"), strict=True
    ):
        assert words in reason
    assert [len(one.metadata["endo_reward"]["rewards"]) for one in bad[:4]] == [0, pocket.max_positions, 2, 2]


@pytest.mark.filterwarnings("ignore:a completion gets reward")
@SOURCES
def test_token_advantages_reach_the_trainers(pocket, eos, real):
    group = samples(eos, real)
    lost = sample([5, 6], [7, 8], real=real, loss_mask=[0, 0], index=4, group_index=0)
    unknown = sample([5, 6], [10**6, eos], real=real, index=5, group_index=0)
    group[1:1] = [lost]  # groups need not be consecutive, nor of one size
    group.append(unknown)
    args = slime_args(PATH, endo_reward={"scale": "none"})
    ask(args, group, real)
    args.custom_advantage_function_path = PER_TOKEN
    raw, rewards = post_process_rewards(args, group)
    assert raw == [one.reward for one in group] and rewards[1].tolist() == rewards[5].tolist() == [0, 0]
    same = [group[0], group[2], group[3]]
    mine = [[r for r in wanted(pocket, one).tolist() if r] for one in same]
    expected = group_advantages(mine, [3, 2, 3], scale="none")
    two_turns = rewards[3]
    assert two_turns[1:3].tolist() == [0, 0] and two_turns[[0, 3, 4]].tolist() == pytest.approx(expected[2], abs=1e-3)
    assert rewards[0].tolist() == pytest.approx(expected[0], abs=1e-3)
    assert rewards[4].tolist() == [0, 0]  # the only one of its group

    data = {
        "rewards": rewards, "kl": [torch.zeros(len(r)) for r in rewards],
        "total_lengths": [len(one.tokens) for one in group], "response_lengths": [len(r) for r in rewards],
    }  # fmt: skip
    advantages(args, data)
    assert all(torch.equal(a, b) for a, b in zip(data["advantages"], rewards, strict=True))
    assert data["returns"] is not data["advantages"] and torch.equal(data["returns"][0], rewards[0])


def test_functions_without_each_other_are_named(eos):
    group = samples(eos)
    with pytest.raises(EndoRewardError, match="set --custom-advantage-function-path"):
        post_process_rewards(slime_args(PATH), group)
    args = slime_args(PATH)
    args.custom_advantage_function_path = PER_TOKEN
    with pytest.raises(EndoRewardError, match="sample 0 has no endogenous reward: set --custom-rm-path"):
        post_process_rewards(args, group)
    ask(args, group)
    group[0].group_index = None
    with pytest.raises(EndoRewardError, match="sample 0 has no group_index"):
        post_process_rewards(args, group)
    data = {"rewards": [1.0], "kl": [torch.zeros(2)], "total_lengths": [3], "response_lengths": [2]}
    with pytest.raises(EndoRewardError, match="set --custom-reward-post-process-path"):
        advantages(args, data)


def test_context_parallel_parts_are_taken_by_slimes_rule(monkeypatch):
    """A process holds two of a sequence's tokens. slime's rule says which."""
    asked = []

    def cut(values, total, length):
        asked.append((total, length))
        return values[1:3]

    names = "slime", "slime.backends", "slime.backends.megatron_utils", "slime.backends.megatron_utils.cp_utils"
    for name in names:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(slice_log_prob_with_cp=cut, __path__=[]))
    data = {"rewards": [torch.arange(4.0)], "kl": [torch.zeros(2)], "total_lengths": [7], "response_lengths": [4]}
    advantages(None, data)
    assert data["advantages"][0].tolist() == [1, 2] and asked == [(7, 4)]
    with pytest.raises(EndoRewardError, match="2 advantages for 3 log-probabilities of a response of 4 tokens"):
        advantages(None, data | {"kl": [torch.zeros(3)]})


def test_metrics_join_the_rollouts(eos):
    group, metrics = samples(eos), {"rollout/x": 1.0}
    assert log_rollout(0, None, group, metrics, 1.0) is False and metrics == {"rollout/x": 1.0}
    ask(slime_args(PATH), group)
    group[0].metadata["endo_reward"]["unscored"] = 1.0
    assert log_rollout(0, None, group, metrics, 1.0) is False and log_rollout(0, None, group, None, 1.0) is False
    kept = [one.metadata["endo_reward"] for one in group[1:]]
    assert metrics["endo_reward/unscored"] == 1 and metrics["endo_reward/length"] == (2 + 3 + 2) / 3
    assert metrics["endo_reward/token"] == pytest.approx(sum(k["token"] for k in kept) / 3)


def test_the_model_is_loaded_once(eos, monkeypatch):
    made = []
    integration._reward.cache_clear()

    def slowly(**options):
        time.sleep(0.02)
        made.append(options)

    monkeypatch.setattr(integration, "BatchedReward", slowly)

    async def together():
        await asyncio.gather(*(asyncio.to_thread(integration._loaded, slime_args(PATH)) for _ in range(8)))

    asyncio.run(together())
    integration._reward.cache_clear()
    assert made == [{"model": PATH}]


@needs(SLIME)
@pytest.mark.parametrize("group_rm", [False, True])
def test_slimes_own_rollout_asks_for_rewards(pocket, eos, group_rm, monkeypatch):
    """slime's rollout of a group, with a generate function in place of SGLang. One of its samples is aborted."""
    from slime.rollout.sglang_rollout import generate_and_rm_group
    from slime.utils.types import Sample

    async def generate(args, one, sampling_params):
        one.tokens, one.response_length = [5, 6, 7, 8 + one.index, eos], 3
        one.status = Sample.Status.ABORTED if one.index == 1 else Sample.Status.COMPLETED
        return one

    monkeypatch.setitem(sys.modules, "generating", SimpleNamespace(generate=generate))
    args = slime_args(
        PATH, sglang_server_concurrency=8, rollout_num_engines=1, sglang_dp_size=1, rollout_temperature=1.0,
        rollout_top_p=1.0, rollout_top_k=-1, rollout_max_response_len=8, rollout_stop=None, rollout_stop_token_ids=None,
        rollout_skip_special_tokens=False, partial_rollout=False, mask_offpolicy_in_partial_rollout=False,
        custom_generate_function_path="generating.generate", rollout_num_gpus=1, rollout_num_gpus_per_engine=1,
    )  # fmt: skip
    args.group_rm = group_rm
    group = [Sample(index=n, group_index=0) for n in range(3)]
    done = asyncio.run(generate_and_rm_group(args, group, {}))
    assert [one.index for one in done] == [0, 1, 2] and done[1].reward is None
    for one in (done[0], done[2]):
        assert one.reward == pytest.approx(wanted(pocket, one).sum().item(), abs=5e-4)
