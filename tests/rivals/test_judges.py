"""Judges and trained reward models: their formulas computed by hand, and what they refuse."""

import math

import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.model import reader
from endoreward_fast.rivals.judges import JUDGES, PAIRWISE, POINTWISE, VERIFIER, Pairwise, Pointwise, Verifier
from endoreward_fast.rivals.questions import TEXT_ENDING
from endoreward_fast.rivals.reward_model import RewardModel
from endoreward_fast.scoring.batching import does_not_fit
from endoreward_fast.scoring.results import RowScore
from tiny_models import EOS, PAD, SIZES, TOKENIZER, build, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = byte_tokenizer()
CHAT.chat_template = TEMPLATE
LONG = {"max_position_embeddings": 1024}
ROW = {"prompt": "What is 2 + 3?", "completion": " 5"}
ROWS = [
    ROW,
    {"prompt": "What is 2 + 3?", "completion": "six"},
    {"prompt": "What is 2 + 3?", "completion": "a lot more than that"},
    {"prompt": "Name a colour.", "completion": "red"},
    {"prompt": "Name a colour.", "completion": "Paris"},
]


@pytest.fixture(scope="module")
def plain():
    return EndoRewardModel(build(LlamaConfig, **LONG), TOKENIZER)


@pytest.fixture(scope="module")
def chat():
    return EndoRewardModel(build(LlamaConfig, **LONG), CHAT)


@torch.no_grad()
def reply_logprob(scorer, prompt, reply, alpha=1.0):
    """Return the log-probability of the reply after the prompt, from full logits in float64."""
    start, ids = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + reply))
    log_pi = torch.log_softmax(scorer.model(torch.tensor([ids])).logits[0].double() / alpha, -1)
    return sum(log_pi[t - 1, ids[t]].item() for t in range(len(start), len(ids)))


def asked_in_text(instruction, **parts):
    return instruction.format(**parts) + TEXT_ENDING


def asked_in_chat(instruction, **parts):
    return f"<|user|>{instruction.format(**parts)}</s>\n<|assistant|>"


