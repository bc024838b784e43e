"""Rows of plain text and of token ids are encoded, within limits of length."""

import pytest

from endoreward_fast.errors import EndoRewardError
from endoreward_fast.text.encoding import Encoded, encode_row
from tiny_tokenizers import LOSSY, PLAIN, byte_level, texts


def plain(row, tokenizer=PLAIN, **options) -> Encoded:
    return encode_row(tokenizer, row, **options)


def test_plain_text_gets_the_tokenizers_special_tokens_and_one_eos():
    encoded = plain({"prompt": "the cat", "completion": " sat"})
    assert texts(PLAIN, encoded) == ("<s>the cat", " sat</s>")
    assert encoded.terminal and encoded.truncated == 0 and encoded.flags == () and encoded.note is None
    ended = plain({"prompt": "the cat", "completion": " sat</s>"})
    assert ended.input_ids == encoded.input_ids
    other = plain({"prompt": "the cat", "completion": " sat<|end|>"}, eos_ids=[PLAIN.convert_tokens_to_ids("<|end|>")])
    assert texts(PLAIN, other)[1] == " sat<|end|>"
    assert texts(PLAIN, plain({"prompt": "the cat", "completion": " sat"}, append_eos=False))[1] == " sat"


def test_trailing_special_tokens_are_not_put_into_the_middle():
    """BERT's tokenizer ends a text with [SEP]. It is added neither to the prompt nor to the completion."""
    tokenizer = LOSSY["word pieces"]
    encoded = encode_row(tokenizer, {"prompt": "the cat", "completion": "sat"})
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert tokens[0] == "<s>" and tokens.index("</s>") == len(tokens) - 1


def test_a_system_prompt_goes_before_plain_text():
    encoded = plain({"prompt": "the cat", "completion": " sat"}, system="Be brief.")
    assert texts(PLAIN, encoded)[0] == "<s>Be brief.\n\nthe cat"


def test_an_empty_completion_is_the_token_that_ends_it():
    encoded = plain({"prompt": "the", "completion": ""})
    assert texts(PLAIN, encoded) == ("<s>the", "</s>") and encoded.flags == ("empty",) and "empty" in encoded.note
    for nothing in (
        plain({"prompt": "the", "completion": ""}, append_eos=False),
        plain({"prompt_ids": [7, 8], "completion_ids": []}),
    ):
        assert nothing.prompt_length == len(nothing.input_ids) and nothing.flags == ("empty",)


def test_special_tokens_in_a_text_are_not_added_again():
    assert texts(PLAIN, plain({"prompt": "<s>the", "completion": " cat</s>"})) == ("<s>the", " cat</s>")


def test_an_empty_prompt_becomes_bos_or_the_first_token_is_not_scored():
    assert texts(PLAIN, plain({"prompt": "", "completion": "the"})) == ("<s>", "the</s>")
    assert texts(PLAIN, plain({"prompt_ids": [], "completion_ids": [9, 10]}))[0] == "<s>"
    own = plain({"prompt_ids": [], "completion_ids": [PLAIN.bos_token_id, 10]})
    assert own.input_ids == [PLAIN.bos_token_id, 10] and own.prompt_length == 1
    without = byte_level()
    without.bos_token = None
    encoded = plain({"prompt": "", "completion": "the cat"}, without)
    assert encoded.prompt_length == 1 and encoded.flags == ("first_token_unscored",)
    assert encode_row(None, {"prompt_ids": [], "completion_ids": [3, 4]}).prompt_length == 1


def test_token_ids_stay_as_they_are():
    encoded = encode_row(None, {"prompt_ids": [5, 6], "completion_ids": (7,)})
    assert (encoded.input_ids, encoded.prompt_length, encoded.terminal) == ([5, 6, 7], 2, True)
    cut = encode_row(None, {"prompt_ids": [5, 6], "completion_ids": [7], "terminal": False})
    assert not cut.terminal and cut.flags == ("bootstrapped",)


# Limits


def test_a_row_over_the_limit_is_refused_without_truncate():
    row = {"prompt_ids": list(range(10, 20)), "completion_ids": list(range(30, 36))}
    assert encode_row(None, row, max_length=16).truncated == 0
    with pytest.raises(EndoRewardError, match="16 tokens, the limit is 15"):
        encode_row(None, row, max_length=15)
    first = encode_row(None, row, max_length=9, truncate="prompt")
    assert first.input_ids == [17, 18, 19, *range(30, 36)] and first.prompt_length == 3
    assert first.truncated == 7 and first.flags == ("truncated",) and first.terminal
    last = encode_row(None, row, max_length=13, truncate="completion")
    assert last.input_ids == [*range(10, 20), 30, 31, 32] and last.prompt_length == 10
    assert last.truncated == 3 and last.flags == ("truncated", "bootstrapped") and not last.terminal


def test_cutting_the_prompt_keeps_bos_and_one_token():
    bos = PLAIN.bos_token_id
    row = {"prompt_ids": [bos, 10, 11, 12], "completion_ids": [20, 21]}
    assert plain(row, max_length=4, truncate="prompt").input_ids == [bos, 12, 20, 21]
    with pytest.raises(EndoRewardError, match="no room for the completion's 2"):
        plain(row, max_length=3, truncate="prompt")
    assert encode_row(None, row, max_length=3, truncate="prompt").input_ids == [12, 20, 21]
    with pytest.raises(EndoRewardError, match="no room for the prompt's 4"):
        plain(row, max_length=4, truncate="completion")
