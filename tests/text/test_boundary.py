"""The boundary between prompt and completion is exact for five kinds of tokenizers."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from endoreward_fast.text.boundary import decode, split_ids, token_texts, tokenize
from tiny_tokenizers import FRAGMENTS, LOSSLESS, LOSSY, PLAIN, PREFIXED, TEXT


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(prompt=TEXT, completion=TEXT)
@example(prompt="a ", completion="b")
@example(prompt="un", completion="able")
@example(prompt="x\n", completion="\ny")
@example(prompt="12", completion="34")
@example(prompt="the", completion=" cat")
@example(prompt="", completion=" the cat")
@example(prompt="a", completion=" ")
@example(prompt="e", completion="\u0301")
def test_prompt_and_completion_tokens_each_decode_to_their_own_text(name, prompt, completion):
    tokenizer = LOSSLESS[name]
    before, after = split_ids(tokenizer, prompt, completion)
    assert before == tokenize(tokenizer, prompt)
    assert decode(tokenizer, before) == prompt
    assert decode(tokenizer, before + after) == prompt + completion
    assert bool(after) == bool(completion)


@pytest.mark.parametrize("name", PREFIXED)
@settings(max_examples=80, deadline=None)
@given(prompt=st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), completion=TEXT)
@example(prompt="un", completion="able")
@example(prompt="the c", completion="at")
def test_a_dummy_space_is_added_at_most_once(name, prompt, completion):
    """These tokenizers lose white space and unknown characters, but no more of them than from the whole text."""
    tokenizer = PREFIXED[name]
    before, after = split_ids(tokenizer, prompt, completion)
    assert before == tokenize(tokenizer, prompt)
    known = tokenizer.unk_token_id not in before + after
    if known:
        assert decode(tokenizer, before + after) == decode(tokenizer, tokenize(tokenizer, prompt + completion))


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_tokens_of_the_whole_text_are_kept_if_none_crosses_the_boundary(name, prompt, completion):
    tokenizer = LOSSLESS[name]
    before, after = split_ids(tokenizer, prompt, completion)
    whole = tokenize(tokenizer, prompt + completion)
    if whole[: len(before)] == before:
        assert before + after == whole


@pytest.mark.parametrize("name", LOSSY)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_tokenizers_that_lose_characters_lose_none_of_the_completion(name, prompt, completion):
    tokenizer = LOSSY[name]
    before, after = split_ids(tokenizer, prompt, completion)
    assert before == tokenize(tokenizer, prompt)
    assert bool(after) == bool(tokenize(tokenizer, completion))


def test_the_space_before_a_merged_word_stays_with_the_prompt():
    """Trimmed offsets say that " hello" begins at the h. By them the space of the prompt would be scored."""
    before, after = split_ids(PLAIN, "the ", "cat")
    whole = tokenize(PLAIN, "the cat")
    assert before + after != whole and decode(PLAIN, [whole[-1]]) == " cat"
    assert decode(PLAIN, before) == "the " and decode(PLAIN, after) == "cat"


def test_word_pieces_continue_a_word():
    tokenizer = LOSSY["word pieces"]
    before, after = split_ids(tokenizer, "un", "able")
    assert tokenizer.convert_ids_to_tokens(after)[0].startswith("##")
    assert decode(tokenizer, before + after) == "unable"
    # "una" + "ble": the whole text has a token that crosses the boundary
    before, after = split_ids(tokenizer, "una", "ble")
    assert decode(tokenizer, before + after) == "unable"
    assert decode(tokenizer, before) == "una"


def test_unknown_characters_are_not_swallowed_by_the_prompt():
    """Two neighbouring unknown characters are one token. By ids alone the completion would have no token."""
    tokenizer = PREFIXED["unigram, first"]
    before, after = split_ids(tokenizer, "the ☃", "☂")
    assert before == tokenize(tokenizer, "the ☃") and after == [tokenizer.unk_token_id]
    before, after = split_ids(tokenizer, "the ☃", "☂ cat")
    assert before == tokenize(tokenizer, "the ☃")
    assert after == [tokenizer.unk_token_id, *tokenize(tokenizer, "the cat")[len(tokenize(tokenizer, "the")) :]]


@pytest.mark.parametrize("name", [*LOSSLESS, *PREFIXED])
@settings(max_examples=60, deadline=None)
@given(text=TEXT, start=st.integers(0, 20))
def test_token_texts_join_to_the_text(name, text, start):
    tokenizer = (LOSSLESS | PREFIXED)[name]
    ids = tokenize(tokenizer, text)
    start = min(start, len(ids))
    texts = token_texts(tokenizer, ids, start)
    assert len(texts) == len(ids) - start
    joined = "".join(texts)
    if start == 0:
        assert joined == decode(tokenizer, ids)
    elif "\N{REPLACEMENT CHARACTER}" not in decode(tokenizer, ids[:start]) + text:
        assert decode(tokenizer, ids) == decode(tokenizer, ids[:start]) + joined
