"""Chats are encoded exactly, for the shapes of templates in use and for any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import (
    CHATML,
    DROPS_THOUGHT,
    EMPTY_THOUGHT,
    IGNORES_SYSTEM,
    LLAMA2,
    NO_END,
    NO_SYSTEM,
    PHI3,
    TRIMMING,
    chatting,
)
from endoreward_fast.errors import EndoRewardError
from endoreward_fast.text.encoding import Encoded, encode_row
from endoreward_fast.text.row_flags import FLAGS
from tiny_tokenizers import PLAIN, TEXT, texts

MUTE = "<|user|>hello"


ROW = {"prompt": "the cat?", "completion": "It sat."}


ASKED = "<|user|>user\nthe cat?<|end|>\n<|user|>assistant\n"


@pytest.mark.parametrize(
    "template, before, scored, flags",
    [
        (CHATML, ASKED, "It sat.<|end|>", ()),
        (TRIMMING, ASKED, "It sat.<|end|>", ()),
        (LLAMA2, "[INST] the cat? [/INST]", " It sat. </s>", ()),
        (PHI3, ASKED, "It sat.<|end|>", ()),
        (EMPTY_THOUGHT, ASKED, "<think>\n\n</think>\n\nIt sat.<|end|>", ()),
        (DROPS_THOUGHT, ASKED.replace("<|end|>\n", "<|end|>"), "It sat.<|end|>", ("opening_differs",)),
        (NO_END, "user: the cat?\nassistant: ", "It sat.</s>", ("end_made_up",)),
    ],
)
def test_templates_say_where_the_turn_begins_and_ends(template, before, scored, flags):
    tokenizer = chatting(template)
    as_messages = {"messages": [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "It sat."}]}
    for row in (ROW, as_messages, ROW | {"completion": as_messages["messages"][1:]}):
        encoded = encode_row(tokenizer, row)
        assert texts(tokenizer, encoded) == (before, scored) and encoded.terminal and encoded.flags == flags
    assert texts(tokenizer, encode_row(tokenizer, ROW, append_eos=False))[1].strip().endswith("It sat.")


def test_reasoning_is_scored_as_it_was_generated():
    thought = "<think>\nhm\n</think>\n\nIt sat."
    kept = encode_row(chatting(EMPTY_THOUGHT), ROW | {"completion": thought})
    assert texts(PLAIN, kept) == (ASKED, thought + "<|end|>")
    assert kept.flags == ()
    # The same, whether or not the text repeats the thinking block that the generation prompt opens.
    for completion in (thought.removeprefix("<think>\n"), thought):
        dropped = encode_row(chatting(DROPS_THOUGHT), ROW | {"completion": completion})
        assert texts(PLAIN, dropped) == (
            "<|user|>user\nthe cat?<|end|><|user|>assistant\n<think>\n", "hm\n</think>\n\nIt sat.<|end|>",
        )  # fmt: skip
        assert dropped.flags == ("template_rewrites",)


def test_a_completion_that_also_occurs_earlier_is_scored_in_its_turn():
    """Searching the rendered text for the completion would hit the prompt, a header or the thinking block."""
    for word in ("the cat?", "user", "h", "think"):
        tokenizer = chatting(EMPTY_THOUGHT)
        encoded = encode_row(tokenizer, ROW | {"completion": word})
        assert texts(tokenizer, encoded) == (ASKED, f"<think>\n\n</think>\n\n{word}<|end|>")


def test_text_is_plain_on_request_and_without_a_template():
    tokenizer = chatting(CHATML)
    for row, options in ((ROW, {"chat": False}), (ROW | {"chat": False}, {})):
        assert texts(tokenizer, encode_row(tokenizer, row, **options))[0] == "the cat?"
    with pytest.raises(EndoRewardError, match="has no chat template"):
        encode_row(PLAIN, ROW, chat=True)
    with pytest.raises(EndoRewardError, match="has no chat template"):
        encode_row(PLAIN, {"messages": [{"role": "assistant", "content": "hi"}]})
    with pytest.raises(EndoRewardError, match="row holds messages"):
        encode_row(tokenizer, {"messages": [{"role": "assistant", "content": "hi"}]}, chat=False)


def test_a_system_prompt_precedes_the_rows_own():
    tokenizer = chatting(CHATML)
    assert "system\nS<|end|>" in texts(tokenizer, encode_row(tokenizer, ROW, system="S"))[0]
    row = {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}], "completion": "c"}
    assert "system\nS\n\nown<|end|>" in texts(tokenizer, encode_row(tokenizer, row, system="S"))[0]
    assert "system\nown<|end|>" in texts(tokenizer, encode_row(tokenizer, row))[0]


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_without_a_system_turn_the_system_prompt_leads_the_user_turn(template):
    tokenizer = chatting(template)
    encoded = encode_row(tokenizer, ROW, system="Be brief.")
    assert "user\nBe brief.\n\nthe cat?<|end|>" in texts(tokenizer, encoded)[0]
    assert encoded.flags == ("system_in_user",)


def test_only_the_last_of_several_turns_is_scored():
    tokenizer = chatting(CHATML)
    turns = [{"role": role, "content": role[0]} for role in ("assistant", "user", "assistant")]
    encoded = encode_row(tokenizer, {"prompt": "p", "completion": turns})
    assert texts(tokenizer, encoded)[1] == "a<|end|>" and encoded.flags == ("context_turns",)
    assert encode_row(tokenizer, {"messages": turns}).flags == ()


@pytest.mark.parametrize(
    "template, end", [(CHATML, "<|end|>"), (TRIMMING, "<|end|>"), (LLAMA2, " </s>"), (NO_END, "</s>")]
)
def test_an_empty_turn_is_scored_as_its_end(template, end):
    """A model that says nothing ends its turn at once. This holds even if the template trims white space."""
    tokenizer = chatting(template)
    for completion in ("", " ") if template == TRIMMING else ("",):
        encoded = encode_row(tokenizer, ROW | {"completion": completion})
        assert texts(tokenizer, encoded)[1] == end and "empty" in encoded.flags
    nothing = encode_row(tokenizer, ROW | {"completion": ""}, append_eos=False)
    assert nothing.prompt_length == len(nothing.input_ids) and nothing.flags == ("empty",)


USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "x"}, "found prompt"),
        ({}, "found nothing"),
        ("text", "found str"),
        ({"prompt": 3, "completion": "x"}, "prompt: wanted text or a list of {role, content}, found int"),
        ({"prompt": "x", "completion": None}, "completion: .* found nothing"),
        ({"prompt": "x", "completion": [{"role": "assistant"}]}, "wanted content or tool_calls, found keys role"),
        ({"messages": "hello"}, "messages: .* found str"),
        ({"messages": []}, "the assistant's, found 'none'"),
        ({"messages": [USER]}, "the assistant's, found 'user'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content: wanted text, found nothing"),
        ({"prompt_ids": [1, "2"], "completion_ids": [1]}, "prompt_ids: wanted a list of token ids, found a list"),
        ({"prompt_ids": [1], "completion_ids": [1.5]}, "completion_ids: wanted"),
        ({"prompt_ids": [1], "completion_ids": [True]}, "completion_ids: wanted"),
    ],
)
def test_a_malformed_row_is_an_error_of_one_line(row, said):
    with pytest.raises(EndoRewardError, match=said) as caught:
        encode_row(chatting(CHATML), row)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_is_an_error_of_the_row():
    with pytest.raises(EndoRewardError, match="no place for a system prompt, and no user turn"):
        encode_row(chatting(NO_SYSTEM), {"messages": [{"role": "system", "content": "s"}, ROW_ANSWER]})
    with pytest.raises(EndoRewardError, match="refuses the conversation: roles must alternate"):
        encode_row(chatting("{{ raise_exception('roles must alternate') }}"), ROW, system="S")
    with pytest.raises(EndoRewardError, match="does not write the assistant's turn"):
        encode_row(chatting(MUTE), ROW)
    with pytest.raises(EndoRewardError, match="refuses the conversation"):
        encode_row(chatting("{{ messages[0]['content'] + 1 }}"), ROW)
    with pytest.raises(EndoRewardError, match="token ids"):
        encode_row(chatting(CHATML), {"prompt_ids": [1], "completion_ids": [2]}, system="S")
    with pytest.raises(EndoRewardError, match="text needs a tokenizer"):
        encode_row(None, ROW)


ROW_ANSWER = {"role": "assistant", "content": "It sat."}


@settings(max_examples=100, deadline=None)
@given(prompt=TEXT, completion=TEXT.filter(str.strip), system=st.sampled_from([None, "S"]))
def test_any_chat_splits_into_the_rendered_prompt_and_the_completion(prompt, completion, system):
    tokenizer = CHATTING
    encoded = encode_row(tokenizer, {"prompt": prompt, "completion": completion}, system=system)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": prompt}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert texts(tokenizer, encoded) == (expected, completion + "<|end|>")


CHATTING = chatting(CHATML)


def test_flags_are_explained_in_words():
    assert set(Encoded([], 0, True, flags=tuple(FLAGS)).note.split("; ")) == set(FLAGS.values())
