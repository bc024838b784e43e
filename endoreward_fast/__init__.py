"""endoreward_fast: the reward inside every language model, in one fused pass over the vocabulary.

Functions on tensors: `token_rewards`, `linear_token_rewards`, `vocab_stats`, `linear_vocab_stats`, `sequence_score`,
`rewards_to_go`, `terminal_at`; for distillation `vocab_divergence` and `linear_vocab_divergence`. Loaded models:
`EndoRewardModel`, which returns `RowScore`, `TokenTable` and `Ranked`; `RemoteModel`, the same behind the URL of a
server; `RewardModel`, a trained reward model to compare with. Intrinsic rewards by name: `SIGNALS`. Objectives for RL
on a model's values: the module `losses`.

Each name is imported on first use, so the command's help does not wait for torch. Importing the package imports neither
triton nor transformers.
"""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if not Path(__file__).with_name("kernels").is_dir():
    raise ImportError(
        "endoreward_fast/kernels is not a symlink to ../kernels: this checkout was made without symlinks. Run `git "
        "config core.symlinks true` and `git checkout endoreward_fast/kernels`, or `pip install .` without -e"
    )

if TYPE_CHECKING:
    from .divergence import linear_vocab_divergence, vocab_divergence
    from .errors import EndoRewardError
    from .functional import linear_token_rewards, linear_vocab_stats, token_rewards, vocab_stats
    from .model.model import EndoRewardModel
    from .remote.client import RemoteModel
    from .returns import rewards_to_go, sequence_score, terminal_at
    from .rivals.reward_model import RewardModel
    from .scoring.options import ScoreOptions
    from .scoring.results import Ranked, RowScore, TokenTable
    from .signals import SIGNALS
    from .types import TokenRewards, VocabStats
    from .vocab.shard_layout import VocabShard

_MODULE_OF = {
    "EndoRewardError": "errors",
    "EndoRewardModel": "model.model",
    "Ranked": "scoring.results",
    "RemoteModel": "remote.client",
    "RewardModel": "rivals.reward_model",
    "RowScore": "scoring.results",
    "SIGNALS": "signals",
    "ScoreOptions": "scoring.options",
    "TokenRewards": "types",
    "TokenTable": "scoring.results",
    "VocabShard": "vocab.shard_layout",
    "VocabStats": "types",
    "linear_token_rewards": "functional",
    "linear_vocab_divergence": "divergence",
    "linear_vocab_stats": "functional",
    "rewards_to_go": "returns",
    "sequence_score": "returns",
    "terminal_at": "returns",
    "token_rewards": "functional",
    "vocab_divergence": "divergence",
    "vocab_stats": "functional",
}

__all__ = [
    "SIGNALS",
    "EndoRewardError",
    "EndoRewardModel",
    "Ranked",
    "RemoteModel",
    "RewardModel",
    "RowScore",
    "ScoreOptions",
    "TokenRewards",
    "TokenTable",
    "VocabShard",
    "VocabStats",
    "linear_token_rewards",
    "linear_vocab_divergence",
    "linear_vocab_stats",
    "rewards_to_go",
    "sequence_score",
    "terminal_at",
    "token_rewards",
    "vocab_divergence",
    "vocab_stats",
]


if TYPE_CHECKING:
    __version__: str
else:  # hidden from type checkers, which would accept any name because of it

    def __getattr__(name: str):
        if name == "__version__":
            return version("endoreward-fast")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
