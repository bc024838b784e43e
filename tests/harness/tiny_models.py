"""Tiny random models with a byte tokenizer, and the rewards that the oracle computes from their logits."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from endoreward_fast.head.head import without_cache
from endoreward_fast.vocab.reference import token_rewards as oracle

VOCAB = 384  # more rows in the head than tokens, as in real models
BOS, EOS, PAD = 256, 257, 258
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=BOS, eos_token_id=EOS,
    pad_token_id=PAD, initializer_range=0.3,
)  # fmt: skip


def build(config, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES | changes)).eval()


def gpt2():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama": lambda: build(LlamaConfig),
    "gemma2": lambda: build(Gemma2Config, final_logit_softcapping=5.0, sliding_window=8, query_pre_attn_scalar=16),
    "gpt2": gpt2,
}


def byte_tokenizer(**names):
    """Return a tokenizer with one token for each byte, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZER = byte_tokenizer()


ROWS = [
    {"prompt": "What is 2 + 3?", "completion": " 5"},
    {"prompt": "a", "completion": "b" * 40},
    {"prompt": "Name a colour.", "completion": ""},
    {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5, EOS]},
    {"prompt": "", "completion": "colour"},
    {"prompt": "x" * 30, "completion": "y"},
]


def save_two_words(folder):
    """Save a model with a vocabulary of its own, <unk> and "No", and return the folder."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "No": 1}, unk_token="<unk>"))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=2, **size)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def random_rows(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=generator) for n in lengths]


def alone(scorer, ids, **options):
    """Return the oracle's rewards for one row, from full logits in float32."""
    with torch.no_grad():
        logits = scorer.model(input_ids=ids[None], **without_cache(scorer.model)).logits.float()
    return oracle(logits, ids[None], **options)


def same(ours, expected, tolerance=2e-5):
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        if b is not None:
            assert a.dtype == torch.float32
            scale = b.abs().max().clamp(min=1)
            assert (a - b).abs().max() <= tolerance * scale, name


def expected_score(scorer, ids, start, **options):
    mask = torch.arange(len(ids)) >= start
    rewards = alone(scorer, torch.tensor(ids), mask=mask[None], **options)
    return rewards.reward.sum().item(), rewards.logprob.sum().item()


def sampled_rewards(scorer, prompt, completion, ends):
    """Return the token rewards of one sampled completion, from full logits. The last token is terminal if in `ends`."""
    ids = torch.tensor([*prompt, *completion])
    mask = (torch.arange(len(ids)) >= len(prompt))[None]
    last = torch.zeros_like(mask)
    last[0, -1] = completion[-1] in ends
    return alone(scorer, ids, mask=mask, terminal=last).reward[0, len(prompt) :]
