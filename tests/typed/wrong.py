"""Wrong uses of the public face: a type checker has to refuse each line that ends in `# no` (test_typed.py)."""

import torch

import endoreward_fast
from endoreward_fast import (
    EndoRewardModel,
    RewardModel,
    rewards_to_go,
    sequence_score,
    token_rewards,
    vocab_divergence,
    vocab_stats,
)
from endoreward_fast.losses import reval_loss
from endoreward_fast.rivals.judges import Verifier

scorer, rival = EndoRewardModel.from_pretrained("pocket"), RewardModel.from_pretrained("a/name")
ids, logits = torch.tensor([[1, 2]]), torch.randn(1, 2, 8)
rows = [{"prompt": "2 + 3", "completion": "5"}]

scorer.score(rows, tempreature=2)  # no
scorer.score(rows, alpha="2")  # no
scorer.score(rows, reduction="median")  # no
scorer.score(rows, truncate="left")  # no
scorer.score(rows, reference="pocket")  # no
scorer.score("hello")  # no
scorer.score(["a", "b"])  # no
scorer.score(rows[0])  # no
scorer.score(None)  # no
_ = scorer.score(rows)[0].scores  # no
scorer.score(rows)[0].score + 1.0  # no
scorer.iter_scores(rows, per_tokens=True)  # no
scorer.iter_scores(rows, on_tokens=1)  # no
scorer.rank("2 + 3", 5)  # no
scorer.rank("2 + 3", ["5"], gamme=0.9)  # no
rival.score(rows, tempreature=2)  # no
rival.iter_scores("hello")  # no
Verifier(scorer).score(rows, tempreature=2)  # no
Verifier("pocket")  # no
EndoRewardModel("pocket")  # no
EndoRewardModel.from_pretrained("pocket", revison="main")  # no
EndoRewardModel.from_pretrained("pocket", trust_remote_code="yes")  # no
RewardModel.from_pretrained("a/name", divice="cpu")  # no
RewardModel("a/name", None)  # no
scorer([[1, 2]])  # no
scorer("text")  # no
scorer(ids, completion_masks=ids)  # no
scorer(ids, impl="fast")  # no
_ = scorer(ids).rewards  # no
token_rewards(logits, ids, ids)  # no
token_rewards(logits)  # no
reval_loss(scorer(ids), scorer(ids).logprob, ids > 0, logits, beta=0.1)  # no
reval_loss(scorer(ids), scorer(ids), ids > 0, logits)  # no
vocab_stats(logits, impl="fast")  # no
vocab_stats(logits, "targets")  # no
vocab_divergence(logits, logits, kind="kl")  # no
vocab_divergence(logits, logits, impl="compiled")  # no
sequence_score(logits[..., 0], ids, reduction="max")  # no
rewards_to_go(logits[..., 0])  # no
_ = endoreward_fast.RowScroe  # no
