"""Text, chats and ids -> tokens, with an exact seam: tokenizers of five kinds built here, and the templates in use."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from endoreward_fast.boundary import decode, split_ids, token_texts, tokenize
from endoreward_fast.encoding import FLAGS, Encoded, encode_row
from endoreward_fast.errors import EndoRewardError

CORPUS = [
    "the cat sat on the mat, and the other cats ran away; it wasn't unable to see 1234 or 56 things.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(12, 34))\n",
    "unable cable table stable ableness. The capital of France is Paris.  Two  spaces   three.",
    "naïve café déjà vu, 中文字符 and emoji 🙂🙃 are here; a tab\tand CR\r\n too.",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def trained(model, trainer, *, pre=None, norm=None, decoder=None, post=None):
    tokenizer = Tokenizer(model)
    if norm is not None:
        tokenizer.normalizer = norm
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(CORPUS, trainer)
    if post is not None:
        tokenizer.post_processor = post
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[3:], clean_up_tokenization_spaces=False, **NAMES
    )


def with_bos(bos="<s>"):
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, SPECIAL.index(bos))])


def byte_level(*, trim=False, prefix=False, bos=False):
    post = [processors.ByteLevel(trim_offsets=trim)] + ([with_bos()] if bos else [])
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
        pre=pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        decoder=decoders.ByteLevel(),
        post=processors.Sequence(post),
    )


def merging_bytes():
    """Byte-level BPE without pre-tokenization by words: it merges across anything."""
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
        pre=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\n+"), "merged_with_next"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        decoder=decoders.ByteLevel(),
    )


def unigram(scheme="first"):
    """SentencePiece's Unigram: every text begins with a dummy space."""
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>"),
        pre=pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoder=decoders.Metaspace(prepend_scheme=scheme),
        post=with_bos(),
    )


def llama_like():
    """SentencePiece's BPE as Llama 2 has it: the dummy space is a normalizer's, unknown characters fall to bytes."""
    return trained(
        models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + [f"<0x{i:02X}>" for i in range(256)]),
        norm=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1, right=0),
            ]
        ),
        post=with_bos(),
    )


def word_piece():
    """BERT's: lower case, continuation marked by ##, white space dropped."""
    return trained(
        models.WordPiece(unk_token="<unk>", continuing_subword_prefix="##"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, continuing_subword_prefix="##"),
        norm=normalizers.BertNormalizer(),
        pre=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(prefix="##", cleanup=False),
        post=processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
    )


def words():
    return trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(vocab_size=300, special_tokens=SPECIAL),
        pre=pre_tokenizers.Whitespace(),
    )


LOSSLESS = {
    "byte-level": byte_level(),
    "byte-level, trimmed offsets, BOS": byte_level(trim=True, bos=True),
    "bytes merged across words": merging_bytes(),
    "llama-like": llama_like(),
}
PREFIXED = {
    "byte-level with prefix space": byte_level(prefix=True),
    "unigram, first": unigram("first"),
    "unigram, always": unigram("always"),
}
LOSSY = {"word pieces": word_piece(), "words": words()}
PLAIN = LOSSLESS["byte-level, trimmed offsets, BOS"]

# Pieces of the corpus, whose merges a tokenizer knows, and anything else.
FRAGMENTS = [
    "un",
    "able",
    " ",
    "  ",
    "\n",
    "\n\n",
    "12",
    "34",
    "'t",
    "wasn",
    "ca",
    "t",
    "é",
    "中",
    "文",
    "🙂",
    "\t",
    ".",
    " the",
]
TEXT = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
)


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
def test_the_pieces_spell_the_text_and_each_its_own_side(name, prompt, completion):
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
def test_a_dummy_space_comes_once_at_most(name, prompt, completion):
    """These lose white space or unknown characters; they must lose no more than they do with the whole text."""
    tokenizer = PREFIXED[name]
    before, after = split_ids(tokenizer, prompt, completion)
    assert before == tokenize(tokenizer, prompt)
    known = tokenizer.unk_token_id not in before + after
    if known:
        assert decode(tokenizer, before + after) == decode(tokenizer, tokenize(tokenizer, prompt + completion))


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_where_the_whole_text_has_a_seam_its_tokens_are_kept(name, prompt, completion):
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
    """Trimmed offsets say that " hello" begins at the h: to believe them is to score the prompt's space."""
    before, after = split_ids(PLAIN, "the ", "cat")
    whole = tokenize(PLAIN, "the cat")
    assert before + after != whole and decode(PLAIN, [whole[-1]]) == " cat"
    assert decode(PLAIN, before) == "the " and decode(PLAIN, after) == "cat"


