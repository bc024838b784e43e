"""The endogenous reward in OpenRLHF (written against OpenRLHF 0.11.2): a file with a `reward_func` in it.

    # reward.py, for --reward.remote_url reward.py
    from endoreward_fast.integrations.openrlhf import EndoReward
    reward_func = EndoReward("Qwen/Qwen2.5-0.5B-Instruct")

Nothing of OpenRLHF is imported.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch

from ..errors import EndoRewardError
from .batched import BatchedReward, Rewarded
from .generated import generated_row


class EndoReward:
    """`reward_func(queries, prompts, labels)` of OpenRLHF: the endogenous reward of each query's response.

    model         a name or folder, a loaded causal language model or an EndoRewardModel: the frozen initial policy
    tokenizer     the policy's, or its name. Default: the reward model's own
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score

    OpenRLHF hands over text, special tokens and all, and no token ids: prompt and response are tokenized as it does,
    each by itself, and a response may so come out in other tokens than were sampled. One that ends in an
    end-of-sequence token is whole, any other is bootstrapped with V(s'). A prompt that OpenRLHF has cut from the left
    is found again. A response that cannot be scored gets 0 and is counted. Calls come one query each, from many
    threads: what waits is scored together.

    Returns {"rewards": (B,), "scores": (B,), "extra_logs": {name: (B,)}}, float32; the names are endo_reward_token,
    endo_reward_first_value, endo_reward_length and endo_reward_unscored.

    Raises EndoRewardError: a tokenizer other than the reward model's. As the file is loaded, since OpenRLHF only logs
    what a reward function raises later.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, alpha: float = 1.0, reduction: Literal["sum", "mean"] = "sum",
        gamma: float = 1.0, floor: float = 0.0, max_tokens_per_batch: int = 8192,
    ) -> None:  # fmt: skip
        self.reward = BatchedReward(
            model, _loaded(tokenizer), alpha=alpha, reduction=reduction, gamma=gamma, floor=floor,
            max_tokens_per_batch=max_tokens_per_batch,
        )  # fmt: skip
        if self.reward.tokenizer is None:
            raise EndoRewardError("OpenRLHF hands over text: EndoReward(model, tokenizer)")

    def __call__(
        self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Rewards of queries, each a prompt followed by a response. `labels` play no part."""
        asked = [self._ask(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
        found = [a.result() if isinstance(a, Future) else a for a in asked]
        scores = torch.tensor([r.score for r in found])
        logs = [r.metrics() for r in found]
        names = logs[0] if logs else ()
        extra = {f"endo_reward_{name}": torch.tensor([log[name] for log in logs]) for name in names}
        return {"rewards": scores, "scores": scores.clone(), "extra_logs": extra}

    def _ask(self, query: str, prompt: str) -> "Future[Rewarded] | Rewarded":
        opening = self._opening(query, prompt)
        if opening is None:
            return self.reward.without("the query does not begin with its prompt, whole or cut from the left")
        response = self._ids(query[len(opening) :])
        return self.reward.submit(generated_row(self._ids(opening), response, self.reward.ends))

    def _opening(self, query: str, prompt: str) -> str | None:
        """The prompt as the query has it: as given, or decoded, or without what was cut from its left."""
        if query.startswith(prompt):
            return prompt
        decoded = self.reward.tokenizer.decode(self._ids(prompt), skip_special_tokens=False)
        # The longest first; what is left must be a good part of it: any query may begin with a prompt's last letters.
        suffixes = (decoded[start:] for start in range(len(decoded) // 2 + 1))
        return next((text for text in suffixes if query.startswith(text)), None)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.reward.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _loaded(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)
