"""The endogenous reward in OpenRLHF (written against OpenRLHF 0.11.2), as a file that defines `reward_func`.

    # reward.py, for --reward.remote_url reward.py
    from endoreward_fast.integrations.openrlhf import EndoReward
    reward_func = EndoReward("Qwen/Qwen2.5-0.5B-Instruct")

This module does not import OpenRLHF.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch

from ..errors import EndoRewardError
from ..scoring.sampled import UNSCORED, Rewarded, generated_row
from ..text.query import split_query
from .batched import BatchedReward


class EndoReward:
    """OpenRLHF's `reward_func(queries, prompts, labels)`: returns the endogenous reward of each query's response.

    model         the frozen initial policy: a name or folder, a loaded causal language model, or an EndoRewardModel. Or
                  the URL of a server ("http://HOST:PORT"), or a RemoteModel
    tokenizer     the policy's tokenizer or its name. Default: the reward model's tokenizer. A
                  server's model needs it here
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score
    unscored      the reward of a response that cannot be scored. Default: -1e6, which is never the best (BatchedReward)

    OpenRLHF passes text with special tokens, and no token ids. The prompt is tokenized as OpenRLHF does it. The
    response's tokens are those that its text adds to the prompt's (`text/boundary.py`); they equal the sampled tokens
    if the policy split its text as the tokenizer does. A response that ends in an end-of-sequence token is complete;
    any other is bootstrapped with V(s'). A prompt that OpenRLHF truncated from the left is recognised. OpenRLHF calls
    with one query at a time, from many threads; queries that wait are scored together.

    Returns {"rewards": (B,), "scores": (B,), "extra_logs": {name: (B,)}}, float32. The names are endo_reward_token,
    endo_reward_first_value, endo_reward_length and endo_reward_unscored.

    Raises EndoRewardError if the tokenizer is not the reward model's. The constructor raises it, because OpenRLHF only
    logs the exceptions of later calls.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, alpha: float = 1.0, reduction: Literal["sum", "mean"] = "sum",
        gamma: float = 1.0, floor: float = 0.0, max_tokens_per_batch: int | None = None, unscored: float = UNSCORED,
    ) -> None:  # fmt: skip
        self.reward = BatchedReward(
            model, _loaded(tokenizer), alpha=alpha, reduction=reduction, gamma=gamma, floor=floor,
            max_tokens_per_batch=max_tokens_per_batch, unscored=unscored,
        )  # fmt: skip
        if self.reward.tokenizer is None:
            raise EndoRewardError(
                "OpenRLHF passes text, and the reward model has no tokenizer: give one, EndoReward(model, tokenizer)"
            )

    def __call__(
        self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Score queries, each a prompt followed by a response. `labels` are ignored."""
        asked = [self._ask(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
        found = [a.result() if isinstance(a, Future) else a for a in asked]
        scores = torch.tensor([r.score for r in found])
        logs = [r.metrics() for r in found]
        names = logs[0] if logs else ()
        extra = {f"endo_reward_{name}": torch.tensor([log[name] for log in logs]) for name in names}
        return {"rewards": scores, "scores": scores.clone(), "extra_logs": extra}

    def _ask(self, query: str, prompt: str) -> "Future[Rewarded] | Rewarded":
        ids = split_query(self.reward.tokenizer, query, prompt)
        if ids is None:
            return self.reward.without("the query does not start with its prompt, complete or truncated from the left")
        return self.reward.submit(generated_row(*ids, self.reward.ends))


def _loaded(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)
