"""EndoGRPOMixin with TRL's GRPOTrainer: token-level advantages, and one forward for rewards and reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel, rewards_to_go
from endoreward_fast.integrations.advantages import token_advantages
from endoreward_fast.integrations.grpo import EndoGRPOMixin, _check_interface
from endoreward_fast.integrations.trl import EndoReward
from tiny_models import build, byte_tokenizer

trl = pytest.importorskip("trl", reason="TRL asks for Python 3.11")
from trl_harness import Keeping, Trainer, batch_of, grpo  # noqa: E402

ROOT = Path(__file__).parents[2]
NAN = float("nan")


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


def letters(completions, **columns):
    """A second reward function, unrelated to the first."""
    return [float(len(c[0]["content"]) if isinstance(c, list) else len(c)) for c in completions]


# ---------------------------------------------------------------- the formula
def by_hand(to_go, rewards, endo, weights, group, scale):
    """Compute token_advantages entry by entry."""
    n, width = to_go.shape
    numerator = [[0.0] * width for _ in range(n)]
    has = [[k for k in range(rewards.shape[1]) if rewards[i, k] == rewards[i, k]] for i in range(n)]
    total = [sum(float(weights[k] * rewards[i, k]) for k in has[i]) if has[i] else None for i in range(n)]
    rest = [
        sum(float(weights[k] * rewards[i, k]) for k in has[i] if k != endo) if set(has[i]) - {endo} else None
        for i in range(n)
    ]
    for i in range(n):
        members = range(i // group * group, i // group * group + group)
        for h in range(width):
            going = [float(to_go[j, h]) for j in members if endo in has[j] and to_go[j, h] == to_go[j, h]]
            if endo in has[i] and to_go[i, h] == to_go[i, h]:
                numerator[i][h] += float(weights[endo]) * (float(to_go[i, h]) - sum(going) / len(going))
            if rest[i] is not None:
                known = [rest[j] for j in members if rest[j] is not None]
                numerator[i][h] += rest[i] - sum(known) / len(known)
    out = torch.zeros(n, width, dtype=torch.float64)
    for i in range(n):
        over = range(i // group * group, i // group * group + group) if scale == "group" else range(n)
        counted = [j for j in over if total[j] is not None]
        if total[i] is None or (len(counted) < 2 and scale != "none"):
            continue
        spreads = [0.0]
        if scale != "none":
            spreads = [torch.tensor([total[j] for j in counted], dtype=torch.float64).std().item()]
            spreads += [(sum(numerator[j][h] ** 2 for j in counted) / (len(counted) - 1)) ** 0.5 for h in range(width)]
        for h in range(width):
            out[i, h] = numerator[i][h] / (max(spreads) + 1e-4) if scale != "none" else numerator[i][h]
    return out


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2), st.integers(0, 2**20),
    st.sampled_from(["group", "batch", "none"]),
)  # fmt: skip
def test_token_advantages_follow_the_formula(groups, group, width, others, seed, scale):
    g = torch.Generator().manual_seed(seed)
    n, functions = groups * group, others + 1
    to_go = torch.randn(n, width, generator=g)
    lengths = torch.randint(1, width + 1, (n, 1), generator=g)
    to_go[torch.arange(width) >= lengths] = NAN
    rewards = torch.randn(n, functions, generator=g)
    rewards[torch.rand(n, functions, generator=g) < 0.2] = NAN
    weights, endo = torch.rand(functions, generator=g) * 2, seed % functions
    found = token_advantages(to_go, rewards, endo=endo, weights=weights, group=group, scale=scale)
    expected = by_hand(to_go, rewards, endo, weights, group, scale)
    assert found.shape == to_go.shape and (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)


def test_a_reward_on_the_last_token_gives_grpos_advantage():
    score = torch.tensor([1.0, 2.0, 5.0, 0.0, 7.0, 7.5])
    grouped = score.view(2, 3)
    expected = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(6, 1)
    found = token_advantages(
        score[:, None].expand(6, 4), score[:, None], endo=0, weights=torch.ones(1), group=3, scale="group"
    )
    assert torch.allclose(found, expected.expand(6, 4), atol=1e-6)


@given(
    st.integers(0, 2**20), st.sampled_from([2, 4, 8]), st.integers(1, 12), st.integers(0, 1),
    st.sampled_from(["group", "batch", "none"]), st.sampled_from([0.0, 1e-6, 1e-3, 1.0]), st.sampled_from([1.0, 1e5]),
)  # fmt: skip
def test_token_advantages_have_grpos_bounds(seed, group, width, others, scale, tie, size):
    """The totals of a group are equal or nearly equal; its rewards-to-go differ by many nats."""
    g = torch.Generator().manual_seed(seed)
    n = 3 * group
    reward = torch.randn(n, width, generator=g) * size
    lengths = torch.randint(1, width + 1, (n, 1), generator=g)
    mask = torch.arange(width) < lengths
    wanted = torch.randn(3, generator=g).repeat_interleave(group) + tie * torch.randn(n, generator=g)
    reward[:, 0] += wanted - (reward * mask).sum(1)  # the totals of a group are nearly equal
    to_go = rewards_to_go(reward, mask).masked_fill(~mask, NAN)
    rewards = torch.cat([(reward * mask).sum(1, keepdim=True), torch.randn(n, others, generator=g)], 1)
    rewards[torch.rand(n, 1 + others, generator=g) < 0.1] = NAN
    found = token_advantages(to_go, rewards, endo=0, weights=torch.ones(1 + others), group=group, scale=scale)
    assert found.isfinite().all()
    if scale == "none":
        assert torch.allclose(found.double(), by_hand(to_go, rewards, 0, torch.ones(1 + others), group, scale), 1e-4)
        return
    given = (~rewards.isnan()).any(1)
    count = given.view(-1, group).sum(1).repeat_interleave(group)
    bound = (count - 1) / count.clamp(min=1) ** 0.5
    if scale == "batch":
        bound = torch.full_like(bound, ((group - 1) * (given.sum() - 1) / group) ** 0.5)
    assert (found.abs() <= bound[:, None].clamp(min=0) + 1e-6).all()


def test_equal_completions_have_no_advantage():
    to_go = torch.randn(5, generator=torch.Generator().manual_seed(1)).mul(1e3).expand(4, 5)
    found = token_advantages(to_go, to_go[:, :1], endo=0, weights=torch.ones(1), group=4, scale="group")
    assert found.eq(0).all()


# ---------------------------------------------------------------- in the trainer
def test_every_token_gets_the_advantage_of_its_rewards_to_go(tmp_path, pocket):
    trainer = grpo(Keeping, tmp_path, [EndoReward(pocket, gamma=0.9), letters], reward_weights=[1.0, 0.1])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    inputs = batch_of(trainer)
    batch = trainer._generate_and_score_completions(inputs)
    mask = batch["completion_mask"].bool()
    assert batch["advantages"].shape == mask.shape and mask.shape[1] > 2

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    scored = torch.cat([torch.zeros_like(batch["prompt_mask"], dtype=torch.bool), mask], 1)
    last = scored & ~torch.nn.functional.pad(scored[:, 1:], (0, 1))
    with torch.no_grad():
        reward = pocket(ids, attended, scored, terminal=last & (ids == pocket.tokenizer.eos_token_id)).reward
    reward = reward[:, -mask.shape[1] :]
    to_go = rewards_to_go(reward, mask, gamma=0.9).masked_fill(~mask, NAN)
    discount = torch.pow(0.9, torch.arange(mask.shape[1]))
    text = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = torch.stack([(reward * discount).sum(1), torch.tensor(letters(text))], 1)
    expected = by_hand(to_go, rewards, 0, torch.tensor([1.0, 0.1]), 4, "group")
    assert (batch["advantages"] - expected)[mask].abs().max() < 1e-3
    spread = batch["advantages"].masked_fill(~mask, NAN).nan_to_num(-1e9).amax(1) - batch["advantages"].amin(1)
    assert (spread > 0.1).any()  # the advantages differ from token to token

    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo"])
def test_every_loss_trains_on_token_advantages(tmp_path, pocket, loss):
    trainer = grpo(Trainer, tmp_path, EndoReward(pocket), loss_type=loss, max_steps=1)
    trainer.train()
    history = trainer.state.log_history[0]
    assert float(history["grad_norm"]) > 0 and float(history["rewards/endo_reward/std"]) > 0


def test_without_token_level_the_advantages_equal_the_trainers(tmp_path, pocket):
    ours = grpo(Trainer, tmp_path, EndoReward(pocket), options={"token_level": False})
    theirs = grpo(trl.GRPOTrainer, tmp_path, EndoReward(pocket))
    found = []
    for trainer in (ours, theirs):
        inputs = batch_of(trainer)
        torch.manual_seed(5)
        found.append(trainer._generate_and_score_completions(inputs)["advantages"])
    assert found[0].ndim == 1 and torch.equal(*found) and found[0].abs().max() > 0


# ---------------------------------------------------------------- one forward for rewards and reference
@pytest.mark.parametrize("truncated", [False, True])
def test_rewards_and_reference_come_from_one_forward(tmp_path, pocket, truncated):
    settings = {"mask_truncated_completions": truncated, "temperature": 2.5}  # some completions are truncated
    shared = grpo(Trainer, tmp_path, EndoReward(alpha=2.5), **settings)
    apart = grpo(Trainer, tmp_path, EndoReward(pocket, alpha=2.5), **settings)
    assert shared.shares_forward and not apart.shares_forward
    shared.endo_reward.scorer.obstacle_to_sharing()  # asks the model once
    batches, read = [], []
    shared.ref_model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    for trainer in (shared, apart):
        inputs = batch_of(trainer)
        torch.manual_seed(7)
        batches.append(trainer._generate_and_score_completions(inputs))
    ours, theirs = batches
    mask = theirs["completion_mask"].bool()
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    assert (ours["ref_per_token_logps"] - theirs["ref_per_token_logps"])[mask].abs().max() < 1e-4  # TRL's own
    assert (ours["advantages"] - theirs["advantages"])[mask].abs().max() < 1e-3
    assert not ours["ref_per_token_logps"].is_inference()
    hidden = not mask.any(1).all()
    whole = ours["prompt_ids"].numel() + ours["completion_ids"].numel()
    # Prefixes are read once. A second forward scores the completions that TRL hides.
    assert 0 < sum(read) <= whole * (1 + hidden) and hidden == truncated
    assert torch.equal(shared._rewards_per_func.isnan(), apart._rewards_per_func.isnan())
    assert (shared._rewards_per_func - apart._rewards_per_func).abs().max() < 1e-3


def test_a_shared_reference_trains(tmp_path):
    trainer = grpo(Trainer, tmp_path, EndoReward(alpha=1.5), max_steps=4)
    frozen = [p.detach().clone() for p in trainer.ref_model.parameters()]
    trainer.train()
    first, *_, last = trainer.state.log_history[:4]
    assert abs(first["kl"]) < 1e-5 and last["kl"] > 1e-3  # the reference stays the initial policy
    assert all(torch.equal(a, b) for a, b in zip(frozen, trainer.ref_model.parameters(), strict=True))
    assert {"endo_reward/token", "endo_reward/first_value", "endo_reward/length"} <= set(first)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "reward, settings, options, words",
    [
        (lambda p: letters, {}, {}, "exactly one EndoReward in reward_funcs, found 0"),
        (lambda p: [EndoReward(p), EndoReward(p)], {}, {}, "found 2"),
        (lambda p: EndoReward(p, reduction="mean"), {}, {}, "token_level=False"),
        (lambda p: EndoReward(p, floor=0.1), {}, {}, "token_level=False"),
        (lambda p: EndoReward(p), {"multi_objective_aggregation": "normalize_then_sum"}, {}, "sum_then_normalize"),
        (lambda p: EndoReward(), {"beta": 0.0}, {}, "beta above 0"),
        (lambda p: EndoReward(), {"temperature": 0.7}, {}, "alpha=1.0 is not the trainer's temperature=0.7"),
        (lambda p: EndoReward(alpha=1.5), {"sync_ref_model": True}, {}, "sync_ref_model"),
        (lambda p: EndoReward(alpha=1.5, system="Be kind."), {}, {}, "system prompt"),
    ],
)
def test_an_unsupported_configuration_raises_one_line(tmp_path, pocket, reward, settings, options, words):
    with pytest.raises(EndoRewardError, match=words) as refusal:
        grpo(Trainer, tmp_path, reward(pocket), options=options, **settings)
    assert "\n" not in str(refusal.value)


def test_the_policy_itself_is_refused_as_reward_model(tmp_path, pocket):
    trainer = grpo(trl.GRPOTrainer, tmp_path, EndoReward(pocket))
    policy = EndoRewardModel(trainer.model, trainer.processing_class)
    with pytest.raises(EndoRewardError, match="being trained"):
        Trainer(
            trainer.model, reward_funcs=[EndoReward(policy)], args=trainer.args, train_dataset=trainer.train_dataset
        )


def test_images_and_another_vocabulary_are_refused_before_training(tmp_path, pocket):
    trainer = grpo(trl.GRPOTrainer, tmp_path, EndoReward(pocket), beta=0.01)
    other = EndoReward(EndoRewardModel(build(LlamaConfig), byte_tokenizer()))
    common = {"args": trainer.args, "train_dataset": trainer.train_dataset}
    with pytest.raises(EndoRewardError, match=r"vocabulary .* 1024 tokens\) is not"):
        Trainer(trainer.model, reward_funcs=[other], **common)

    class Seeing(Trainer):
        _is_vlm = property(lambda self: True, lambda self, value: None)

    with pytest.raises(EndoRewardError, match="one pass reads token ids, no images"):
        Seeing(trainer.model, reward_funcs=[EndoReward()], **common)


def test_a_changed_trainer_interface_raises_the_methods_name():
    class Other:
        def _calculate_rewards(self, inputs, prompts, completions): ...

    class Mixed(EndoGRPOMixin, Other):
        pass

    with pytest.raises(EndoRewardError, match=r"TRL .* _calculate_rewards takes \(inputs, prompts, completions\)"):
        _check_interface(Mixed)
    with pytest.raises(EndoRewardError, match="_calculate_rewards is missing"):
        _check_interface(type("Bare", (EndoGRPOMixin,), {}))
    _check_interface(Trainer)


# ---------------------------------------------------------------- groups that span processes
TWO = """
import os, sys, torch
from trl_harness import Keeping, batch_of, grpo
from endoreward_fast.integrations.monitor import CollapseMonitor
from endoreward_fast.integrations.trl import EndoReward

