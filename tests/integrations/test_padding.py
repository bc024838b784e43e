"""EndoGRPOMixin's shared forward is right for a policy that counts TRL's left padding as positions."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from endoreward_fast import EndoRewardModel
from endoreward_fast.integrations.trl import EndoReward
from endoreward_fast.model.batch_layout import PaddingLast
from endoreward_fast.vocab.reference import token_rewards as oracle
from tiny_models import EOS, TOKENIZER, VOCAB, build, gpt2, same

trl = pytest.importorskip("trl", reason="TRL asks for Python 3.11")
from trl_harness import SETTINGS, Keeping, batch_of  # noqa: E402

PROMPTS = ["a", "What is 2 + 3?", "b" * 40, "xy"]


def in_double(model, ids, start):
    """Return (rewards, log-probabilities) of ids[start:], from a forward of this row alone in float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits
    mask = (torch.arange(len(ids)) >= start)[None]
    ends = torch.zeros_like(mask)
    ends[0, -1] = ids[-1] == EOS
    found = oracle(logits, ids[None], mask=mask, terminal=ends)
    return found.reward[0, start:], found.logprob[0, start:]


@pytest.mark.parametrize("kind", [gpt2, lambda: build(LlamaConfig)], ids=["gpt2", "llama"])
def test_prompts_of_different_lengths_are_read_as_if_alone(tmp_path, kind):
    kind().save_pretrained(tmp_path / "policy")
    TOKENIZER.save_pretrained(tmp_path / "policy")
    settings = SETTINGS | {"temperature": 1.0, "num_generations": 2, "disable_dropout": True}
    args = trl.GRPOConfig(output_dir=str(tmp_path), **settings)
    rows = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    trainer = Keeping(str(tmp_path / "policy"), reward_funcs=[EndoReward()], args=args, train_dataset=rows)
    assert trainer.counts_from_padding == (kind is gpt2)
    batch = trainer._generate_and_score_completions(batch_of(trainer))
    assert len(set(batch["prompt_mask"].sum(1).tolist())) == len(PROMPTS)
    inputs = (torch.cat([batch[f"prompt_{n}"], batch[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    with torch.no_grad():
        policy, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, *inputs, batch["completion_ids"].shape[1], compute_entropy=True
        )
    assert entropy.shape == policy.shape
    for i in range(len(policy)):
        prompt, ids = (batch[f"{n}_ids"][i][batch[f"{n}_mask"][i].bool()] for n in ("prompt", "completion"))
        reward, logprob = in_double(trainer.ref_model, torch.cat([prompt, ids]), len(prompt))
        assert (trainer._scored.reward[i, : len(ids)] - reward).abs().max() < 1e-4
        assert trainer._rewards_per_func[i, 0].item() == pytest.approx(reward.sum().item(), abs=1e-3)
        for found in (batch["ref_per_token_logps"], policy):
            assert (found[i, : len(ids)] - logprob).abs().max() < 1e-4
    trainer.train()
    assert abs(trainer.state.log_history[0]["kl"]) < 1e-5  # policy and reference start as the same model


@pytest.mark.parametrize(
    "model",
    [
        gpt2,
        lambda: AutoModelForCausalLM.from_config(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)),
    ],
    ids=["gpt2", "mamba"],
)
def test_padding_on_the_left_is_moved_to_the_right(model):
    """A recurrent model takes no positions, so only the side of the padding matters."""
    scorer = EndoRewardModel(model())
    rows = [torch.arange(n) + n for n in (5, 128, 9)]  # 128 is the length of the position table
    width = 140
    ids, attended = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - 3 - len(row) : width - 3], attended[i, width - 3 - len(row) : width - 3] = row, 1
    scored = attended.bool() & ~(attended.cumsum(1) == 1)
    with torch.no_grad():
        found = scorer.rewards_of_padded(
            ids, scored, torch.zeros_like(scored), attention_mask=attended, entropy=True
        )  # fmt: skip
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = scorer.model(input_ids=row[None]).logits
        alone = oracle(logits, row[None], terminal=torch.zeros(1, len(row), dtype=torch.bool), entropy=True)
        same(type(found)(*(x[i][attended[i].bool()][None] for x in found)), alone)
        assert all(x[i][~attended[i].bool()].eq(0).all() for x in found)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.filterwarnings("ignore:.*reads every row whole")
def test_a_prompt_of_several_rows_padded_on_the_left_is_read_once(cache):
    """As in GRPO: two prompts of unequal length, four completions each, one of them empty, two of them equal."""
    scorer = EndoRewardModel(gpt2())
    if not cache:
        scorer.model.compile()  # which keeps a model from being read behind a cache
        scorer.model._compiled_call_impl = scorer.model._call_impl
    prompts, completions = ([*range(5, 35)], [*range(40, 60)]), ([7, 8], [9], [], [7, 8])
    rows = [(prompt, completion) for prompt in prompts for completion in completions]
    ids, attended = torch.zeros(8, 32, dtype=torch.long), torch.zeros(8, 32, dtype=torch.long)
    scored = torch.zeros(8, 32, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        start = 30 - len(prompt)
        ids[i, start : 30 + len(completion)] = torch.tensor(prompt + completion)
        attended[i, start : 30 + len(completion)] = 1
        scored[i, 30 : 30 + len(completion)] = True
    inputs = (ids, scored, torch.zeros_like(scored))
    with torch.enable_grad():
        wanted = scorer.rewards_of_padded(*inputs, attention_mask=attended)  # nothing is shared
    scorer.obstacle_to_sharing()
    read = []
    scorer.model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"]), with_kwargs=True)
    with torch.no_grad():
        found = scorer.rewards_of_padded(*inputs, attention_mask=attended)
    for ours, expected in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-4)
    computed = sum(x.numel() for x in read)
    assert computed <= (90 if cache else 130) < ids.numel()  # padding included


def test_rows_are_moved_and_moved_back():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
    ids = torch.arange(12).view(3, 4)
    rows = PaddingLast(mask)
    assert rows.move(ids).tolist() == [[1, 2, 0], [4, 5, 6], [11, 8, 9]]
    assert (rows.back(rows.move(ids)) == ids)[mask.bool()].all() and rows.back(ids[:, :3]).shape == mask.shape
