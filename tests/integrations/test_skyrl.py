"""EndoGenerator around a recorded generator, and SkyRL's own code on its output where SkyRL is installed.

skyrl 0.3.0 needs Ray, Python 3.12 (with the present pydantic) and transformers before 5.9, so the usual environment
lacks it.
"""

import asyncio

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.integrations.advantages import token_advantages
from endoreward_fast.integrations.skyrl import EndoGenerator, token_level_advantages
from tiny_models import EOS, TOKENIZER, build, sampled_rewards
from trainer_contracts import SKYRL, Generated, generator_input, generator_output, needs

# complete; cut; two turns with an observation between them; ended by SkyRL, which appended the end token
ROWS = [
    ([1, 2], [3, 4, EOS], [1, 1, 1]),
    ([1, 2], [5, 6], [1, 1]),
    ([1, 2], [3, 7, 8, 9, EOS], [1, 0, 0, 1, 1]),
    ([1], [4, EOS], [1, 0]),
]
PROMPTS = ["a", "a", "a", "b"]


@pytest.fixture(scope="module")
def scorer():
    return EndoRewardModel(build(LlamaConfig), TOKENIZER)


def wanted(scorer, prompt, response, mask):
    """Token rewards by the oracle, 0 off the mask."""
    return sampled_rewards(scorer, prompt, response, {EOS} if mask[-1] else ()) * torch.tensor(mask)


def generate(scorer, rows=ROWS, prompts=PROMPTS, rewards=None, phase="train", options=None, **more):
    inner = Generated(generator_output(rows, rewards or [0.0] * len(rows), **more))
    asked = generator_input(prompts, phase)
    output = asyncio.run(EndoGenerator(inner, scorer, **options or {}).generate(asked))
    assert inner.calls == [asked]
    return output


def test_token_rewards_equal_the_oracles_in_order(scorer):
    output = generate(scorer)
    for row, rewards in zip(ROWS, output["rewards"], strict=True):
        torch.testing.assert_close(torch.tensor(rewards), wanted(scorer, *row), rtol=1e-4, atol=1e-3)
    metrics = output["rollout_metrics"]
    assert metrics["generate/x"] == 1 and metrics["endo_reward/unscored"] == 0
    assert metrics["endo_reward/length"] == sum(sum(mask) for _, _, mask in ROWS) / 4
    assert output["response_ids"] == [r for _, r, _ in ROWS] and output["loss_masks"] == [m for _, _, m in ROWS]


def test_each_token_gets_its_part_of_the_score(scorer):
    plain, discounted = generate(scorer), generate(scorer, options={"gamma": 0.5, "reduction": "mean"})
    two_turns = torch.tensor(plain["rewards"][2]) * torch.tensor([1.0, 0, 0, 0.5, 0.25]) / 3
    torch.testing.assert_close(torch.tensor(discounted["rewards"][2]), two_turns, rtol=1e-4, atol=1e-4)


def test_the_environments_rewards_are_added_where_they_are(scorer):
    plain = generate(scorer)["rewards"]
    for theirs in ([1.0] * 4, [[0.0, 0.0, 1.0], [0.0, 1.0], [0.5, 0.0, 0.0, 0.0, 0.5], [0.0, 1.0]]):
        found = generate(scorer, rewards=theirs, options={"environment": 2.0})["rewards"]
        for mine, both, one in zip(plain, found, theirs, strict=True):
            added = one if isinstance(one, list) else [0.0] * (len(mine) - 1) + [one]
            assert both == pytest.approx([m + 2 * value for m, value in zip(mine, added, strict=True)], abs=1e-4)


