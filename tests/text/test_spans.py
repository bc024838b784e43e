"""The tokens of an answer are those of the completion, whatever words the chat template writes around it."""

import pytest

from chat_templates import CHATML, DROPS_THOUGHT, EMPTY_THOUGHT, LLAMA2, NO_END, PHI3, TRIMMING, chatting
from endoreward_fast.errors import EndoRewardError
from endoreward_fast.text import readings
from endoreward_fast.text.boundary import decode
from endoreward_fast.text.encoding import Encoder

TEMPLATES = {"ChatML": CHATML, "Llama 2": LLAMA2, "Phi 3": PHI3, "trims": TRIMMING, "thought": EMPTY_THOUGHT}


def answer(template, completion, span, **given):
    """Return the text of the answer's tokens, and of the reference answer's if there is one."""
    encoder = Encoder(chatting(template))
    row = {"prompt": "hm?", "completion": completion, "answer_span": span, **given}
    encoded = encoder.encode(row)
    start, stop = readings.answer_span(encoder, row, encoded)
    other = readings.after_thought(encoder, row) if given else None
    found = [decode(encoder.tokenizer, encoded.input_ids[start:stop])]
    return found + [decode(encoder.tokenizer, one.input_ids[one.prompt_length :]) for one in (other,) if one]


@pytest.mark.parametrize("template", [*TEMPLATES.values(), NO_END, None], ids=[*TEMPLATES, "no end", "plain"])
@pytest.mark.parametrize("text", ["hi", "think", "n", "end", "s", "/", ">", "nd", "INST"])
def test_words_of_the_template_are_no_answer(template, text):
    """Each text is a part of "<think>", "</think>", "<|end|>", "</s>" or "[/INST]"."""
    encoder = Encoder(chatting(template) if template else chatting(CHATML), chat=None if template else False)
    row = {"prompt": "x", "completion": text, "answer_span": text}
    encoded = encoder.encode(row)
    start, stop = readings.answer_span(encoder, row, encoded)
    assert decode(encoder.tokenizer, encoded.input_ids[start:stop]).strip() == text
    rest = decode(encoder.tokenizer, encoded.input_ids[stop:])
    other = encoder.encode(row | {"completion": "0"})
    assert decode(encoder.tokenizer, other.input_ids).endswith(f"0{rest}")


def test_the_end_of_the_turn_is_no_answer_where_the_template_trims():
    assert answer(TRIMMING, "it is 4 \n", "4 \n", reference_answer="5 ") == ["4", "5"]
    assert answer(CHATML, "it is 4 \n", "4 \n", reference_answer="5 ") == ["4 \n", "5 "]
    assert answer(TRIMMING, "\n 4", "\n 4") == ["4"] and answer(TRIMMING, " 4 ", [0, 2]) == ["4"]
    for span in ([0, 2], "  "):
        with pytest.raises(EndoRewardError, match="answer_span: the chat template leaves these characters out"):
            answer(TRIMMING, "  4  ", span)


def test_a_text_that_repeats_the_thought_that_the_prompt_opens_is_found():
    for text in ("hm\n</think>\n\n4", "<think>\nhm\n</think>\n\n4"):
        assert answer(DROPS_THOUGHT, text, "4", reference_answer="five") == ["4", "five"]
        assert answer(DROPS_THOUGHT, text, "hm") == ["hm"]


def test_special_tokens_of_a_row_of_ids_are_no_answer():
    tokenizer = chatting(CHATML)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("hm?", "the end is n<|end|>")]
    for text in ("end", "n", "e", "d"):
        row = {"prompt_ids": ids[0], "completion_ids": ids[1], "answer_span": text}
        encoder = Encoder(tokenizer)
        start, stop = readings.answer_span(encoder, row, encoder.encode(row))
        whole = [*ids[0], *ids[1]]
        assert decode(tokenizer, whole[start:stop]).strip().endswith(text) and stop < len(whole), text
    with pytest.raises(EndoRewardError, match=r"'\|end\|' is not in the completion"):
        readings.answer_span(encoder, row | {"answer_span": "|end|"}, encoder.encode(row))