# --- verifier


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_verifier_is_alpha_log_pi_of_yes(plain, chat, alpha):
    parts = {"question": "What is 2 + 3?", "answer": "5"}
    (score,) = Verifier(plain).score([ROW], alpha=alpha)
    expected = alpha * reply_logprob(plain, asked_in_text(VERIFIER, **parts), " Yes", alpha)
    assert math.isclose(score.score, expected, rel_tol=1e-5) and score.num_tokens == 4  # bytes
    (score,) = Verifier(chat).score([ROW], alpha=alpha)
    expected = alpha * reply_logprob(chat, asked_in_chat(VERIFIER, **parts), "Yes", alpha)
    assert math.isclose(score.score, expected, rel_tol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_verifier_is_a_special_case_of_the_endogenous_reward(plain, alpha):
    """The reward of the reply as the whole answer, minus V of the question: sum r = alpha sum log pi + V(s_1)."""
    for row, verified in zip(ROWS, Verifier(plain).score(ROWS, alpha=alpha), strict=True):
        question = asked_in_text(VERIFIER, question=row["prompt"], answer=row["completion"].strip())
        rewritten = {"prompt": question, "completion": " Yes"}
        (endogenous,) = plain.score([rewritten], alpha=alpha, append_eos=False, per_token=True)
        assert math.isclose(verified.score, endogenous.score - endogenous.tokens.values[0], rel_tol=1e-4)


def test_another_instruction_and_reply(plain):
    judge = Verifier(plain, instruction="{answer} to {question}: right?", reply="Ja")
    (score,) = judge.score([ROW])
    assert math.isclose(score.score, reply_logprob(plain, "5 to What is 2 + 3?: right?\nReply:", " Ja"), rel_tol=1e-5)


# --- pointwise


def test_pointwise_is_the_mean_rating(plain):
    (score,) = Pointwise(plain).score([ROW], alpha=0.8)
    question = asked_in_text(POINTWISE, question="What is 2 + 3?", answer="5")
    pi = [math.exp(reply_logprob(plain, question, f" {k}", 0.8)) for k in range(1, 6)]
    expected = sum(k * p for k, p in enumerate(pi, start=1)) / sum(pi)
    assert math.isclose(score.score, expected, rel_tol=1e-5) and 1 < score.score < 5


class Replies:
    """A fake model: `say(prompt, reply)` returns the log-probability. It records what it is asked."""

    tokenizer = None

    def __init__(self, say):
        self.say, self.asked, self.options = say, [], {}

    def iter_logprobs(self, rows, *, on_tokens=None, **options):
        self.options = options
        for i in reversed(range(len(rows))):
            self.asked.append(rows[i])
            said = self.say(rows[i]["prompt"], rows[i]["completion"].strip())
            yield i, said if isinstance(said, RowScore) else RowScore(0.0, 1, said)


def test_ratings_that_underflow_are_told_apart():
    rated = {"good": [-900, -900, -900, -900, -800], "bad": [-800, -900, -900, -900, -900]}

    def say(prompt, reply):
        return rated["good" if "good" in prompt.split("Answer:")[1].split("\n")[0] else "bad"][int(reply) - 1]

    rows = [{"prompt": "?", "completion": word} for word in rated]
    assert [round(r.score, 6) for r in Pointwise(Replies(say)).score(rows)] == [5.0, 1.0]
    impossible = Pointwise(Replies(lambda *_: -math.inf)).score(rows)[0]
    assert impossible.score is None and impossible.error == "the model gives every reply probability 0"


def test_other_ratings():
    def say(_, reply):
        return {"-1": math.log(0.1), "0": math.log(0.2), "10": math.log(0.1)}[reply]

    assert Pointwise(Replies(say), ratings=("-1", "0", "10")).score([ROW])[0].score == pytest.approx(0.9 / 0.4)


# --- pairwise


def liking(worth, bias=0.0):
    """Return log pi of A and B, higher for the answer of higher worth, and higher for A by `bias`."""

    def say(prompt, reply):
        answers = [prompt.split(f"Answer {place}: ")[1].split("\n")[0] for place in "AB"]
        margin = worth[answers[0]] - worth[answers[1]] + bias
        return -math.log1p(math.exp(-margin if reply == "A" else margin))

    return say


def test_pairwise_cancels_a_preference_for_a_position():
    worth = {"one": 1.0, "two": 0.4, "three": -2.0}
    rows = [{"prompt": "?", "completion": answer} for answer in worth]
    for bias in (0.0, 5.0):
        model = Replies(liking(worth, bias))
        scores = [r.score for r in Pairwise(model).score(rows)]
        values = list(worth.values())
        assert scores == pytest.approx([v - (sum(values) - v) / 2 for v in values], abs=1e-6)
        assert len(model.asked) == 3 * 2 * 2


def test_pairwise_matches_the_logits_of_the_model(plain):
    scores = [r.score for r in Pairwise(plain).score(ROWS[3:])]

    def margin(first, second):
        question = asked_in_text(PAIRWISE, question="Name a colour.", first=first, second=second)
        return reply_logprob(plain, question, " A") - reply_logprob(plain, question, " B")

    expected = (margin("red", "Paris") - margin("Paris", "red")) / 2
    assert scores == pytest.approx([expected, -expected], rel=1e-4)


def test_rivals_are_a_group_or_an_equal_prompt():
    worth = {"one": 3.0, "two": 2.0, "three": 1.0, "four": 0.0}
    rows = [{"prompt": "?", "completion": answer} for answer in worth]
    together = [r.score for r in Pairwise(Replies(liking(worth))).score(rows)]
    assert together == pytest.approx([2.0, 2 / 3, -2 / 3, -2.0])
    grouped = [row | {"group": i // 2} for i, row in enumerate(rows)]
    assert [r.score for r in Pairwise(Replies(liking(worth))).score(grouped)] == pytest.approx([1, -1, 1, -1])
    other = [row | {"prompt": "!" if i else "?"} for i, row in enumerate(rows)]
    alone, *rest = Pairwise(Replies(liking(worth))).score(other)
    assert alone.score is None and "needs a rival" in alone.error
    assert [r.score for r in rest] == pytest.approx([1.5, 0.0, -1.5])


def test_equal_answers_tie_exactly_and_are_asked_about_once():
    model = Replies(liking({"one": 0.3, "two": 0.1}, bias=0.7))
    rows = [{"prompt": "?", "completion": answer} for answer in ("one", "one", "two")]
    scores = [r.score for r in Pairwise(model).score(rows)]
    assert scores[0] == scores[1] == pytest.approx(0.1)
    assert len(model.asked) == 3 * 2  # one-one, one-two, two-one
    model = Replies(lambda *_: -1.0)
    Verifier(model).score(rows)
    assert len(model.asked) == 2


# --- all three


@pytest.mark.parametrize("name", JUDGES)
def test_judges_report_rows_they_cannot_judge_and_continue(name, plain):
    rows = [
        {"prompt": "?", "completion": "one"},
        {"prompt_ids": [1], "completion_ids": [2]},
        {"prompt": "?"},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "x"},
        {"prompt": "?", "completion": "two"},
    ]
    first, ids, nothing, image, last = JUDGES[name](plain).score(rows)
    assert first.error is None and last.error is None and isinstance(first.score, float)
    assert "token ids" in ids.error and "found prompt" in nothing.error and "only parts of text" in image.error
    long = JUDGES[name](plain).score([ROWS[3], ROWS[4] | {"completion": "x" * 2000}])
    assert "the limit is 1024" in long[1].error


def knows(*known):
    """A model whose tokenizer knows only `known`. All else is the unknown token."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(("<unk>", *known))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return EndoRewardModel(build(LlamaConfig), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


@pytest.mark.parametrize(
    ("name", "known", "lacking"),
    [("verifier", ["No"], "'Yes'"), ("pointwise", ["1", "2", "3", "4"], "'5'"), ("pairwise", ["Yes"], "'A', 'B'")],
)
def test_a_reply_that_the_tokenizer_lacks_is_refused(name, known, lacking):
    """As unknown tokens, all ratings would be 3 and all comparisons ties."""
    judge = JUDGES[name]
    with pytest.raises(EndoRewardError, match=f"^{judge.method}: the model's tokenizer has no token for {lacking}$"):
        judge(knows(*known))
    assert judge(knows("Yes", "A", "B", "1", "2", "3", "4", "5")).score(ROWS)[0].score is not None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: Pointwise(model, ratings=()), r"the replies are \(\): expected texts, at least one"),
        (lambda model: Pointwise(model, ratings=(1, 2)), r"the replies are \(1, 2\): expected texts"),
        (lambda model: Pointwise(model, ratings=("good", "bad")), "'good' in ratings is not a number"),
        (lambda model: Pointwise(model, ratings=("1", "nan")), "'nan' in ratings is not a number"),
        (lambda model: Verifier(model, reply=" "), r"the replies are \(' ',\): expected texts"),
        (lambda model: Pairwise(model, replies=("A", "")), r"the replies are \('A', ''\): expected texts"),
    ],
)
def test_replies_that_no_judge_can_give_are_refused(make, said):
    with pytest.raises(EndoRewardError, match=said) as error:
        make(Replies(lambda *_: -1.0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", JUDGES)
def test_judges_pass_on_the_options_that_apply(name):
    model = Replies(lambda *_: -1.0)
    options = {"alpha": 0.5, "system": "Be strict.", "max_length": 99, "signals": "all", "per_token": True}
    scores = dict(JUDGES[name](model).iter_scores(ROWS, **options))
    assert sorted(scores) == list(range(len(ROWS)))
    assert model.options == {"alpha": 0.5, "system": "Be strict.", "max_length": 99, "append_eos": False}
    with pytest.raises(EndoRewardError, match="alpha=0"):
        JUDGES[name](model).score(ROWS, alpha=0)


def test_conversations_become_text():
    model = Replies(lambda *_: -1.0)
    turns = [("system", "Sing."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Sum {1}?"), ("assistant", "2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [{"messages": messages}, {"prompt": messages[1:2], "completion": messages[2:3]}]
    Verifier(model, instruction="[{question}][{answer}]").score(rows)
    asked = {row["prompt"].removesuffix(TEXT_ENDING) for row in model.asked}
    assert asked == {"[System: Sing.\n\nUser: Hi\n\nAssistant: Ho\n\nUser: Sum {1}?][2]", "[Hi][Ho]"}


def test_a_question_is_text_or_chat_like_its_row(chat):
    texts = [Verifier(chat).score([ROW | extra])[0].score for extra in ({}, {"chat": False})]
    parts = {"question": "What is 2 + 3?", "answer": "5"}
    assert texts[1] == pytest.approx(reply_logprob(chat, asked_in_text(VERIFIER, **parts), " Yes"), rel=1e-5)
    assert Verifier(chat).score([ROW], chat=False)[0].score == pytest.approx(texts[1], rel=1e-6)
    assert texts[0] != pytest.approx(texts[1], rel=1e-3)


class OneByOne(EndoRewardModel):
    """Reads every reply as a row of its own."""

    def names_tokens(self):
        return False


def read_by(scorer, monkeypatch, judge):
    """Return the results of a judge, the tokens that the body reads and the states that the vocabulary is read in."""
    bodies, states, told = [], [], []
    handle = scorer.model.register_forward_pre_hook(
        lambda _, __, given: bodies.append(given["input_ids"].numel()), with_kwargs=True
    )
    for name in ("linear_vocab_stats", "linear_token_rewards"):
        function = getattr(reader, name)

        def counted(hidden, *args, function=function, **given):
            mask = given.get("mask")
            states.append(len(hidden) if mask is None else int(mask.sum()))
            return function(hidden, *args, **given)

        monkeypatch.setattr(reader, name, counted)
    results = dict(judge(scorer).iter_scores(ROWS, on_tokens=told.append, alpha=0.7))
    monkeypatch.undo()
    handle.remove()
    return [results[i] for i in range(len(ROWS))], sum(bodies), sum(states), sum(told)


@pytest.mark.parametrize(("name", "replies"), [("pointwise", 5), ("pairwise", 2)])
def test_replies_of_one_token_are_read_in_one_state_of_the_question(name, replies, chat, monkeypatch):
    """In a chat, a rating and a letter are one token each of the byte tokenizer."""
    together, read, states, told = read_by(chat, monkeypatch, JUDGES[name])
    apart, read_apart, states_apart, told_apart = read_by(OneByOne(chat.model, CHAT), monkeypatch, JUDGES[name])
    for one, other in zip(together, apart, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4, abs=1e-5)
        assert (one.num_tokens, one.flags, one.error) == (other.num_tokens, other.flags, other.error)
    assert read <= read_apart and states_apart == replies * states and told == told_apart


def test_a_model_that_shares_nothing_reads_a_question_once(chat, monkeypatch):
    """It read the question once for each rating before. padding is the same: one question, of one length."""
    monkeypatch.setattr(EndoRewardModel, "obstacle_to_sharing", lambda self: "none is wanted")
    monkeypatch.setattr(EndoRewardModel, "states_last", lambda self: False)
    reads = []
    for scorer in (chat, OneByOne(chat.model, CHAT)):
        handle = scorer.model.register_forward_pre_hook(
            lambda _, __, given: reads.append(given["input_ids"].numel()), with_kwargs=True
        )
        Pointwise(scorer).score(ROWS[:1])
        handle.remove()
    together, apart = reads[0], sum(reads[1:])
    assert apart == 5 * (together + 1)  # each with its rating


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("budget", [1, 150])
def test_one_token_replies_under_a_small_budget_and_with_rows_that_fail(name, budget, chat):
    long = ROWS[4] | {"completion": "x" * 2000}
    options = {"max_tokens_per_batch": budget, "max_length": 600}
    found = JUDGES[name](chat).score([*ROWS[:4], long], **options)
    expected = JUDGES[name](OneByOne(chat.model, CHAT)).score([*ROWS[:4], long], **options)
    for one, other in zip(found, expected, strict=True):
        assert (one.num_tokens, one.flags, one.error) == (other.num_tokens, other.flags, other.error)
        assert one.error or one.score == pytest.approx(other.score, rel=1e-4, abs=1e-5)
    assert found[0].score is not None and "the limit is 600" in found[4].error


def test_replies_of_one_token_where_memory_has_no_room_or_the_model_gives_nan():
    scorer = EndoRewardModel(build(LlamaConfig, **LONG), CHAT)
    scorer.obstacle_to_sharing()

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = scorer.model.register_forward_pre_hook(no_room)
    with pytest.warns(UserWarning, match="out of memory"):
        lost, _ = Pointwise(scorer).score(ROWS[:2])
    handle.remove()
    assert lost.score is None and lost.error.startswith("out of memory: ")
    with torch.no_grad():
        scorer.model.lm_head.weight[7].fill_(math.nan)
    (nan,) = Pointwise(scorer).score(ROWS[:1])
    assert nan.score is None and nan.error == "the model gave NaN for this row"


# --- a trained reward model


def classifier(pad=PAD, **changes):
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES | {"num_labels": 1, "pad_token_id": pad, "vocab_size": 300} | changes)
    return LlamaForSequenceClassification(config).eval()


@torch.no_grad()
def output(model, text):
    ids = CHAT(text, add_special_tokens=False)["input_ids"]
    return model(input_ids=torch.tensor([ids])).logits.item()


def as_chat(row):
    return f"<|user|>{row['prompt']}</s>\n<|assistant|>{row['completion']}</s>\n"


@pytest.mark.parametrize("pad", [PAD, None, EOS])
def test_a_reward_model_gives_its_output_for_the_whole_conversation(pad):
    model, seen, counted = classifier(pad), [], []
    reward = RewardModel(model, CHAT)
    reward.obstacle_to_sharing()  # asks the model once
    handle = model.base_model.register_forward_pre_hook(
        lambda _, args, given: seen.append((args[0] if args else given["input_ids"]).shape), with_kwargs=True
    )
    found = dict(reward.iter_scores(ROWS, on_tokens=counted.append))
    handle.remove()
    if pad is None:
        assert [shape[0] for shape in seen] == [1] * 5
    else:  # all begin with the same mark, and the first two with the same question
        assert max(shape[0] for shape in seen) > 1
        assert sum(shape.numel() for shape in seen) < sum(r.num_tokens for r in found.values())
    for i, row in enumerate(ROWS):
        assert found[i].score == pytest.approx(output(model, as_chat(row)), rel=1e-4, abs=1e-5)
        assert found[i].num_tokens == len(CHAT(as_chat(row), add_special_tokens=False)["input_ids"])
    assert sum(counted) == sum(r.num_tokens for r in found.values())
    assert len({round(r.score, 4) for r in found.values()}) == 5


class Whole(RewardModel):
    """Reads every row whole."""

    def obstacle_to_sharing(self):
        return "it is what sharing is compared with"


def test_batches_of_a_reward_model_keep_to_the_budget():
    model = classifier()
    seen = []
    model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True)
    few = [r.score for r in Whole(model, CHAT).score(ROWS, max_tokens_per_batch=100)]
    assert 1 < len(seen) < 5 and max(seen) <= 100
    assert few == pytest.approx([r.score for r in RewardModel(model, CHAT).score(ROWS)], rel=1e-4)


def test_a_reward_model_continues_when_memory_runs_out():
    model = classifier()
    wanted = [r.score for r in RewardModel(model, CHAT).score(ROWS)]
    lengths = [r.num_tokens for r in RewardModel(model, CHAT).score(ROWS)]

    def room(module, args, kwargs):
        if kwargs["input_ids"].numel() >= max(lengths):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(room, with_kwargs=True)
    with pytest.warns(UserWarning, match="out of memory"):
        found = Whole(model, CHAT).score(ROWS)
    for row, score, length in zip(found, wanted, lengths, strict=True):
        if length < max(lengths):
            assert row.score == pytest.approx(score, rel=1e-4)
        else:
            assert row.score is None and row.error == does_not_fit(length)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("budget", [None, 40, 100])
def test_a_reward_model_reads_a_question_once_for_all_answers(kind, budget):
    configs = {"gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=PAD)}
    sizes = SIZES | {"vocab_size": 300, "num_labels": 1, "pad_token_id": PAD}
    configs["llama"] = LlamaConfig(**sizes)
    configs["gemma2"] = Gemma2Config(**sizes, sliding_window=8, query_pre_attn_scalar=16)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(configs[kind]).eval()
    rows = [{"prompt": "Which of these is a colour?", "completion": c} for c in ("red", "Paris", "", "red", "reddish")]
    reward, read = RewardModel(model, CHAT), []
    assert reward.obstacle_to_sharing() is None
    wanted = [r.score for r in Whole(model, CHAT).score(rows)]
    handle = model.base_model.register_forward_pre_hook(
        lambda _, args, given: read.append((args[0] if args else given["input_ids"]).numel()), with_kwargs=True
    )
    found = reward.score(rows, max_tokens_per_batch=budget)
    handle.remove()
    assert [r.score for r in found] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    if budget is None:
        assert sum(read) < 0.6 * sum(r.num_tokens for r in found)


def test_a_classifier_whose_output_is_not_its_last_layers_is_read_whole():
    """Here the output is twice the layer's. A classifier that sees later tokens (an encoder) is read whole, too."""
    model = classifier()
    model.register_forward_hook(lambda _, __, found: setattr(found, "logits", 2 * found.logits))
    with pytest.warns(UserWarning, match="reads every row whole.*its output is not that of its last layer"):
        found = [r.score for r in RewardModel(model, CHAT).score(ROWS)]
    assert found == pytest.approx([output(model, as_chat(row)) for row in ROWS], rel=1e-4, abs=1e-5)


def test_a_reward_model_that_has_no_memory_for_a_cache_reads_rows_whole():
    model = classifier()
    reward, longest = RewardModel(model, CHAT), max(len(CHAT(as_chat(row)).input_ids) for row in ROWS)
    reward.obstacle_to_sharing()
    wanted = [r.score for r in Whole(model, CHAT).score(ROWS)]

    def room(_, args, given):
        past, ids = given.get("past_key_values"), args[0] if args else given["input_ids"]
        held = 0 if past is None else past.get_seq_length() * len(ids)
        if ids.numel() + held > longest:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.base_model.register_forward_pre_hook(room, with_kwargs=True)
    with pytest.warns(UserWarning, match="out of memory"):
        found = [r.score for r in reward.score(ROWS)]
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_reward_model_without_a_template_reads_text_and_refuses_messages():
    model = classifier()
    text, messages, system = (
        RewardModel(model, TOKENIZER).score([row], **options)[0]
        for row, options in (
            (ROW, {}),
            ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {}),
            (ROW, {"system": "Be kind."}),
        )
    )
    assert text.score == pytest.approx(output(model, "What is 2 + 3? 5"), rel=1e-4)
    assert system.score == pytest.approx(output(model, "Be kind.\n\nWhat is 2 + 3? 5"), rel=1e-4)
    assert messages.score is None and "no chat template" in messages.error


def leading_bos(template=None):
    """Return a tokenizer that adds BOS before every text."""
    tokenizer = byte_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>")}
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=list(ids.items()))
    tokenizer.backend_tokenizer.post_processor = around
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_writes_bos_gets_only_one():
    model, tokenizer = classifier(), leading_bos("<s>" + TEMPLATE)
    text = as_chat(ROW)
    ids = tokenizer("<s>" + text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits.item()
    assert RewardModel(model, tokenizer).score([ROW])[0].score == pytest.approx(expected, rel=1e-4)


def test_an_encoder_as_reward_model_does_not_see_its_padding():
    torch.manual_seed(2)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=300, num_labels=1, initializer_range=0.5, pad_token_id=PAD, **size)
    model, tokenizer = BertForSequenceClassification(config).eval(), leading_bos()
    for row, result in zip(ROWS, RewardModel(model, tokenizer).score(ROWS), strict=True):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits.item()
        assert result.score == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_reward_model_accepts_a_system_prompt_and_an_empty_answer():
    model = classifier()
    (system,) = RewardModel(model, CHAT).score([ROW], system="Sing.")
    assert system.score == pytest.approx(output(model, "<|system|>Sing.</s>\n" + as_chat(ROW)), rel=1e-4)
    empty = ROW | {"completion": ""}
    assert RewardModel(model, CHAT).score([empty])[0].score == pytest.approx(output(model, as_chat(empty)), rel=1e-4)


