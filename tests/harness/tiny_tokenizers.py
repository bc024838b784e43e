"""Tokenizers of five kinds, trained on a few lines, and texts that test where they merge."""

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from endoreward_fast.text.boundary import decode

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
    """Byte-level BPE without splitting into words first, so that it merges across word boundaries."""
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
    """SentencePiece's Unigram, which adds a dummy space before a text."""
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>"),
        pre=pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoder=decoders.Metaspace(prepend_scheme=scheme),
        post=with_bos(),
    )


def llama_like():
    """SentencePiece's BPE as in Llama 2: a normalizer adds the dummy space, and unknown characters become bytes."""
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
    """BERT's WordPiece: lower case, ## before the continuation of a word, no white space."""
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

# Fragments of the corpus, which the tokenizers merge. TEXT also has other characters.
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


def texts(tokenizer, encoded):
    ids, n = encoded.input_ids, encoded.prompt_length
    return decode(tokenizer, ids[:n]), decode(tokenizer, ids[n:])