@pytest.mark.filterwarnings("ignore:a completion gets reward")
def test_an_unscored_trajectory_leaves_the_loss_and_does_not_move_its_group(scorer):
    bad = [
        ([1, 2], [3] * scorer.max_positions, [1] * scorer.max_positions),
        ([1, 2], [10**6, EOS], [1, 1]),
        ([1, 2], [3, 4], [0, 0]),  # masked by SkyRL, apply_overlong_filtering
        ([1, 2], [3, 4, 5], [1, 1]),
        ([1, 2], [], []),
    ]
    output = generate(scorer, [*bad, *ROWS], ["a"] * 4 + ["c", *PROMPTS])
    scores = [sum(wanted(scorer, *row)).item() for row in ROWS]
    for (_, response, _), rewards, mask in zip(bad[:4], output["rewards"], output["loss_masks"], strict=False):
        assert len(rewards) == len(response) and not any(mask) and not any(rewards[:-1])
        assert rewards[-1] == pytest.approx(sum(scores[:3]) / 3, rel=1e-4)
    assert output["rewards"][4] == [] and output["rollout_metrics"]["endo_reward/unscored"] == 5
    for row, rewards, mask in zip(ROWS, output["rewards"][5:], output["loss_masks"][5:], strict=True):
        assert sum(rewards) == pytest.approx(sum(wanted(scorer, *row)).item(), rel=1e-4) and mask == row[2]


def test_a_group_without_any_score_gets_zero(scorer):
    with pytest.warns(UserWarning, match="no token of the completion is marked"):
        output = generate(scorer, [([1, 2], [3, 4], [0, 0])], ["a"])
    assert output["rewards"] == [[0.0, 0.0]]


def test_evaluation_keeps_the_environments_rewards(scorer):
    assert generate(scorer, rewards=[1.0, 0.0, 1.0, 0.0], phase="eval")["rewards"] == [1.0, 0.0, 1.0, 0.0]


def test_what_skyrl_would_not_read_is_refused(scorer):
    with pytest.raises(EndoRewardError, match="step_wise_trajectories=false"):
        generate(scorer, is_last_step=[False, True, True, True])
    with pytest.raises(EndoRewardError, match="no images"):
        generate(scorer, pixel_values=[None, torch.zeros(1), None, None])
    generate(scorer, is_last_step=[True] * 4, pixel_values=None)
    for weight in ("1", None, float("nan")):
        with pytest.raises(EndoRewardError, match=r"environment=.*: expected a finite number"):
            EndoGenerator(None, scorer, environment=weight)


def test_what_lies_off_the_mask_does_not_reach_the_advantages():
    rewards, mask = torch.tensor([[1.0, 9.0], [2.0, 3.0]]), torch.tensor([[1, 0], [1, 1]])
    odd = rewards.masked_fill(mask == 0, torch.nan)
    for mine, theirs in zip(*(token_level_advantages(r, mask, ["a", "a"]) for r in (odd, rewards)), strict=True):
        assert torch.equal(mine, theirs) and mine[1, 0] != 0


def test_the_estimator_gives_every_token_the_advantage_within_its_group():
    rewards = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [5.0, 1.0, 1.0], [0.0, 2.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    index = np.array(["a", "b", "a", "b"])
    advantages, returns = token_level_advantages(
        token_level_rewards=rewards, response_mask=mask, index=index, values=None
    )
    assert returns.tolist() == [[3, 2, 0], [3, 0, 0], [7, 2, 1], [2, 2, 0]]
    for rows in ([0, 2], [1, 3]):
        to_go = returns[rows].masked_fill(mask[rows] == 0, torch.nan)
        one = token_advantages(
            to_go, rewards[rows].sum(1, keepdim=True), endo=0, weights=torch.ones(1), group=2, scale="group"
        )
        torch.testing.assert_close(advantages[rows], one * mask[rows])
    plain, _ = token_level_advantages(rewards, mask, index, grpo_norm_by_std=False)
    assert plain[0].tolist() == [-2, 0, 0] and plain[2].tolist() == [2, 0, 0]
    assert token_level_advantages(rewards, mask, index, gamma=0.5)[1][2, 0] == 5 + 0.5 * (1 + 0.5)


@needs(SKYRL)
def test_skyrls_own_checks_and_estimators_take_the_output(scorer):
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry, compute_advantages_and_returns
    from skyrl.train.generators.base import GeneratorInterface
    from skyrl.train.generators.utils import get_metrics_from_generator_output
    from skyrl.train.utils.trainer_utils import validate_generator_output

    class Theirs(Generated, GeneratorInterface):
        pass

    inner = Theirs(generator_output(ROWS, [0.0] * 4))
    output = asyncio.run(EndoGenerator(inner, scorer).generate(generator_input(PROMPTS)))
    validate_generator_output(4, output)
    scores = [sum(wanted(scorer, *row)).item() for row in ROWS]
    metrics = get_metrics_from_generator_output(output, PROMPTS)
    assert metrics["avg_score"] == pytest.approx(sum(scores) / 4, rel=1e-4)
    width = max(map(len, output["rewards"]))
    rewards = torch.tensor([row + [0.0] * (width - len(row)) for row in output["rewards"]])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in output["rewards"]])
    registry = AdvantageEstimatorRegistry
    registry.register("endo_token_level", token_level_advantages)
    found = {
        name: compute_advantages_and_returns(rewards, mask, np.array(PROMPTS), name, None)[0]
        for name in ("grpo", "endo_token_level")
    }
    registry.unregister("endo_token_level")
    centred = torch.tensor(scores[:3]) - sum(scores[:3]) / 3
    torch.testing.assert_close(found["grpo"][:3, 0], centred / centred.norm() * 2**0.5, rtol=1e-3, atol=1e-4)
    assert (found["endo_token_level"][mask == 0] == 0).all() and found["endo_token_level"][:3, 0].sum().abs() < 1e-4