def test_rows_that_a_reward_model_cannot_score_get_an_error():
    scorer = RewardModel(classifier(), CHAT)
    rows = [ROW, {"prompt": "x" * 200, "completion": "y"}, {"prompt_ids": [1], "completion_ids": [2]}, {"prompt": "x"}]
    fine, long, ids, odd = scorer.score(rows)
    assert fine.error is None and "the limit is 128" in long.error and "token ids" in ids.error
    assert "found prompt" in odd.error
    whole = CHAT(as_chat(rows[1]), add_special_tokens=False)["input_ids"]
    for side, ids in (("prompt", [whole[0], *whole[-127:]]), ("completion", whole[:128])):
        (cut,) = scorer.score(rows[1:2], truncate=side)
        with torch.no_grad():
            expected = scorer.model(input_ids=torch.tensor([ids])).logits.item()
        assert cut.score == pytest.approx(expected, rel=1e-4) and cut.flags == ("truncated",) and cut.num_tokens == 128
    with torch.no_grad():
        scorer.model.score.weight.fill_(math.nan)
    (lost,) = scorer.score([ROW])
    assert lost.score is None and "NaN" in lost.error


def test_a_reward_model_scores_in_evaluation_mode_and_restores_its_mode():
    model = classifier(attention_dropout=0.5).train()
    one, other = (RewardModel(model, CHAT).score([ROW])[0].score for _ in range(2))
    assert one == other and model.training and model.model.layers[0].training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward-model")
    classifier().save_pretrained(path)
    CHAT.save_pretrained(path)
    return path


