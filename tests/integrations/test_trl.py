"""EndoReward in TRL's GRPOTrainer with the embedded model. Its rewards are compared with the oracle's."""

import warnings

import pytest
import torch
from transformers import LlamaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.integrations.trl import EndoReward
from endoreward_fast.model.checkpoint import pocket_path
from tiny_models import EOS as BYTE_EOS
from tiny_models import TOKENIZER, alone, build, byte_tokenizer, sampled_rewards

trl = pytest.importorskip("trl", reason="TRL asks for Python 3.11")
from trl_harness import SETTINGS, dataset, grpo  # noqa: E402

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.fixture(scope="module")
def tiny():
    return EndoRewardModel(build(LlamaConfig), TOKENIZER)


class Recording(EndoReward):
    """Record the trainer's calls and the answers."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, **columns):
        answer = super().__call__(prompts, completions, completion_ids, **columns)
        self.calls.append((prompts, completion_ids, answer, columns))
        return answer


def ids_of(text):
    return TOKENIZER(text)["input_ids"]


def oracle_score(scorer, prompt, completion, ends):
    """Return the sum of one completion's rewards."""
    return sampled_rewards(scorer, prompt, completion, ends).sum().item()


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_grpo_trains_on_the_endogenous_reward(tmp_path, pocket, form):
    reward = Recording(pocket)
    trainer = grpo(trl.GRPOTrainer, tmp_path, reward, form)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()

    assert len(reward.calls) == 2
    for prompts, completions, answers, columns in reward.calls:
        assert len(set(answers)) > 2 and set(columns) >= {"answer", "trainer_state", "log_metric"}
        for prompt, ids, answer in zip(trainer._tokenize_prompts(prompts)[0], completions, answers, strict=True):
            assert answer == pytest.approx(oracle_score(pocket, prompt, ids, {pocket.tokenizer.eos_token_id}), abs=2e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    logged = trainer.state.log_history[0]
    prompts, completions, answers, _ = reward.calls[0]
    assert logged["rewards/endo_reward/mean"] == pytest.approx(sum(answers) / len(answers), rel=1e-4)
    tokens = sum(map(len, completions))
    assert logged["endo_reward/length"] == tokens / len(completions)
    assert logged["endo_reward/token"] == pytest.approx(sum(answers) / tokens, rel=1e-3)
    assert logged["endo_reward/unscored"] == 0
    firsts = [alone(pocket, torch.tensor(reward.prompt_ids([p])[0] + [5])).value[0, -1].item() for p in prompts]
    assert logged["endo_reward/first_value"] == pytest.approx(sum(firsts) / len(firsts), rel=1e-4)


def test_rloo_trains_on_the_endogenous_reward(tmp_path, pocket):
    reward = Recording(pocket)
    args = trl.RLOOConfig(output_dir=str(tmp_path), **SETTINGS)
    trainer = trl.RLOOTrainer(str(pocket_path()), reward_funcs=[reward], args=args, train_dataset=dataset("chat"))
    trainer.train()
    assert len(reward.calls) == 2 and len(set(reward.calls[0][2])) > 2
    assert trainer.state.log_history[0]["rewards/endo_reward/mean"] == pytest.approx(
        sum(reward.calls[0][2]) / 8, rel=1e-4
    )


def test_sampled_ids_are_scored_unchanged(tiny):
    """Two sampled tokens stay two, though the tokenizer would write their text as one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["ab"])
    tokenizer.name_or_path = "tiny"
    scorer = EndoRewardModel(tiny.model, tokenizer)
    sampled = [*ids_of("ab"), BYTE_EOS]
    answer = EndoReward(scorer)(["x"], ["ab"], [sampled])[0]
    assert answer == pytest.approx(oracle_score(scorer, ids_of("x"), sampled, {BYTE_EOS}), abs=1e-4)
    joined = [tokenizer.convert_tokens_to_ids("ab"), BYTE_EOS]
    assert abs(answer - oracle_score(scorer, ids_of("x"), joined, {BYTE_EOS})) > 0.1


def test_a_truncated_completion_is_bootstrapped(tiny):
    reward = EndoReward(tiny)
    whole, cut = reward(["ab", "ab"], ["", ""], [[1, 2, BYTE_EOS], [1, 2, 3]])
    assert whole == pytest.approx(oracle_score(tiny, ids_of("ab"), [1, 2, BYTE_EOS], {BYTE_EOS}), abs=1e-4)
    assert cut == pytest.approx(oracle_score(tiny, ids_of("ab"), [1, 2, 3], {BYTE_EOS}), abs=1e-4)
    assert abs(cut - oracle_score(tiny, ids_of("ab"), [1, 2, 3], {3})) > 0.1  # V(s') counts


def test_reductions_and_a_steering_system_prompt(tiny):
    completion = [1, 2, 3, BYTE_EOS]
    [plain] = EndoReward(tiny)(["ab"], [""], [completion])
    [mean] = EndoReward(tiny, reduction="mean")(["ab"], [""], [completion])
    assert mean == pytest.approx(plain / 4, abs=1e-5)
    [steered] = EndoReward(tiny, system="c")(["ab"], [""], [completion])
    assert steered == pytest.approx(oracle_score(tiny, ids_of("c\n\nab"), completion, {BYTE_EOS}), abs=1e-4)


def test_prompts_go_through_the_trainers_template(tiny):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    prompt = [{"role": "user", "content": "hi"}]
    plain = EndoReward(tiny, tokenizer).prompt_ids([prompt])
    assert plain[0] == ids_of("<user>hi<assistant>")
    thinking = EndoReward(tiny, tokenizer, chat_template_kwargs={"thinking": True}).prompt_ids([prompt])
    assert thinking[0] == ids_of("<user>hi<assistant><think>")
    other = EndoReward(tiny, tokenizer, chat_template=CHATML.replace("<", "[")).prompt_ids([prompt])
    assert other[0] == ids_of("[user>hi[assistant>")
    with pytest.raises(EndoRewardError, match="the chat template raised an error for a prompt: "):
        EndoReward(tiny).prompt_ids([prompt])


def test_unscored_completions_get_none_and_are_counted(tiny):
    reward, logged = EndoReward(tiny), {}
    long = [1] * tiny.max_positions
    tool = [{"role": "assistant", "content": "?"}, {"role": "tool", "content": "!"}]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = reward(
            ["ab"] * 5, ["", "", "", tool, ""], [[], long, [10**6], [1, 2], [1, BYTE_EOS]],
            log_metric=logged.__setitem__,
        )  # fmt: skip
    assert answers[:4] == [None] * 4 and answers[4] is not None
    assert logged["endo_reward/unscored"] == 4 == sum(reward.unscored.values())
    assert logged["endo_reward/length"] == 2  # the length of the scored completion
    for words in ("empty", "limit is 128", "vocabulary", "tool results"):
        assert sum(words in str(w.message) for w in said) == 1


def test_nan_rewards_become_none(tiny):
    scorer = EndoRewardModel(build(LlamaConfig), TOKENIZER)
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight[7] = torch.nan  # a token in only one of the completions
    with pytest.warns(UserWarning, match="NaN"):
        answers = EndoReward(scorer)(["ab", "ab"], ["", ""], [[7, 1], [8, 1]])
    assert answers[0] is None and answers[1] == pytest.approx(oracle_score(tiny, ids_of("ab"), [8, 1], ()), abs=1e-4)


def test_another_vocabulary_is_refused_and_both_are_named(tiny, pocket):
    pocket.tokenizer.name_or_path = "pocket"
    theirs = byte_tokenizer()
    theirs.name_or_path = "bytes"
    with pytest.raises(EndoRewardError, match=r"\(bytes, 259 tokens\).*\(pocket, 1024 tokens\)") as refusal:
        EndoReward(pocket, theirs)
    assert "\n" not in str(refusal.value)
    padded = byte_tokenizer()
    padded.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    EndoReward(tiny, padded)  # one more special token is allowed


def test_tokens_of_another_vocabulary_are_recognised_by_their_texts(tiny, pocket):
    """TRL passes texts and ids but no tokenizer. Ids that decode to another text are from another vocabulary."""
    ids = pocket.tokenizer("the sum is 12", add_special_tokens=False)["input_ids"]
    with pytest.raises(EndoRewardError, match="the policy's tokens are not the reward model's: 'the sum is 12'") as no:
        EndoReward(tiny)(["ab"] * 2, ["the sum is 12"] * 2, [ids] * 2)
    assert "\n" not in str(no.value)
    chat = [[{"role": "assistant", "content": text}] for text in ("the sum is 12", "cut", "the sum is 12")]
    own = EndoReward(pocket)
    found = own(["ab"] * 3, chat, [ids, ids[:1], ids])  # a completion truncated inside its text is allowed
    assert found[0] == found[2] is not None
    assert own(["ab"], ["another text"], [ids]) == [pytest.approx(found[0], abs=1e-4)]  # checked once


def test_trl_treats_it_as_a_function(tiny):
    from trl.trainer.utils import get_callable_name, is_async_callable

    reward = EndoReward(tiny)
    assert not isinstance(reward, torch.nn.Module) and not is_async_callable(reward)
    assert get_callable_name(reward) == "endo_reward"


def test_an_older_trainer_raises_one_line(tiny):
    with pytest.raises(EndoRewardError, match=r"TRL 1\.16 or newer"):
        EndoReward(tiny)(prompts=["a"], completions=["b"])
    with pytest.raises(EndoRewardError, match="EndoGRPOMixin"):
        EndoReward(None, TOKENIZER)(["a"], ["b"], [[1]])
