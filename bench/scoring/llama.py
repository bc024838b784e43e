"""The arm of llama.cpp, through the functions of llama.h that llama-cpp-python offers.

Its `Llama(logits_all=True)` would compute the logits of prompts too and keep them all. Here llama.cpp is asked for the
logits of the completion alone.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.scoring.rows import Row

ROWS = (1, 2, 4)
CELLS = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this"""


def load(path: Path, full: bool) -> Callable[[Sequence[Row], int], list[float]]:
    """Return the function that scores rows, `size` of them in a batch. full: compute attention in float32."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")

    def score(rows: Sequence[Row], size: int) -> list[float]:
        order = sorted(range(len(rows)), key=lambda i: rows[i].tokens, reverse=True)
        scores = [0.0] * len(rows)
        with _context(model, size, rows[order[0]].tokens, full) as context:
            for start in range(0, len(rows), size):
                batch = order[start : start + size]
                for i, value in zip(batch, _score_batch(model, context, [rows[i] for i in batch]), strict=True):
                    scores[i] = value
        return scores

    return score


@contextmanager
def _context(model: Any, sequences: int, longest: int, full: bool) -> Iterator[Any]:
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = sequences * -(-longest // CELLS) * CELLS
    params.n_batch = sequences * longest
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    if full:  # its flash attention rounds keys and values to float16, whatever their type: 0.05 nats in 164
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp makes no context of {sequences} sequences of {longest} tokens")
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


def _score_batch(model: Any, context: Any, rows: Sequence[Row]) -> list[float]:
    """Read rows as so many sequences. The last token of each is not read: nothing follows it."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
    batch = llama_cpp.llama_batch_init(sum(row.tokens - 1 for row in rows), 0, 1)
    try:
        for sequence, row in enumerate(rows):
            for position, token in enumerate(row.ids[:-1]):
                n = batch.n_tokens
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, position, 1
                batch.seq_id[n][0] = sequence
                batch.logits[n] = position >= len(row.prompt) - 1
                batch.n_tokens += 1
        failed = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if failed:
        raise RuntimeError(f"llama_decode returned {failed}")
    counts = [len(row.completion) for row in rows]
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    pointer = llama_cpp.llama_get_logits(context)
    found = (ctypes.c_float * (sum(counts) * vocab)).from_address(ctypes.addressof(pointer.contents))
    logits = torch.frombuffer(found, dtype=torch.float32).view(-1, vocab)
    targets = torch.tensor([token for row in rows for token in row.completion])
    logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    return [part.sum().item() for part in logprobs.split(counts)]


def in_float32(source: Path, target: Path) -> None:
    """Copy a GGUF file with its weights in float32: the numbers that transformers reads from it."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