@needs(SKYRL)
def test_skyrls_trainer_takes_token_rewards(scorer):
    from types import SimpleNamespace

    from skyrl.train.trainer import RayPPOTrainer

    output = generate(scorer)
    generator = SimpleNamespace(step_wise_trajectories=False, merge_stepwise_output=False, n_samples_per_prompt=3)
    trainer = SimpleNamespace(cfg=SimpleNamespace(generator=generator), all_metrics={})
    found, _ = RayPPOTrainer.postprocess_generator_output(trainer, dict(output), PROMPTS)
    assert found["rewards"] == output["rewards"]


@needs(SKYRL)
def test_skyrls_own_generator_is_wrapped_in_two_turns():
    """SkyRLGymGenerator with the embedded model's tokenizer, an environment of two turns, and a stand-in for vLLM."""
    from types import SimpleNamespace

    import skyrl_gym
    from skyrl.train.config import GeneratorConfig
    from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
    from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

    pocket = EndoRewardModel.from_pretrained("pocket")
    eos = pocket.tokenizer.eos_token_id

    class Twice(BaseTextEnv):
        def __init__(self, **_):
            super().__init__()
            self.asked = 0

        def step(self, action):
            self.asked += 1
            seen = [{"role": "user", "content": "And 2 + 2?"}] if self.asked == 1 else []
            return BaseTextEnvStepOutput(observations=seen, reward=0.5, done=self.asked == 2, metadata={})

    class Engine:
        async def generate(self, asked, model=None):
            ids = [7, 8, eos]
            return {"responses": ["x"], "stop_reasons": ["stop"], "response_logprobs": None, "response_ids": [ids]}

        async def finish_session(self, session_id):
            pass

    skyrl_gym.register(id="twice", entry_point=Twice)  # in this process alone
    cfg = GeneratorConfig(batched=False, max_turns=2, use_conversation_multi_turn=True, max_input_length=512)
    cfg.sampling_params.logprobs = None
    inner = SkyRLGymGenerator(cfg, SimpleNamespace(max_env_workers=0), Engine(), pocket.tokenizer)
    asked = generator_input(["a", "a"]) | {
        "env_classes": ["twice"] * 2,
        "env_extras": [{}] * 2,
        "sampling_params": None,
    }
    output = asyncio.run(EndoGenerator(inner, pocket).generate(asked))
    fields = ("rewards", "prompt_token_ids", "response_ids", "loss_masks")
    for rewards, prompt, response, mask in zip(*(output[name] for name in fields), strict=True):
        assert mask[:4] == [1, 1, 1, 0] and mask[-3:] == [1, 1, 1]  # two turns, the observation between them
        theirs = sampled_rewards(pocket, prompt, response, {eos}) * torch.tensor(mask)
        torch.testing.assert_close(torch.tensor(rewards), theirs, rtol=1e-4, atol=1e-3)
