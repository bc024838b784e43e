"""The arms: each scores rows of token ids with one loaded model, as its documentation or its own code does.

Every arm may choose its batch size among a few. Rows are sorted by length in all of them. The adapters follow the
interfaces of lm-eval 0.4.13, minicons 0.3.39, trl 1.16 and llama-cpp-python 0.3.36.
"""

import copy
import importlib
import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench.prefixes import Whole
from bench.scoring import llama
from bench.scoring.rows import Row, batches
from endoreward_fast import EndoRewardModel

OURS, OURS_WHOLE = "endoreward_fast", "endoreward_fast, prefixes not shared"
LLAMA_CPP, LLAMA_CPP_FILE = "llama.cpp, weights in float32", "llama.cpp, the GGUF file"
TOKENS = (1024, 2048, 4096)
ROWS = (2, 4, 8)
Score = Callable[[Sequence[Row], int], list[float]]
"""(rows, batch size) -> the summed log-probability of each row's completion"""


@dataclass(frozen=True)
class Loaded:
    """What the arms share: the same weights in one dtype."""

    model: nn.Module
    tokenizer: Any
    gguf: Path | None = None
    """the model as a file for llama.cpp: in a run in float32, with its weights in float32"""


@dataclass(frozen=True)
class Arm:
    """One way to score rows."""

    load: Callable[[Loaded], Score]
    package: str | None = None
    """what pip installs; None: a dependency of ours"""
    module: str | None = None
    sizes: tuple[int, ...] = TOKENS
    unit: str = "tokens"
    """of `sizes`: tokens of a batch with its padding, or rows"""

    @property
    def missing(self) -> str | None:
        """Why the arm cannot run here; None if it can."""
        if self.module is None:
            return None
        try:
            importlib.import_module(self.module)
        except Exception as error:  # an import may raise anything: a library built for another machine
            said = (str(error) or "-").splitlines()[0][:200]
            return f"{self.package} cannot be imported: {type(error).__name__}: {said}"
        return None

    @property
    def version(self) -> str | None:
        return None if self.package is None else importlib.metadata.version(self.package)


def arms(dtype: str, gguf: bool) -> dict[str, Arm]:
    """Return the arms of a run in "float32" or "bfloat16"; those of llama.cpp if the model is a GGUF file."""
    found = {
        "transformers + log_softmax": Arm(_transformers, "transformers", "transformers"),
        "lm-eval": Arm(_lm_eval, "lm-eval", "lm_eval", ROWS, "rows"),
        "minicons": Arm(_minicons, "minicons", "minicons"),
        "TRL": Arm(_trl, "trl", "trl"),
    }
    if gguf:
        rows = {"package": "llama-cpp-python", "module": "llama_cpp", "sizes": llama.ROWS, "unit": "rows"}
        if dtype == "float32":
            found[LLAMA_CPP] = Arm(lambda loaded: llama.load(loaded.gguf, full=True), **rows)
        else:
            found[LLAMA_CPP_FILE] = Arm(lambda loaded: llama.load(loaded.gguf, full=False), **rows)
    return found | {OURS_WHOLE: Arm(_ours(Whole)), OURS: Arm(_ours(EndoRewardModel))}


def _ours(kind: type[EndoRewardModel]) -> Callable[[Loaded], Score]:
    def load(loaded: Loaded) -> Score:
        scorer = kind(loaded.model, loaded.tokenizer)

        def score(rows: Sequence[Row], size: int) -> list[float]:
            given = [{"prompt_ids": row.prompt, "completion_ids": row.completion} for row in rows]
            return [found.logprob for found in scorer.score(given, max_tokens_per_batch=size)]

        return score

    return load


def _transformers(loaded: Loaded) -> Score:
    """Score right-padded batches: log_softmax over float32 logits, then gather."""

    def score_batch(rows: Sequence[Row]) -> Iterable[float]:
        ids, mask = padded([row.ids for row in rows])
        scored = mask & ~_first(ids, [len(row.prompt) for row in rows])
        logits = loaded.model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (logprobs * scored[:, 1:]).sum(1).tolist()

    return by_batch(score_batch)