def test_word_pieces_continue_a_word():
    tokenizer = LOSSY["word pieces"]
    before, after = split_ids(tokenizer, "un", "able")
    assert tokenizer.convert_ids_to_tokens(after)[0].startswith("##")
    assert decode(tokenizer, before + after) == "unable"
    # "una" + "ble": the whole has other pieces across the seam
    before, after = split_ids(tokenizer, "una", "ble")
    assert decode(tokenizer, before + after) == "unable"
    assert decode(tokenizer, before) == "una"


def test_unknown_characters_are_not_swallowed_by_the_prompt():
    """Two unknown characters are one unknown token: equal ids would leave the completion with none."""
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


# Rows of plain text


def plain(row, tokenizer=PLAIN, **options) -> Encoded:
    return encode_row(tokenizer, row, **options)


def texts(tokenizer, encoded):
    ids, n = encoded.input_ids, encoded.prompt_length
    return decode(tokenizer, ids[:n]), decode(tokenizer, ids[n:])


def test_plain_text_has_what_the_tokenizer_adds_and_one_eos():
    encoded = plain({"prompt": "the cat", "completion": " sat"})
    assert texts(PLAIN, encoded) == ("<s>the cat", " sat</s>")
    assert encoded.terminal and encoded.truncated == 0 and encoded.flags == () and encoded.note is None
    ended = plain({"prompt": "the cat", "completion": " sat</s>"})
    assert ended.input_ids == encoded.input_ids
    other = plain({"prompt": "the cat", "completion": " sat<|end|>"}, eos_ids=[PLAIN.convert_tokens_to_ids("<|end|>")])
    assert texts(PLAIN, other)[1] == " sat<|end|>"
    assert texts(PLAIN, plain({"prompt": "the cat", "completion": " sat"}, append_eos=False))[1] == " sat"


def test_trailing_special_tokens_are_not_put_into_the_middle():
    """BERT's tokenizer ends a text with [SEP]: it belongs behind the prompt no more than behind the completion."""
    tokenizer = LOSSY["word pieces"]
    encoded = encode_row(tokenizer, {"prompt": "the cat", "completion": "sat"})
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert tokens[0] == "<s>" and tokens.index("</s>") == len(tokens) - 1


def test_a_system_prompt_goes_before_plain_text():
    encoded = plain({"prompt": "the cat", "completion": " sat"}, system="Be brief.")
    assert texts(PLAIN, encoded)[0] == "<s>Be brief.\n\nthe cat"


@pytest.mark.parametrize("row", [{"prompt": "the", "completion": ""}, {"prompt_ids": [7, 8], "completion_ids": []}])
def test_an_empty_completion_is_flagged_and_gets_no_eos(row):
    encoded = plain(row)
    assert encoded.prompt_length == len(encoded.input_ids) and encoded.flags == ("empty",)
    assert "empty" in encoded.note


def test_before_an_empty_prompt_goes_bos_or_the_first_token_is_not_scored():
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


def test_a_row_over_the_limit_is_refused_unless_told_where_to_cut():
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
    with pytest.raises(EndoRewardError, match="no room beside the completion's 2"):
        plain(row, max_length=3, truncate="prompt")
    assert encode_row(None, row, max_length=3, truncate="prompt").input_ids == [12, 20, 21]
    with pytest.raises(EndoRewardError, match="no room beside the prompt's 4"):
        plain(row, max_length=4, truncate="completion")


# Chats: the shapes of templates in use

