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
from ..text.boundary import decode, split_ids, tokenize
from .batched import UNSCORED, BatchedReward, Rewarded
from .generated import generated_row


class EndoReward:
    """`reward_func(queries, prompts, labels)` of OpenRLHF: the endogenous reward of each query's response.

    model         a name or folder, a loaded causal language model or an EndoRewardModel: the frozen initial policy
    tokenizer     the policy's, or its name. Default: the reward model's own
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score
    unscored      the reward of a response that cannot be scored, -1e6: never the best (see BatchedReward)

    OpenRLHF hands over text, special tokens and all, and no token ids. The prompt is tokenized as it does; the
    response's tokens are those that it adds to the prompt's (`boundary`): the sampled ones, wherever the policy wrote
    its text as the tokenizer would. One that ends in an end-of-sequence token is whole, any other is bootstrapped with
    V(s'). A prompt that OpenRLHF has cut from the left is found again. Calls come one query each, from many threads:
    what waits is scored together.

    Returns {"rewards": (B,), "scores": (B,), "extra_logs": {name: (B,)}}, float32; the names are endo_reward_token,
    endo_reward_first_value, endo_reward_length and endo_reward_unscored.

    Raises EndoRewardError: a tokenizer other than the reward model's. As the file is loaded, since OpenRLHF only logs
    what a reward function raises later.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, alpha: float = 1.0, reduction: Literal["sum", "mean"] = "sum",
        gamma: float = 1.0, floor: float = 0.0, max_tokens_per_batch: int = 8192, unscored: float = UNSCORED,
    ) -> None:  # fmt: skip
        self.reward = BatchedReward(
            model, _loaded(tokenizer), alpha=alpha, reduction=reduction, gamma=gamma, floor=floor,
            max_tokens_per_batch=max_tokens_per_batch, unscored=unscored,
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
        ids = self._ids(query, prompt)
        if ids is None:
            return self.reward.without("the query does not begin with its prompt, whole or cut from the left")
        return self.reward.submit(generated_row(*ids, self.reward.ends))

    def _ids(self, query: str, prompt: str) -> tuple[list[int], list[int]] | None:
        """Prompt and response: the prompt as given, or decoded, or without what was cut from its left."""
        tokenizer = self.reward.tokenizer
        whole = tokenize(tokenizer, prompt)
        if query.startswith(prompt):
            return whole, self._response(query, prompt, whole, query[len(prompt) :])
        # The longest first; what is left must be a good part of it: any query may begin with a prompt's last letters.
        for cut in range(len(whole) // 2 + 1):
            opening = decode(tokenizer, whole[cut:])
            if opening and query.startswith(opening):
                return whole[cut:], self._response(query, prompt, whole[cut:], query[len(opening) :])
        return None

    def _response(self, query: str, prompt: str, prompt_ids: list[int], text: str) -> list[int]:
        """The response's ids: those with which the prompt's spell the query, as OpenRLHF has decoded it."""
        tokenizer = self.reward.tokenizer
        # SentencePiece's kind decodes a space that it has put behind a special token, and would put a second one.
        found = [split_ids(tokenizer, prompt, response)[1] for response in (text, text.removeprefix(" "))]
        spelt = (ids for ids in found if tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=False) == query)
        return next(spelt, found[0])


def _loaded(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)
