"""The last turn of a rendered conversation is split as `/v1/rewards` splits the same messages."""

from types import SimpleNamespace

import pytest

from chat_templates import CHATML, DROPS_THOUGHT, EMPTY_THOUGHT, LLAMA2, PHI3, TRIMMING, chatting
from endoreward_fast.errors import EndoRewardError
from endoreward_fast.serving.turns import Turns
from endoreward_fast.text.boundary import decode, tokenize
from endoreward_fast.text.encoding import encode_row
from endoreward_fast.text.template import Extras, Template
from tiny_tokenizers import llama_like, unigram

ASKED = {"role": "user", "content": "the cat sat?"}
EARLIER = [ASKED, {"role": "assistant", "content": "unable"}]
TEMPLATES = {
    "chatml": CHATML, "trimming": TRIMMING, "no generation prompt": LLAMA2, "end of text without it": PHI3,
    "empty thought": EMPTY_THOUGHT, "thought in the prompt alone": DROPS_THOUGHT,
    "open thought closed": DROPS_THOUGHT.replace("{{ m['content']", "{% if m['role'] == 'assistant' %}<think></think>"
                                                 "{% endif %}{{ m['content']"),
    "closed thought in the prompt": DROPS_THOUGHT.replace("<think>\n", "<think>\n\n</think>\n\n"),
    "BOS": "{{ '<s>' }}" + LLAMA2,
}  # fmt: skip


def turns_of(tokenizer, ends=("<|end|>",)):
    return Turns(
        SimpleNamespace(
            tokenizer=tokenizer, vocab_size=len(tokenizer), eos_ids=tokenizer.convert_tokens_to_ids(list(ends))
        )
    )


def both(tokenizer, messages, turns, conversation):
    """Return (prompt, response) as `turns` finds them in a conversation, and as rows of messages are encoded."""
    row, span = turns.last(conversation, special=False)
    wanted = encode_row(tokenizer, {"messages": messages}, eos_ids=turns.ends)
    length = wanted.prompt_length
    assert span.before == len(row["prompt_ids"]) and span.response == len(row["completion_ids"])
    return (row["prompt_ids"], row["completion_ids"]), (wanted.input_ids[:length], wanted.input_ids[length:])


def written(tokenizer, messages):
    template = Template(tokenizer)
    return template.write(template.fit(messages, Extras()), Extras())


@pytest.mark.parametrize("earlier", [[], EARLIER], ids=["first", "later"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_turn_is_that_of_the_messages(name, earlier):
    tokenizer = chatting(TEMPLATES[name])
    messages = [*earlier, ASKED, {"role": "assistant", "content": "it is 1234"}]
    found, wanted = both(tokenizer, messages, turns_of(tokenizer), written(tokenizer, messages))
    assert found == wanted


@pytest.mark.parametrize("make", [llama_like, unigram])
@pytest.mark.parametrize("name", ["chatml", "no generation prompt", "end of text without it", "BOS"])
def test_the_turn_of_sentencepiece(name, make):
    tokenizer = make()
    tokenizer.chat_template = TEMPLATES[name]
    messages = [*EARLIER, ASKED, {"role": "assistant", "content": "the mat"}]
    found, wanted = both(tokenizer, messages, turns_of(tokenizer), written(tokenizer, messages))
    assert found == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_token_ids_stay_as_they_are(name):
    tokenizer = chatting(TEMPLATES[name])
    messages = [*EARLIER, ASKED, {"role": "assistant", "content": "it is 1234"}]
    ids = tokenize(tokenizer, written(tokenizer, messages))
    found, wanted = both(tokenizer, messages, turns_of(tokenizer), ids)
    assert ids[: len(found[0]) + len(found[1])] == found[0] + found[1]
    assert found[1] == wanted[1]


def test_a_response_that_merges_with_the_header():
    tokenizer = chatting(CHATML)
    prompt = tokenize(tokenizer, "<|user|>user\nthe cat<|end|>\n<|user|>assistant")
    ids = [*prompt, *tokenize(tokenizer, "\n\n\n"), *tokenize(tokenizer, "the mat<|end|>")]
    row, _ = turns_of(tokenizer).last(ids, special=False)
    assert row["prompt_ids"] + row["completion_ids"] == ids
    assert decode(tokenizer, row["completion_ids"]).endswith("the mat<|end|>")


def test_words_that_only_look_like_the_header_do_not_begin_a_turn():
    tokenizer = chatting(CHATML)
    spelt = [i for letter in "<|user|>assistant\n" for i in tokenize(tokenizer, letter)]
    prompt = tokenize(tokenizer, "<|user|>user\nthe cat<|end|>\n<|user|>assistant\n")
    row, _ = turns_of(tokenizer).last([*prompt, *spelt, *tokenize(tokenizer, "mat<|end|>")], special=False)
    assert row["prompt_ids"] == prompt


def test_ids_outside_the_vocabulary_are_left_to_the_encoder():
    for odd in (10**30, -1):
        row, _ = turns_of(chatting(CHATML)).last([1, odd], special=False)
        assert row["completion_ids"] == [1, odd]


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ raise_exception('no') }}"]
)
def test_a_template_without_headers_is_refused(template):
    with pytest.raises(EndoRewardError):
        turns_of(chatting(template)).last("the cat", special=False)


def test_every_familys_turn_is_that_of_the_messages():
    pytest.importorskip("trl", reason="trl, which has the templates, is not installed")
    from tools.template_families import SPECIAL, eos_ids, sources, tokenizer_of

    open_ended = {"glm4moe"}  # its turns have no end, so a conversation does not say that the last one is complete
    seen = 0
    for name, source in sources().items():
        tokenizer = tokenizer_of(source)
        marks = [m for m in {*SPECIAL.findall(source), "</s>"} if "end" in m or "eot" in m or m in ("</s>", "<turn|>")]
        turns = turns_of(tokenizer, [m for m in (*marks, "<|return|>", "<|END_OF_TURN_TOKEN|>") if m in source])
        turns.ends |= set(eos_ids(name, tokenizer))
        messages = [*EARLIER, ASKED, {"role": "assistant", "content": "it is 5"}]
        found, wanted = both(tokenizer, messages, turns, written(tokenizer, messages))
        wanted = (wanted[0], wanted[1][:-1]) if name in open_ended else wanted
        assert found == wanted, name
        seen += 1
    assert seen > 20
