"""Tools in TRL's GRPOTrainer: the reward model reads the policy's prompts, and answers of tools have no reward."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.integrations.trl import EndoReward
from tiny_models import EOS, build, byte_tokenizer, sampled_rewards

trl = pytest.importorskip("trl", reason="TRL asks for Python 3.11")
from trl_harness import SETTINGS, Keeping, batch_of  # noqa: E402

# ChatML with one byte for each token. The tests hold for any template that renders tools.
CHATML = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% if mood %}<{{ mood }}>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "double", "arguments": {"n": 4}}}]


def double(n: int) -> int:
    """
    Doubles a number.

    Args:
        n: the number
    """
    return 2 * n


class Room:
    """An environment with one tool."""

    def reset(self, **_):
        return "the door is shut"

    def push(self, force: int) -> str:
        """
        Pushes the door.

        Args:
            force: how hard
        """
        return "open"


class Calling:
    """Call the tool in the first turn of every other completion, whatever the prompt."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        tokenizer = self.processing_class
        for i in range(0, len(ids), 2):
            if "<tool>" not in tokenizer.decode(prompt_ids[i]):  # no tool has answered yet
                ids[i] = [*tokenizer("<call>")["input_ids"], EOS]
        return ids, logprobs


class Reading:
    """Keep the generated completions and their rewards."""

    def _generate(self, prompts):
        found = super()._generate(prompts)
        self.generated = found[:3]
        return found

    def _calculate_rewards(self, *args):
        self.rewards = super()._calculate_rewards(*args)
        return self.rewards


class Talking(Calling, Keeping):
    pass


class Plain(Reading, trl.GRPOTrainer):
    pass


class TalkingPlain(Calling, Plain):
    pass


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    build(LlamaConfig, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return str(folder)


def parsed(tokenizer, ids, prefix=None, tools=None):
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"role": "assistant", "content": ""} | ({"tool_calls": CALL} if text == "<call>" else {"content": text})


@pytest.fixture
def trainer_of(policy, tmp_path, monkeypatch):
    """Return a function that builds a trainer from its class and reward. A turn "<call>" calls the tool."""
    import trl.trainer.grpo_trainer as module

    monkeypatch.setattr(module, "parse_response", parsed)
    monkeypatch.setattr(module, "add_response_schema", lambda tokenizer: tokenizer)

    def made(kind, reward, columns=(), settings=(), **options):
        rows = [{"prompt": [{"role": "user", "content": "x" * n}]} | dict(columns) for n in range(1, 9)]
        args = SETTINGS | {"temperature": 1.0, "max_completion_length": 60, "max_steps": 1} | dict(settings)
        trainer = kind(
            policy, reward_funcs=[reward], args=trl.GRPOConfig(output_dir=str(tmp_path), **args),
            train_dataset=Dataset.from_list(rows), **options,
        )  # fmt: skip
        trainer._tokenizer.response_schema = {"type": "object"}
        return trainer

    return made


def wanted(scorer, generated):
    """Return the rewards of the policy's tokens, each row computed alone. V(s') counts after all but a last turn."""
    prompts, completions, own = generated
    rows = []
    for i, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        mask = torch.ones(len(ids)) if own is None else torch.tensor(own[i])
        rows.append(sampled_rewards(scorer, prompt, ids, {EOS} if mask[-1] else ()) * mask)
    return rows


@pytest.mark.parametrize("shared", [True, False], ids=["shared forward", "separate model"])
def test_the_mixin_uses_the_trainers_prompts_and_tool_mask(trainer_of, policy, shared):
    scorer = EndoRewardModel.from_pretrained(policy)
    trainer = trainer_of(Talking, EndoReward() if shared else EndoReward(scorer), tools=[double])
    batch = trainer._generate_and_score_completions(batch_of(trainer))
    assert batch["tool_mask"].eq(0).any() and min(batch["prompt_mask"].sum(1)) > 200
    rows = wanted(scorer, trainer._generated)
    for i, row in enumerate(rows):
        assert (trainer._scored.reward[i, : len(row)] - row).abs().max() < 1e-3
        assert trainer._rewards_per_func[i, 0].item() == pytest.approx(row.sum().item(), abs=1e-2)
    assert batch["advantages"][batch["tool_mask"] == 0].eq(0).all()
    assert batch["ref_per_token_logps"].isfinite().all()
    trainer.train()
    assert torch.tensor(trainer.state.log_history[0]["loss"]).isfinite()