watched = CollapseMonitor().watch(EndoReward("pocket"))
trainer = grpo(Keeping, sys.argv[1], watched, per_device_train_batch_size=2)
batch = trainer._generate_and_score_completions(batch_of(trainer))
kept = {k: batch[k] for k in ("advantages", "completion_mask")} | {"scored": trainer._scored._asdict()}
kept |= {"metrics": dict(trainer._metrics["train"]), "texts": [c[-1]["content"] for c in trainer._logs["completion"]]}
torch.save(kept, f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
"""


def test_a_group_may_span_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    path = os.pathsep.join([str(ROOT / "tests" / "harness"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1)]
    width = max(r["scored"]["mask"].shape[1] for r in ranks)

    def joined(name, fill):
        rows = [torch.nn.functional.pad(r["scored"][name], (0, width - r["scored"][name].shape[1])) for r in ranks]
        return torch.cat(rows)

    reward, mask = joined("reward", 0.0), joined("mask", False)  # one group of four: two on each process
    to_go = rewards_to_go(reward, mask).masked_fill(~mask, NAN)
    expected = by_hand(to_go, reward.sum(1, keepdim=True), 0, torch.ones(1), 4, "group")
    texts = [text.strip() for text in ranks[0]["texts"]]
    for rank, part in zip(ranks, expected.split(2), strict=True):
        own = rank["completion_mask"].bool()
        assert rank["metrics"]["collapse/majority"] == [max(map(texts.count, texts)) / 4]  # on both, of all four
        assert rank["metrics"]["collapse/reward"] == [pytest.approx(reward.sum(1).mean().item(), abs=1e-3)]
        assert (rank["advantages"] - part[:, : own.shape[1]])[own].abs().max() < 1e-4