def test_a_reward_model_is_loaded_by_name(folder):
    scorer = RewardModel.from_pretrained(str(folder), device="cpu")
    assert scorer.score([ROW])[0].score == pytest.approx(output(classifier(), as_chat(ROW)), rel=1e-4)
    half = RewardModel.from_pretrained(str(folder), device="cpu", dtype="bfloat16")
    assert next(half.model.parameters()).dtype == torch.bfloat16


def test_anything_but_a_reward_model_is_refused(tmp_path, folder):
    def saved(name, model, tokenizer=CHAT):
        model.save_pretrained(tmp_path / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    two = saved("two", classifier(num_labels=2))
    causal = saved("causal", LlamaForCausalLM(LlamaConfig(**SIZES)))
    headless = saved("headless", classifier())
    from safetensors.torch import load_file, save_file

    weights = load_file(f"{headless}/model.safetensors")
    del weights["score.weight"]
    save_file(weights, f"{headless}/model.safetensors", metadata={"format": "pt"})
    for name, said in (
        (two, r"two' has 2 outputs \(LABEL_0, LABEL_1\): a reward model has one"),
        (causal, r"causal' is a LlamaForCausalLM, which is not a reward model"),
        (headless, r"headless' is not a reward model: its checkpoint lacks 'score.weight'"),
        ("pocket", r"'pocket' is a \w+ForCausalLM, which is not a reward model"),
        (saved("mute", classifier(), None), r"mute' has no usable tokenizer"),
        (str(tmp_path / "nowhere"), r"nowhere': there is no such folder"),
    ):
        with pytest.raises(EndoRewardError, match=said):
            RewardModel.from_pretrained(name, device="cpu")
    with pytest.raises(EndoRewardError, match="LlamaForSequenceClassification has 2 outputs"):
        RewardModel(AutoModelForSequenceClassification.from_pretrained(two), CHAT)


def test_a_reward_model_flags_what_its_template_drops_and_writes_an_end_once():
    model = classifier()
    asked, answered = {"role": "user", "content": "?"}, {"role": "assistant", "content": "4"}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    dated = byte_tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    whole = "<|user|>?</s>\n<|assistant|>4</s>\n"
    for messages, row, flags in (
        ([asked, answered], {}, ()),
        ([asked, answered | {"content": "4</s>"}], {}, ("end_in_text", "marks_in_text")),
        ([asked, answered | {"content": "4</s>\n"}], {}, ("end_in_text", "marks_in_text")),
        ([asked, answered | {"reasoning_content": "add"}], {}, ("template_drops",)),
        ([asked, answered | {"tool_calls": [call]}], {}, ("template_drops",)),
        ([asked | {"thinking": "hm"}, answered], {}, ("context_changed",)),
        ([asked, answered], {"tools": [{"name": "f"}]}, ("template_ignores",)),
    ):
        (result,) = RewardModel(model, CHAT).score([{"messages": messages, **row}])
        assert result.score == pytest.approx(output(model, whole), rel=1e-4) and result.flags == flags, messages
    assert RewardModel(model, dated).score([ROW])[0].flags == ("dated",)
    assert RewardModel(model, dated).score([ROW], date="2024-02-29")[0].flags == ()
    assert RewardModel(model, CHAT).score([ROW | {"completion": ""}])[0].flags == ("empty",)
    assert RewardModel(model, TOKENIZER).score([ROW | {"completion": ""}])[0].flags == ("empty",)


def test_special_tokens_of_a_text_are_not_doubled_by_a_reward_models_tokenizer():
    scorer = RewardModel(classifier(), leading_bos())
    plain, *others = scorer.score(
        [ROW, ROW | {"prompt": f"<s>{ROW['prompt']}"}, ROW | {"completion": f"{ROW['completion']}</s>"}]
    )
    assert [other.num_tokens for other in others] == [plain.num_tokens] * 2
    assert [other.score for other in others] == pytest.approx([plain.score] * 2, rel=1e-5)


@pytest.mark.parametrize("name", JUDGES)
def test_an_empty_answer_that_the_template_refuses_does_not_stop_other_rows(name):
    tokenizer = byte_tokenizer()
    refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + TEMPLATE
    tokenizer.chat_template = refusing
    judge = JUDGES[name](EndoRewardModel(build(LlamaConfig, **LONG), tokenizer))
    odd = {"prompt": [{"role": "tool", "content": "5"}], "completion": "", "group": 1}
    fine, refused, also = judge.score([ROW | {"group": 1}, odd, ROWS[1] | {"group": 1}])
    assert fine.score is not None and also.score is not None
    assert refused.score is None and "no tools here" in refused.error


def test_an_empty_answer_is_judged_if_the_model_has_an_end_token():
    """GLM's models stop at the mark of the next turn. Their generation_config says so, but not their tokenizer."""
    tokenizer = byte_tokenizer(eos_token=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE.replace("</s>\n", "")
    scorer = EndoRewardModel(build(LlamaConfig, **LONG), tokenizer)
    scorer.model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|user|>")]
    empty = ROW | {"completion": ""}
    assert scorer.score([empty])[0].score is not None
    assert JUDGES["verifier"](scorer).score([empty])[0].score is not None