def test_a_plain_reward_function_with_the_trainers_tools(trainer_of, policy):
    scorer = EndoRewardModel.from_pretrained(policy)
    trainer = trainer_of(TalkingPlain, EndoReward(scorer, tools=[double]), tools=[double])
    trainer.train()
    assert any(0 in mask for mask in trainer.generated[2])
    for i, row in enumerate(wanted(scorer, trainer.generated)):
        assert trainer.rewards[i, 0].item() == pytest.approx(row.sum().item(), abs=1e-2)
    for reward in (EndoReward(scorer), EndoReward(scorer, tools=[double, double])):
        with pytest.raises(EndoRewardError, match="give EndoReward what the trainer has") as refusal:
            trainer_of(TalkingPlain, reward, tools=[double]).train()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings, options, given",
    [
        ({"chat_template_kwargs": {"mood": "glad"}}, {}, {"chat_template_kwargs": {"mood": "glad"}}),
        ({}, {"tools": [double]}, {"tools": [double]}),
        ({}, {"environment_factory": Room}, {}),
    ],
    ids=["chat_template_kwargs", "tools that are not called", "environment"],
)
def test_prompts_equal_the_trainers_or_are_refused(trainer_of, policy, settings, options, given):
    scorer = EndoRewardModel.from_pretrained(policy)
    trainer = trainer_of(Plain, EndoReward(scorer, **given), settings=settings, **options)
    trainer.train()
    for i, row in enumerate(wanted(scorer, trainer.generated)):
        assert trainer.rewards[i, 0].item() == pytest.approx(row.sum().item(), abs=1e-2)
    steered = trainer_of(Plain, EndoReward(scorer, system="Be kind.", **given), settings=settings, **options)
    steered.train()  # the count excludes the system prompt, which only the reward model reads
    if given:
        with pytest.raises(
            EndoRewardError, match=r"the trainer counted \d+ tokens in this batch, and EndoReward reads"
        ):
            trainer_of(Plain, EndoReward(scorer), settings=settings, **options).train()


def test_without_a_trainer_columns_reach_the_template(policy):
    """TRL 1.16 does not put a data set's `tools` and `chat_template_kwargs` into the policy's prompts."""
    scorer = EndoRewardModel.from_pretrained(policy)
    reward, prompt = EndoReward(scorer), [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    columns = {"tools": [[tool], json.dumps([tool]), None], "chat_template_kwargs": [None, {"mood": "glad"}, None]}
    texts = [scorer.tokenizer.decode(ids) for ids in reward.prompt_ids([prompt] * 3, **columns)]
    assert ["<tools>" in t for t in texts] == [True, True, False] and ["<glad>" in t for t in texts] == [
        False,
        True,
        False,
    ]
    ids = [1, 2, EOS]
    found = reward([prompt] * 3, [[{"role": "assistant", "content": ""}]] * 3, [ids] * 3, **columns)
    for text, score in zip(texts, found, strict=True):
        row = sampled_rewards(scorer, scorer.tokenizer(text)["input_ids"], ids, {EOS})
        assert score == pytest.approx(row.sum().item(), abs=1e-3)
    told = reward([prompt], [[{"role": "assistant", "content": ""}]], [ids], completion_mask=[[0, 1, 1]])
    assert told[0] == pytest.approx(
        sampled_rewards(scorer, reward.prompt_ids([prompt])[0], ids, {EOS})[1:].sum().item(), abs=1e-3
    )