def _minicons(loaded: Loaded) -> Score:
    """Call `compute_stats`, which `conditional_score` calls once it has tokenized its texts.

    `conditional_score` itself cannot be used: it takes tokens equal to the padding token out of a prompt's length, and
    SmolLM2's padding token is the end of a turn.
    """
    from minicons.scorer import IncrementalLMScorer
    from transformers import BatchEncoding

    scorer = IncrementalLMScorer(loaded.model, "cpu", tokenizer=copy.deepcopy(loaded.tokenizer))

    def score_batch(rows: Sequence[Row]) -> Iterable[float]:
        ids, mask = padded([row.ids for row in rows])
        encoded = BatchEncoding({"input_ids": ids, "attention_mask": mask.long()})
        found = scorer.compute_stats((encoded, [len(row.prompt) - 1 for row in rows]), return_tensors=True)
        return [logprobs.float().sum().item() for logprobs in found]

    return by_batch(score_batch)


def _lm_eval(loaded: Loaded) -> Score:
    """Call `_loglikelihood_tokens`, which `loglikelihood` calls once it has tokenized its requests."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is loaded already
    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", device="cpu")

    def score(rows: Sequence[Row], size: int) -> list[float]:
        harness.batch_size_per_gpu = size
        requests = [(("", ""), row.prompt, row.completion) for row in rows]
        return [logprob for logprob, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]

    return score


def _trl(loaded: Loaded) -> Score:
    """Do what `GRPOTrainer._get_per_token_logps_and_entropies` does, with TRL's fused head.

    As in the trainer, prompts are padded on the left and completions on the right. The trainer does not sort rows; here
    they are sorted by the length of the completion.
    """
    from trl.trainer.utils import add_fused_lm_head

    # The head replaces the model's forward, so it gets a model of its own, on the same weights.
    shared = {id(tensor): tensor for tensor in itertools.chain(loaded.model.parameters(), loaded.model.buffers())}
    model = copy.deepcopy(loaded.model, shared)
    add_fused_lm_head(model)

    def score_batch(rows: Sequence[Row]) -> Iterable[float]:
        prompts, before = padded([row.prompt for row in rows], "left")
        completions, scored = padded([row.completion for row in rows])
        ids, mask = torch.cat([prompts, completions], 1), torch.cat([before, scored], 1)
        labels = torch.cat([torch.full_like(prompts, -100), completions.masked_fill(~scored, -100)], 1)
        found = model(input_ids=ids, attention_mask=mask.long(), labels=labels, fused_lm_head=True)
        return found.log_probs[:, -completions.shape[1] :].float().sum(1).tolist()

    return by_batch(
        score_batch,
        key=lambda row: len(row.completion),
        width=lambda rows: max(len(row.prompt) for row in rows) + max(len(row.completion) for row in rows),
    )


def by_batch(score_batch: Callable[[Sequence[Row]], Iterable[float]], **order: Any) -> Score:
    """Return an arm's function from one that scores a batch. The batch size is in tokens."""

    @torch.inference_mode()
    def score(rows: Sequence[Row], size: int) -> list[float]:
        scores = [0.0] * len(rows)
        for batch in batches(rows, size, **order):
            for i, value in zip(batch, score_batch([rows[i] for i in batch]), strict=True):
                scores[i] = value
        return scores

    return score


def padded(ids: Sequence[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Return (ids, which of them are real), each (B, T)."""
    rows = [torch.tensor(row) for row in ids]
    real = [torch.ones(len(row), dtype=torch.bool) for row in ids]
    return tuple(pad_sequence(x, batch_first=True, padding_side=side) for x in (rows, real))


def _first(ids: Tensor, counts: Sequence[int]) -> Tensor:
    """Return a mask of the first `counts` tokens of each row."""
    return torch.arange(ids.shape[1]) < torch.tensor(counts)[:, None]