HEAD = "{% for m in messages %}"
CHATML = HEAD + (
    "<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
LLAMA2 = HEAD + (
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
PHI3 = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
EMPTY_THOUGHT = HEAD + (
    "<|user|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
DROPS_THOUGHT = HEAD + (
    "<|user|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n<think>\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
IGNORES_SYSTEM = CHATML.replace(HEAD, "{% for m in messages if m['role'] != 'system' %}")
NO_END = HEAD + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
MUTE = "<|user|>hello"


def chatting(template):
    tokenizer = byte_level(trim=True)
    tokenizer.chat_template = template
    return tokenizer


ROW = {"prompt": "the cat?", "completion": "It sat."}


@pytest.mark.parametrize(
    "template, before, scored",
    [
        (CHATML, "<|user|>user\nthe cat?<|end|>\n<|user|>assistant\n", "It sat.<|end|>"),
        (TRIMMING, "<|user|>user\nthe cat?<|end|>\n<|user|>assistant\n", "It sat.<|end|>"),
        (LLAMA2, "[INST] the cat? [/INST]", " It sat. </s>"),
        (PHI3, "<|user|>user\nthe cat?<|end|>\n<|user|>assistant\n", "It sat.<|end|>"),
        (EMPTY_THOUGHT, "<|user|>user\nthe cat?<|end|>\n<|user|>assistant\n<think>\n\n</think>\n\n", "It sat.<|end|>"),
        (DROPS_THOUGHT, "<|user|>user\nthe cat?<|end|><|user|>assistant\n", "It sat.<|end|>"),
        (NO_END, "user: the cat?\nassistant: ", "It sat.</s>"),
    ],
)
def test_templates_say_where_the_turn_begins_and_ends(template, before, scored):
    tokenizer = chatting(template)
    as_messages = {"messages": [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "It sat."}]}
    for row in (ROW, as_messages, ROW | {"completion": as_messages["messages"][1:]}):
        encoded = encode_row(tokenizer, row)
        assert texts(tokenizer, encoded) == (before, scored) and encoded.terminal and not encoded.flags
    assert texts(tokenizer, encode_row(tokenizer, ROW, append_eos=False))[1].strip() == "It sat."


def test_reasoning_is_scored_as_it_was_generated():
    thought = "<think>\nhm\n</think>\n\nIt sat."
    kept = encode_row(chatting(EMPTY_THOUGHT), ROW | {"completion": thought})
    assert texts(PLAIN, kept) == ("<|user|>user\nthe cat?<|end|>\n<|user|>assistant\n", thought + "<|end|>")
    assert kept.flags == ()
    for completion, opening in (("hm\n</think>\n\nIt sat.", "<think>\n"), (thought, "")):
        dropped = encode_row(chatting(DROPS_THOUGHT), ROW | {"completion": completion})
        assert texts(PLAIN, dropped) == (
            "<|user|>user\nthe cat?<|end|><|user|>assistant\n" + opening, completion + "<|end|>",
        )  # fmt: skip
        assert dropped.flags == ("template_rewrites",)


def test_a_completion_found_elsewhere_in_the_conversation_is_not_mistaken():
    """Searching the rendered text for the completion would hit the prompt, a header or the thinking block."""
    for word in ("the cat?", "user", "h", "think", "\n"):
        tokenizer = chatting(EMPTY_THOUGHT)
        assert texts(tokenizer, encode_row(tokenizer, ROW | {"completion": word}))[1] == word + "<|end|>"


def test_plain_text_on_request_and_wherever_there_is_no_template():
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
def test_a_template_without_a_system_turn_gets_it_in_the_users(template):
    tokenizer = chatting(template)
    encoded = encode_row(tokenizer, ROW, system="Be brief.")
    assert "user\nBe brief.\n\nthe cat?<|end|>" in texts(tokenizer, encoded)[0]
    assert encoded.flags == ("system_in_user",)


def test_of_several_turns_the_last_is_scored():
    tokenizer = chatting(CHATML)
    turns = [{"role": role, "content": role[0]} for role in ("assistant", "user", "assistant")]
    encoded = encode_row(tokenizer, {"prompt": "p", "completion": turns})
    assert texts(tokenizer, encoded)[1] == "a<|end|>" and encoded.flags == ("context_turns",)
    assert encode_row(tokenizer, {"messages": turns}).flags == ()


def test_an_empty_turn_is_empty():
    tokenizer = chatting(CHATML)
    encoded = encode_row(tokenizer, ROW | {"completion": ""})
    assert encoded.prompt_length == len(encoded.input_ids) and encoded.flags == ("empty",)


USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "x"}, "found prompt"),
        ({}, "found nothing"),
        ("text", "found str"),
        ({"prompt": 3, "completion": "x"}, "prompt: wanted text or a list of {role, content}, found int"),
        ({"prompt": "x", "completion": None}, "completion: .* found nothing"),
        ({"prompt": "x", "completion": [{"role": "assistant"}]}, "found a list of dict of keys role"),
        ({"messages": "hello"}, "messages: .* found str"),
        ({"messages": []}, "the assistant's, found 'none'"),
        ({"messages": [USER]}, "the assistant's, found 'user'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content: wanted text, found nothing"),
        ({"prompt_ids": [1, "2"], "completion_ids": [1]}, "prompt_ids: wanted a list of token ids, found a list"),
        ({"prompt_ids": [1], "completion_ids": [1.5]}, "completion_ids: wanted"),
        ({"prompt_ids": [1], "completion_ids": [True]}, "completion_ids: wanted"),
    ],
)
def test_a_malformed_row_is_named_in_one_line(row, said):
    with pytest.raises(EndoRewardError, match=said) as caught:
        encode_row(chatting(CHATML), row)
    assert "\n" not in str(caught.value)


def test_templates_that_refuse_or_say_nothing_are_the_rows_error():
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
def test_any_chat_is_the_template_and_the_completion_exactly(prompt, completion, system):
    tokenizer = CHATTING
    encoded = encode_row(tokenizer, {"prompt": prompt, "completion": completion}, system=system)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": prompt}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert texts(tokenizer, encoded) == (expected, completion + "<|end|>")


CHATTING = chatting(CHATML)


def test_flags_are_explained_in_words():
    assert set(Encoded([], 0, True, flags=tuple(FLAGS)).note.split("; ")) == set(FLAGS.values())
