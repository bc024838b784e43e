"""Signals that rows give inputs for: the span of the final answer, a reference answer, a privileged context."""

import math
import re

import pytest
import torch

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.head.head import without_cache
from endoreward_fast.signals import SIGNALS
from tiny_models import EOS, MODELS, TOKENIZER, byte_tokenizer

THOUGHT, ANSWER, TAIL = " 2+3 is ", "5", " ."
ROW = {
    "prompt": "What is 2+3?",
    "completion": THOUGHT + ANSWER + TAIL,
    "answer_span": ANSWER,
    "reference_answer": "five",
    "privileged": "Hint: count.",
}
OF_ROW = [name for name, signal in SIGNALS.items() if signal.needs and not signal.needs_reference]
CLOSE = {"rel": 1e-5, "abs": 1e-4}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def llama():
    return EndoRewardModel(MODELS["llama"](), TOKENIZER)


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = CHATML
    return EndoRewardModel(MODELS["llama"](), tokenizer)


def ids(text):
    return list(text.encode()) and TOKENIZER(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def logprobs(scorer, before, after):
    """Return log pi of the tokens `after` behind the tokens `before`, float64, from the full logits."""
    row = torch.tensor([[*before, *after]])
    logits = scorer.model(input_ids=row, **without_cache(scorer.model)).logits.double()
    return torch.log_softmax(logits[0, len(before) - 1 : -1], -1).gather(-1, torch.tensor(after)[:, None])[:, 0]


def by_hand(scorer, prompt, context, thought, answer, tail, reference):
    """Return {signal: score} from token ids, as in the papers."""
    whole = [*thought, *answer, *tail]
    own = logprobs(scorer, prompt, whole)
    span = own[len(thought) : len(thought) + len(answer)]
    after, direct = logprobs(scorer, [*prompt, *thought], reference), logprobs(scorer, prompt, reference)
    gain = after.exp().mean() - direct.exp().mean()
    return {
        "answer-logprob": span.sum(),
        "answer-probability": span.exp().mean(),
        "reference-logprob": after.sum(),
        "reference-probability": after.exp().mean(),
        "reference-gain": gain.clamp(0, 1),
        "privileged-log-ratio": (logprobs(scorer, context, whole) - own).sum(),
    }


def same(found, expected):
    assert found.error is None and found.signal_errors is None and list(found.signals) == OF_ROW
    for name, value in expected.items():
        assert math.isclose(found.signals[name], float(value), rel_tol=1e-4, abs_tol=1e-5), name


def test_signals_of_a_text_row_match_their_formulas(llama):
    prompt, context = ids(ROW["prompt"]), ids("Hint: count.\n\nWhat is 2+3?")
    expected = by_hand(llama, prompt, context, ids(THOUGHT), ids(ANSWER), [*ids(TAIL), EOS], ids("five"))
    (found,) = llama.score([ROW], signals=OF_ROW)
    same(found, expected)
    start = len(THOUGHT)
    (by_place,) = llama.score([ROW | {"answer_span": [start, start + 1]}], signals=",".join(OF_ROW))
    assert by_place.signals == pytest.approx(found.signals, **CLOSE)
    plain = llama.score([{"prompt": ROW["prompt"], "completion": ROW["completion"]}])[0]
    assert plain.score == pytest.approx(found.score, rel=1e-5) and plain.num_tokens == found.num_tokens


def test_signals_of_token_ids_match_their_formulas_and_those_of_the_text(llama):
    prompt, context = ids(ROW["prompt"]), ids("Hint: count.\n\nWhat is 2+3?")
    row = {
        "prompt_ids": prompt, "completion_ids": [*ids(ROW["completion"]), EOS], "privileged": torch.tensor(context),
        "answer_span": [len(ids(THOUGHT)), len(ids(THOUGHT + ANSWER))], "reference_answer": ids("five"),
    }  # fmt: skip
    found, by_text, text = llama.score([row, row | {"answer_span": ANSWER}, ROW], signals=OF_ROW)
    expected = by_hand(llama, prompt, context, ids(THOUGHT), ids(ANSWER), [*ids(TAIL), EOS], ids("five"))
    same(found, expected)
    for other in (by_text, text):
        assert other.signals == pytest.approx(found.signals, **CLOSE)


def test_in_a_chat_the_privileged_text_ends_the_last_user_turn(chat):
    def turns(user):
        return chat.tokenizer(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]

    end = chat.tokenizer.eos_token_id
    prompt, context = turns(ROW["prompt"]), turns("What is 2+3?\n\nHint: count.")
    expected = by_hand(chat, prompt, context, ids(THOUGHT), ids(ANSWER), [*ids(TAIL), end], ids("five"))
    messages = [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": ROW["completion"]}]
    rest = {name: ROW[name] for name in ("answer_span", "reference_answer", "privileged")}
    rows = [ROW, {"messages": messages, **rest}, {"prompt": messages[:1], "completion": messages[1:], **rest}]
    for found in chat.score(rows, signals=OF_ROW):
        same(found, expected)
    (added,) = chat.score([ROW | {"privileged": [{"role": "user", "content": "Hint."}]}], signals=OF_ROW)
    two = chat.tokenizer(
        "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>user\nHint.<|im_end|>\n<|im_start|>assistant\n"
    )["input_ids"]
    whole = [*ids(ROW["completion"]), end]
    ratio = (logprobs(chat, two, whole) - logprobs(chat, prompt, whole)).sum()
    assert added.signals["privileged-log-ratio"] == pytest.approx(float(ratio), abs=1e-3)


def test_the_last_user_turn_may_be_a_turn_of_the_completion(chat):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    rows = [
        {"messages": turns},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"prompt": "a", "completion": turns[1:]},
    ]
    for hint in ("Hint.", [{"role": "user", "content": "Hint."}]):
        found = chat.score([row | {"privileged": hint} for row in rows], signals="privileged-log-ratio")
        for one in found[1:]:
            assert one.signals == pytest.approx(found[0].signals, **CLOSE)


@pytest.mark.parametrize("together", [2048, 1])
def test_rows_with_and_without_inputs_share_batches_and_prefixes(llama, together):
    """`together` 1 scores each reading alone. With a second model, further readings are batches of their own."""
    second = EndoRewardModel(MODELS["gpt2"](), TOKENIZER)
    bare = {"prompt": ROW["prompt"], "completion": " 2+3 is 6 ."}
    rows = [ROW, bare, bare | {"answer_span": "6"}, ROW | {"prompt": ROW["prompt"] * 2}, {"prompt": "a"}]
    found = llama.score(rows, signals="all", max_tokens_per_batch=together)
    alone = [llama.score([row], signals="all")[0] for row in rows]
    for one, other in zip(found, alone, strict=True):
        assert one.error == other.error and one.signal_errors is None
        assert (one.signals or {}) == pytest.approx(other.signals or {}, abs=1e-4)
    assert set(OF_ROW) <= found[0].signals.keys() and not set(OF_ROW) & found[1].signals.keys()
    assert set(OF_ROW) & found[2].signals.keys() == {"answer-logprob", "answer-probability"}
    both = llama.score(rows, signals="all", reference=second, max_tokens_per_batch=together)
    assert list(both[0].signals) == list(SIGNALS)
    for one, other in zip(found[:4], both[:4], strict=True):
        assert {name: other.signals[name] for name in one.signals} == pytest.approx(one.signals, abs=1e-4)


def test_further_readings_take_no_further_pass(llama):
    """The thought is read once, and the reference answer in the batch of the row."""
    calls = []
    hook = llama.model.register_forward_hook(lambda *_: calls.append(1))
    llama.score([{"prompt": ROW["prompt"], "completion": ROW["completion"]}], signals="all")
    assert len(calls) == 1
    calls.clear()
    llama.score([ROW], signals="reference-logprob,answer-probability")
    hook.remove()
    assert len(calls) <= 2


@pytest.mark.parametrize(
    ("change", "names", "said"),
    [
        ({"answer_span": "7"}, OF_ROW[:5], "answer_span: '7' is not in the completion: give a text that it contains"),
        ({"answer_span": [3, 99]}, OF_ROW[:5], r"\[3, 99\] is not in the completion, which has 11 characters"),
        ({"answer_span": [5, 2]}, OF_ROW[:5], r"\[5, 2\] is not in the completion"),
        ({"answer_span": 5.0}, OF_ROW[:5], "answer_span: wanted a text of the completion, or .*, found float"),
        ({"answer_span": None}, OF_ROW[:5], "needs the row's `.*`: the final answer's text in the"),
        ({"reference_answer": {"a": 1}}, OF_ROW[2:5], "reference_answer: wanted the text of an answer, found dict"),
        ({"reference_answer": " "}, OF_ROW[2:5], "wanted the text of an answer, found an empty text"),
        ({"reference_answer": "x" * 200}, OF_ROW[2:5], "reference_answer: 2.. tokens, the limit is 128"),
        ({"privileged": 3}, OF_ROW[5:], "privileged: wanted text or a list of messages, found int"),
        ({"privileged": [{"role": "user", "content": "a"}]}, OF_ROW[5:], "the row is plain text, which has no place"),
        ({"privileged": "x" * 200}, OF_ROW[5:], "privileged: 226 tokens with the privileged context, the limit is 128"),
        ({"privileged": None}, OF_ROW[5:], "needs the row's `privileged`: text or messages that are added to the"),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_a_bad_input_is_the_error_of_its_signals_alone(llama, change, names, said):
    fine, found = llama.score([ROW, ROW | change], signals=["logprob", *OF_ROW])
    assert found.error is None and found.score == pytest.approx(fine.score, **CLOSE)
    assert list(found.signal_errors) == names and "\n" not in "".join(found.signal_errors.values())
    assert all(re.search(said, why) for why in found.signal_errors.values()), found.signal_errors
    rest = {name: value for name, value in fine.signals.items() if name not in names}
    assert found.signals == pytest.approx(rest, **CLOSE) and fine.signal_errors is None
    by_all = llama.score([ROW | change], signals="all")[0]
    assert (by_all.signal_errors is None) == (None in change.values())  # "all" leaves out what a row does not give
    assert not set(names) & by_all.signals.keys()


def test_an_empty_span_has_no_answer_but_a_place_for_a_reference_answer(llama):
    """The whole completion is the thought."""
    row = {"prompt": "2+3?", "completion": THOUGHT, "answer_span": [len(THOUGHT)] * 2, "reference_answer": "5"}
    (found,) = llama.score([row], signals=OF_ROW[:4])
    assert found.signal_errors == dict.fromkeys(OF_ROW[:2], "answer_span: [8, 8] is empty: there is no answer to score")
    after = logprobs(llama, ids("2+3?" + THOUGHT), ids("5"))
    assert found.signals == pytest.approx(
        {"reference-logprob": float(after.sum()), "reference-probability": float(after.exp().mean())}, **CLOSE
    )


def test_token_ids_of_a_wrong_kind_are_errors_of_their_signals(llama):
    row = {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "answer_span": [1, 2], "reference_answer": [9]}
    bad = [
        row | {"reference_answer": "five"}, row | {"reference_answer": []}, row | {"reference_answer": [999]},
        row | {"answer_span": [1, 4]}, row | {"privileged": "Hint"}, row | {"privileged": []},
        row | {"completion_mask": [1, 0, 1]},
    ]  # fmt: skip
    said = [
        "reference_answer: wanted a list of token ids, found str", "reference_answer: no token: give the ids of an",
        "token id 999 is not in the model's vocabulary of 384", "[1, 4] is not in the completion, which has 3 tokens",
        "privileged: wanted a list of token ids, found str", "privileged: no token: give the ids of the prompt",
        "answer_span: no token of the answer is scored",
    ]  # fmt: skip
    assert llama.score([row], signals="all")[0].signal_errors is None
    for found, wanted in zip(llama.score(bad, signals="all"), said, strict=True):
        assert found.error is None and found.signal_errors, wanted
        assert all(wanted in why for why in found.signal_errors.values()), found.signal_errors
    bare = EndoRewardModel(MODELS["llama"]())
    (found,) = bare.score([row | {"answer_span": "x"}], signals="answer-logprob")
    assert "text needs a tokenizer" in found.signal_errors["answer-logprob"]


def test_a_span_covers_every_token_that_holds_a_part_of_it(llama):
    """One character of several byte tokens, at the start, in the middle and at the end of a completion."""
    for text, span, tokens in (("é5", "é", (0, 2)), ("a中b", "中", (1, 4)), ("5é", "é", (1, 3)), ("55", "5", (1, 2))):
        row = {"prompt": "q", "completion": text, "answer_span": span}
        own = logprobs(llama, ids("q"), [*ids(text), EOS])
        found = llama.score([row], signals="answer-logprob")[0].signals["answer-logprob"]
        assert found == pytest.approx(float(own[slice(*tokens)].sum()), abs=1e-4), text


def test_an_empty_prompt_leaves_the_first_token_unscored_in_every_reading():
    tokenizer = byte_tokenizer(bos_token=None)
    model = EndoRewardModel(MODELS["llama"](), tokenizer)
    row = {"prompt": "", "completion": "ab5", "answer_span": "5", "privileged": "Hint."}
    (found,) = model.score([row], signals="answer-logprob,privileged-log-ratio")
    rest = [*ids("b5"), tokenizer.eos_token_id]
    own, with_hint = (logprobs(model, ids(before), rest) for before in ("a", "Hint.\n\na"))
    assert found.signals["answer-logprob"] == pytest.approx(float(own[1]), abs=1e-4)
    assert found.signals["privileged-log-ratio"] == pytest.approx(float((with_hint - own).sum()), abs=1e-3)
    (first,) = model.score([row | {"answer_span": "a"}], signals="answer-logprob")
    assert "no token of the answer is scored" in first.signal_errors["answer-logprob"]


def test_masked_tokens_count_in_no_reading(llama):
    row = {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5, 6], "completion_mask": [1, 0, 1, 1]}
    row |= {"answer_span": [1, 3], "privileged": [7, 8, 9]}
    (found,) = llama.score([row], signals="answer-logprob,privileged-log-ratio")
    own, theirs = (logprobs(llama, before, [3, 4, 5, 6]) for before in ([1, 2], [7, 8, 9]))
    assert found.signals["answer-logprob"] == pytest.approx(float(own[2]), abs=1e-4)
    ratio = (theirs - own)[torch.tensor([0, 2, 3])].sum()
    assert found.signals["privileged-log-ratio"] == pytest.approx(float(ratio), abs=1e-3)


def test_a_named_signal_that_no_row_can_have_is_an_error_of_the_call(llama):
    for name in ("log-ratio", "prefix-value"):
        with pytest.raises(EndoRewardError, match=f"signal '{name}' compares two models: give a reference model"):
            llama.score([ROW], signals=name)
    with pytest.raises(EndoRewardError, match="no option 'named'"):
        llama.score([ROW], named=["entropy"])


def test_encoded_rows_keep_their_readings(llama):
    encoded = llama.encode([ROW], signals="all")
    assert set(encoded[0].others) == {"reference_answer", "direct_answer", "privileged"}
    one, other = llama.score(encoded, signals="all")[0], llama.score([ROW], signals="all")[0]
    assert one.signals == pytest.approx(other.signals, **CLOSE)
    assert not llama.encode([ROW], signals="entropy")[0].others and not llama.encode([ROW])[0].others
