"""The two kinds of models that are loaded: causal language models, and classifiers with one output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import EndoRewardError
from .adapters import Adapter

OTHER_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")


@dataclass(frozen=True)
class Kind:
    """A kind of model, and how to load it."""

    auto: str
    """name of the transformers class that loads it"""
    words: str
    refuse_other: Callable[[Any, str, Adapter | None], None]
    """function of (config, name, adapter) that raises EndoRewardError for any other kind"""


def refuse_other_than_one_output(config: Any, name: str) -> None:
    """Raise EndoRewardError unless the classifier has one output."""
    if config.num_labels != 1:
        labels = ", ".join(map(str, list(config.id2label.values())[:4]))
        raise EndoRewardError(f"{name} has {config.num_labels} outputs ({labels}): a reward model has one")


def _refuse_unless_causal(config: Any, name: str, adapter: Adapter | None) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    for architecture in getattr(config, "architectures", None) or ():
        if architecture.endswith(OTHER_TASKS):
            raise EndoRewardError(f"model {name!r} is a {architecture}, which is not a causal language model")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise EndoRewardError(f"model {name!r} is of type {config.model_type!r}, which is not a causal language model")


def _refuse_unless_reward_model(config: Any, name: str, adapter: Adapter | None) -> None:
    architectures = getattr(config, "architectures", None) or ()
    if adapter is not None and adapter.of_classifier:
        architectures = ()  # the base of TRL's RewardTrainer is a causal model: the adapter brings the head
    remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if architectures and not remote and not any(a.endswith("ForSequenceClassification") for a in architectures):
        raise EndoRewardError(
            f"model {name!r} is a {architectures[0]}, which is not a reward model (a sequence classifier)"
        )
    refuse_other_than_one_output(config, f"model {name!r}")


CAUSAL = Kind("AutoModelForCausalLM", "a causal language model", _refuse_unless_causal)
CLASSIFIER = Kind("AutoModelForSequenceClassification", "a reward model", _refuse_unless_reward_model)
