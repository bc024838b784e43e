"""Variants of known faults with chats: each scored turn is compared with the template's rendering."""

import pytest

from chat_templates import CHATML, IGNORES_SYSTEM, NO_SYSTEM, TRIMMING, chatting
from endoreward_fast.errors import EndoRewardError
from endoreward_fast.text.boundary import decode
from endoreward_fast.text.encoding import encode_row
from tiny_tokenizers import texts

USER = {"role": "user", "content": "the cat?"}
SAT = {"role": "assistant", "content": "It sat."}
THINKING = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
FIRST_PART = CHATML.replace("m['content']", "m['content'][0]['text']")


def written(template, messages, **row):
    """Return (prompt, completion, flags)."""
    tokenizer = chatting(template)
    encoded = encode_row(tokenizer, {"messages": messages, **row})
    ids, start = encoded.input_ids, encoded.prompt_length
    return decode(tokenizer, ids[:start]), decode(tokenizer, ids[start:]), encoded.flags


def asked(text, role="user"):
    return f"<|user|>{role}\n{text}<|end|>\n"


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>"])
def test_an_empty_thinking_block_of_the_generation_prompt_is_not_repeated(block):
    """Qwen3 without thinking: data often holds the empty block that the generation prompt also writes."""
    opening = THINKING.replace(
        "{{ m.content.sp", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content.sp"
    )
    for template in (THINKING, opening):
        prompt, completion, _ = written(template, [USER, SAT | {"content": f"{block}It sat."}])
        assert prompt.endswith("assistant\n<think>\n\n</think>\n\n") and completion == "It sat.<|end|>"


def test_white_space_that_a_template_trims_is_flagged():
    for text in ("It sat.\n", " It sat.", "It sat.  "):
        found = written(TRIMMING, [USER, SAT | {"content": text}])[1:]
        assert found == ("It sat.<|end|>", ("white_space",))
        assert written(CHATML, [USER, SAT | {"content": text}])[1:] == (f"{text}<|end|>", ())
    assert written(TRIMMING, [USER | {"content": " the cat?\n"}, SAT])[2] == ()  # a change of the prompt has no flag


def test_several_system_turns():
    rules = [{"role": "system", "content": text} for text in ("Be brief.", "Be kind.")]
    assert written(CHATML, [*rules, USER, SAT])[0].startswith(
        asked("Be brief.", "system") + asked("Be kind.", "system")
    )
    for template in (NO_SYSTEM, IGNORES_SYSTEM):
        prompt, _, flags = written(template, [*rules, USER, SAT])
        assert prompt.startswith(asked("Be brief.\n\nBe kind.\n\nthe cat?")) and flags == ("system_in_user",)
    first_only = "{% if messages[1].role == 'system' %}{{ raise_exception('one system turn') }}{% endif %}" + CHATML
    with pytest.raises(EndoRewardError, match="one system turn"):
        written(first_only, [*rules, USER, SAT])


def test_an_empty_system_turn_is_dropped_if_the_template_has_none():
    nothing = {"role": "system", "content": ""}
    assert written(NO_SYSTEM, [nothing, USER, SAT]) == written(NO_SYSTEM, [USER, SAT])
    assert written(CHATML, [nothing, USER, SAT])[0].startswith(asked("", "system"))


def test_a_dropped_system_prompt_is_noticed_though_the_user_repeats_it():
    rule, user = {"role": "system", "content": "Be brief."}, USER | {"content": "Be brief. The cat?"}
    prompt, _, flags = written(IGNORES_SYSTEM, [rule, user, SAT])
    assert prompt.startswith(asked("Be brief.\n\nBe brief. The cat?")) and flags == ("system_in_user",)


def test_a_dropped_earlier_turn_is_flagged_though_another_has_the_same_text():
    no_tools = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    turns = [USER, SAT, {"role": "tool", "content": "the cat?"}, USER, SAT]
    assert "context_changed" in written(no_tools, turns)[2]
    assert written(CHATML, turns)[2] == ()


