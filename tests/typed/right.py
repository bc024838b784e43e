"""A user's file over the whole public face. `mypy --strict` has to find nothing (test_typed.py)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import assert_type

from endoreward_fast import (
    SIGNALS,
    EndoRewardError,
    EndoRewardModel,
    Ranked,
    RewardModel,
    RowScore,
    ScoreOptions,
    TokenRewards,
    TokenTable,
    VocabShard,
    VocabStats,
    __version__,
    linear_token_rewards,
    linear_vocab_divergence,
    linear_vocab_stats,
    rewards_to_go,
    sequence_score,
    terminal_at,
    token_rewards,
    vocab_divergence,
    vocab_stats,
)
from endoreward_fast.losses import BellmanLoss, reval_loss, tbrm_loss
from endoreward_fast.rivals.judges import JUDGES, Judge, Pairwise, Verifier
from endoreward_fast.signals import Signal, TokenStats

scorer = EndoRewardModel.from_pretrained(
    "pocket", dtype="float32", device="cpu", revision="main", attn_implementation="sdpa", trust_remote_code=False
)
assert_type(scorer, EndoRewardModel)
assert_type(scorer.device, torch.device)
assert_type(scorer.dtype, torch.dtype)
assert_type(scorer.vocab_size, int)
assert_type(scorer.max_positions, int | None)
assert_type(scorer.to("cpu").eval().requires_grad_(False), EndoRewardModel)

ids = torch.tensor([[1, 2, 3]])
assert_type(scorer(ids), TokenRewards)
assert_type(scorer(ids, ids.bool(), completion_mask=ids > 1, entropy=True, impl="chunked"), TokenRewards)
assert_type(scorer(ids).reward.sum(), Tensor)
assert_type(scorer(ids).entropy, Tensor | None)
assert_type(scorer.stats(ids, alpha=0.5), TokenStats)

row = {"prompt": "2 + 3", "completion": "5"}
results = scorer.score([row], alpha=0.5, reduction="mean", gamma=0.9, per_token=True, signals=["centred"])
assert_type(results, list[RowScore])
assert_type(results[0].score, float | None)
assert_type(results[0].tokens, TokenTable | None)
assert_type(results[0].signals, Mapping[str, float] | None)
assert_type(results[0].signal_errors, Mapping[str, str] | None)
assert_type(scorer.score(r for r in [row]), list[RowScore])
for position, result in scorer.iter_scores([row], on_tokens=lambda tokens: None, system="Be brief."):
    assert_type(position, int)
    assert_type(result, RowScore)
ranked = scorer.rank("2 + 3", ("5", "6"), truncate="prompt", max_length=64)
assert_type(ranked, list[Ranked])
assert_type(ranked[0].score, float | None)

rival = RewardModel.from_pretrained("a/name", subfolder="reward", local_files_only=True).to("cpu", torch.bfloat16)
assert_type(rival, RewardModel)
assert_type(rival.device, torch.device)
assert_type(rival.dtype, torch.dtype)
assert_type(rival.score([row], max_length=512), list[RowScore])
assert_type(JUDGES["verifier"], type[Judge])
assert_type(Verifier(scorer).score([row], alpha=2.0), list[RowScore])
assert_type(dict(Pairwise(scorer).iter_scores([row, row])), dict[int, RowScore])
assert_type(ScoreOptions(alpha=0.5, reference=scorer), ScoreOptions)

hidden, weight, on = torch.randn(1, 3, 4), torch.randn(8, 4), torch.tensor([[0, 1, 1]])
logits = hidden @ weight.T
assert_type(token_rewards(logits, ids, mask=on, impl="reference"), TokenRewards)
assert_type(linear_token_rewards(hidden, weight, ids, mask=on, softcap=30.0), TokenRewards)
assert_type(reval_loss(scorer(ids), scorer(ids), on, ids[:, 0], beta=0.1, level="token"), BellmanLoss)
assert_type(tbrm_loss(scorer(ids), scorer(ids).logprob, on, ids[:, 0], beta=0.1).loss, Tensor)
assert_type(vocab_stats(logits).lse, Tensor)
assert_type(vocab_stats(logits, ids, entropy=True, logit_mean=True), VocabStats)
assert_type(vocab_divergence(logits, logits, kind="jsd", beta=0.1), Tensor)
assert_type(linear_vocab_divergence(hidden, weight, hidden, weight, teacher_softcap=30.0), Tensor)
assert_type(linear_vocab_stats(hidden, weight), VocabStats)
assert_type(linear_vocab_stats(hidden, weight, ids, vocab_size=8).logit_mean, Tensor | None)
assert_type(sequence_score(logits[..., 0], on, reduction="mean"), Tensor)
assert_type(rewards_to_go(logits[..., 0], on, gamma=0.9), Tensor)
assert_type(terminal_at(ids, on, [2, 3]), Tensor)
assert_type(SIGNALS["centred"], Signal)
assert_type(SIGNALS["centred"].score(scorer.stats(ids)), Tensor)
assert_type(__version__, str)


def sharded(shard: VocabShard) -> VocabStats:
    try:
        return linear_vocab_stats(hidden, weight, ids, shard=shard)
    except EndoRewardError as error:
        raise SystemExit(str(error)) from error