def test_all_parts_are_scored_if_the_template_writes_only_the_first():
    parts = [{"type": "text", "text": text} for text in ("It ", "sat.")]
    found = written(FIRST_PART, [USER, SAT | {"content": parts}])[1:]
    assert found == ("It sat.<|end|>", ())


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("text", ["It sat.<|end|>", "It sat.<|end|>\n", "<|end|>"])
def test_an_end_in_the_text_is_scored_once_with_and_without_append_eos(text, append_eos):
    tokenizer = chatting(CHATML)
    encoded = encode_row(tokenizer, {"messages": [USER, SAT | {"content": text}]}, append_eos=append_eos)
    assert texts(tokenizer, encoded)[1] == text.strip() and "end_in_text" in encoded.flags


def test_an_end_that_is_only_written_before_a_next_turn_is_found():
    """Some templates leave the last turn open (loop.last)."""
    template = CHATML.replace("<|end|>\n", "{% if not loop.last or m['role'] == 'user' %}<|end|>\n{% endif %}")
    for text in ("It sat.", ""):
        _, completion, flags = written(template, [USER, SAT | {"content": text}])
        assert completion == f"{text}<|end|>" and "end_made_up" not in flags


KEEPS_THOUGHT = CHATML.replace(
    "{{ m['content'] }}",
    "{% set said = m.content.split('</think>') %}{% if said | length > 1 %}"
    "<think>\n{{ said[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n{{ said[1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or () %}<call>{{ c.function.name }}</call>{% endfor %}",
)
CALLS = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}


def test_reasoning_that_the_template_keeps_is_not_flagged_as_changed():
    """Qwen3 takes the reasoning out of the text and writes it again."""
    thinking = SAT | {"content": "<think>\nLook.\n</think>\n\nLet me see."} | CALLS
    turns = [USER, thinking, {"role": "tool", "content": "mat"}, SAT]
    assert written(KEEPS_THOUGHT, turns)[2] == ()
    drops = KEEPS_THOUGHT.replace("<think>\n{{ said[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n", "")
    assert written(drops, turns)[2] == ("context_changed",)


def test_an_earlier_turn_is_not_scored_if_the_template_joins_turns():
    """Gemma 4 joins what follows a tool's result to the turn before it, and no longer writes that turn's end."""
    joins = (
        "{% for m in messages %}{% if m.role != 'assistant' or not joined %}<|user|>{{ m.role }}\n{% endif %}"
        "{{ m.content }}{% if m.role == 'user' or loop.last %}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role == 'user' %}<|user|>assistant\n{% endif %}"
    )
    for header, template in (("", joins.replace("joined", "loop.index0 == 2")), ("<|user|>assistant\n", joins)):
        prompt, completion, flags = written(template, [USER, SAT | {"content": "Let me see."}, SAT])
        assert prompt.endswith(f"Let me see.{header}") and completion == "It sat.<|end|>"
        assert "opening_differs" in flags


@pytest.mark.parametrize("template", [CHATML, TRIMMING, THINKING], ids=["as it is", "trimming", "thinking"])
def test_a_completion_continues_the_assistant_turn_of_the_prompt(template):
    """A prefill gives the same prompt as transformers' continue_final_message."""
    tokenizer = chatting(template)
    begun = [USER, {"role": "assistant", "content": "It sat on"}]
    opening = tokenizer.apply_chat_template(begun, continue_final_message=True, tokenize=False)
    for completion in (" the mat.", [{"role": "assistant", "content": " the mat."}]):
        encoded = encode_row(tokenizer, {"prompt": begun, "completion": completion})
        assert texts(tokenizer, encoded) == (opening, " the mat.<|end|>")
        assert set(encoded.flags) - {"opening_differs"} == {"continues_turn"}
    nothing = encode_row(tokenizer, {"prompt": begun, "completion": ""})
    assert texts(tokenizer, nothing)[1].strip() == "<|end|>" and "empty" in nothing.flags
    turns = encode_row(tokenizer, {"messages": [*begun, SAT]})
    assert texts(tokenizer, turns)[1] == "It sat.<|end|>" and "continues_turn" not in turns.flags
