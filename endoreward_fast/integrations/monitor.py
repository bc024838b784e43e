"""Watch an intrinsic reward in TRL's GRPOTrainer or RLOOTrainer, and stop a run that has collapsed (TRL 1.16).

The monitor is both a wrapper of the reward function and a callback:

    GRPOTrainer(model, reward_funcs=[monitor.watch(EndoReward(model))], callbacks=[monitor], ...)
"""

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import EndoRewardError
from .collapse import PREFIX, WINDOW, Course, Limits, Sampled, digest, last_text, measure

LOGGER = logging.getLogger(__name__)
OF_TRAINER = {
    "entropy": "entropy", "kl": "kl", "length": "completions/mean_length", "truncated": "completions/clipped_ratio"
}  # fmt: skip
"""what the trainer itself logs, under its own names"""
OF_MONITOR = ("reward", "majority", "one_answer", "accuracy")


class CollapseMonitor(TrainerCallback):
    """Log what goes wrong with intrinsic rewards, and say or stop when a run has collapsed (`collapse.Course`).

    extract    a function from a completion's text to its answer, or to None if it has none. Default: the text, without
               space at its ends. Give one for completions with a chain of thought: their texts are never alike
    limits     `collapse.Limits`. By default the signs of collapse are watched, and no other limit is set
    window     number of logs in a running mean, and of those that are the start. A log is `logging_steps` steps: set
               this to 1 in TRL's configuration, whose default is 10, to see a collapse within tens of steps
    stop       whether to stop the training. Default: only one warning
    patience   number of consecutive logs that must agree
    start      values to compare with in place of the first logs: `monitor.start` of an earlier run. A run resumed from
               a checkpoint needs none: its course goes on with the logs in the checkpoint

    Put both of these into reward_funcs:
    watch(reward)       measures what reaches the reward function. A monitor watches one function in one run: among
                        several, the one that can collapse. collapse/reward is its reward alone
    accuracy(function)  measures a function with labels. Give it a weight of 0 to train without labels

    They log through the trainer, so wandb and TensorBoard have collapse/majority, collapse/distinct,
    collapse/one_answer, collapse/no_answer, collapse/reward, collapse/length_correlation and collapse/accuracy
    (`collapse.measure`), and collapse/indicator: 1 where the log before showed a collapse. Entropy, KL, length and the
    share cut by the limit are read from the trainer's own logs.

    With several processes, the completions of all are gathered before anything is measured, because a group may span
    processes. So all processes log the same values, and stop together.

    `collapse_step` is the trainer's step at which the run was first found collapsed or beyond a limit for `patience`
    logs, `reason` the reason in one line; None: not so far.

    Raises EndoRewardError: an option outside of its range; a reward model or an async function, which the trainer
    calls in other ways; an `extract` that returns something else than text; a run in which the monitor is not among the
    callbacks, or watches no reward function or several; no logs.
    """

    def __init__(
        self, *, extract: Callable[[str], str | None] | None = None, limits: Limits | None = None,
        window: int = WINDOW, patience: int = 3, stop: bool = False, start: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("window", window), ("patience", patience)):
            if not (isinstance(value, int) and value >= 1):
                raise EndoRewardError(f"{name}={value!r}: expected a whole number of at least 1")
        if limits is not None and not isinstance(limits, Limits):
            raise EndoRewardError(f"limits is a {type(limits).__name__}: expected Limits(...)")
        if extract is not None and not callable(extract):
            raise EndoRewardError(f"extract is a {type(extract).__name__}: expected a function of a completion's text")
        self.extract, self.patience, self.stop = extract, patience, stop
        self._new_course = partial(Course, limits or Limits(), window, start)
        self._begin()
        self._watching = 0  # reward functions
        self._attached = False  # whether a trainer has called this callback

    def _begin(self) -> None:
        self.course = self._new_course()
        self.collapse_step: int | None = None
        self.reason: str | None = None
        self.indicator: float | None = None
        self._agreed = 0

    @property
    def start(self) -> dict[str, float]:
        """The values at the start, as far as they are known."""
        return dict(self.course.start)

    def watch(self, reward: Callable[..., Any]) -> "Watched":
        """Return a reward function with the same rewards and name, whose completions are measured."""
        watched = Watched(reward, self._measure)
        self._watching += 1
        return watched

    def accuracy(self, function: Callable[..., Any]) -> "Watched":
        """Return a reward function with the same rewards and name, whose mean is logged as collapse/accuracy."""
        return Watched(function, self._measure_accuracy)

    def _measure(self, called: Mapping[str, Any], rewards: Sequence[float | None]) -> dict[str, float]:
        for name in ("prompts", "completions", "completion_ids"):
            if called.get(name) is None:
                raise EndoRewardError(f"this trainer gives its reward functions no {name}: install TRL 1.16 or newer")
        if not self._attached and getattr(called.get("trainer_state"), "max_steps", 0) > 0:
            raise EndoRewardError("the CollapseMonitor is no callback of this trainer: add callbacks=[monitor]")
        rows = zip(called["prompts"], called["completions"], called["completion_ids"], rewards, strict=True)
        found = measure(_of_all([self._sampled(*row) for row in rows]))
        if self.extract is None:
            found.pop("no_answer", None)
        return found if self.indicator is None else found | {"indicator": self.indicator}

    def _sampled(self, prompt: Any, completion: Any, ids: Sequence[int], reward: float | None) -> Sampled:
        text = last_text(completion)
        answer = text.strip() if self.extract is None else self.extract(text)
        if answer is not None and not isinstance(answer, str):
            raise EndoRewardError(
                f"extract returned {type(answer).__name__} for a completion: let it return the answer as text, or None"
            )
        known = None if reward is None else float(reward)
        return Sampled(digest(prompt), None if answer is None else digest(answer), digest(completion), len(ids), known)

    def _measure_accuracy(self, called: Mapping[str, Any], rewards: Sequence[float | None]) -> dict[str, float]:
        known = [float(reward) for reward in _of_all(list(rewards)) if reward is not None]
        known = [reward for reward in known if math.isfinite(reward)]
        return {"accuracy": sum(known) / len(known)} if known else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check that the monitor watches one reward function, and begin its course: for a resumed run, its logs."""
        self._attached = True
        if not self._watching:
            raise EndoRewardError(
                "the CollapseMonitor watches no reward function: put monitor.watch(function) into reward_funcs"
            )
        if self._watching > 1:
            raise EndoRewardError(
                f"the CollapseMonitor watches {self._watching} reward functions, and their logs would be averaged: "
                "watch one, or a function that returns their sum. A new trainer needs a new monitor"
            )
        if args.logging_strategy == "no":
            raise EndoRewardError("logging_strategy='no' gives the CollapseMonitor no logs: set it to 'steps'")
        self._begin()
        for logs in state.log_history:
            self._judge(logs, logs["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> Any:
        """Judge the run by a training log, and stop it if asked to."""
        known = self.collapse_step
        agreed = self._judge(logs or {}, state.global_step)
        if self.collapse_step != known and state.is_world_process_zero:
            what = "stops the training" if self.stop else "has seen a collapse"
            LOGGER.warning("CollapseMonitor %s at step %d: %s", what, self.collapse_step, self.reason)
        control.should_training_stop = control.should_training_stop or (self.stop and agreed)
        return control

    def _judge(self, logs: Mapping[str, Any], step: int) -> bool:
        """Add a log to the course. Return whether it and the logs before it agree that the run has gone wrong."""
        if f"{PREFIX}/reward" not in logs:  # an evaluation, or the summary at the end
            return False
        ours = {name: logs.get(f"{PREFIX}/{name}") for name in OF_MONITOR}
        verdict = self.course.update(ours | {name: logs.get(theirs) for name, theirs in OF_TRAINER.items()})
        self.indicator = float(verdict.collapsed)
        self._agreed = self._agreed + 1 if verdict.reasons else 0
        agreed = self._agreed >= self.patience
        if agreed and self.collapse_step is None:
            self.collapse_step, self.reason = step, "; ".join(verdict.reasons)
        return agreed


class Watched:
    """A reward function whose calls are measured. It has the function's name, which TRL logs."""

    def __init__(
        self, reward: Callable[..., Any], measured: Callable[[Mapping[str, Any], Sequence[Any]], dict[str, float]]
    ) -> None:
        if not callable(reward) or isinstance(reward, torch.nn.Module):
            raise EndoRewardError(
                f"{type(reward).__name__} is no function: the trainer itself calls reward models, so watch a function "
                "that calls yours"
            )
        if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
            raise EndoRewardError(
                "the trainer calls async reward functions in no fixed order, so processes could not gather their "
                "completions: watch a synchronous function"
            )
        self.watched, self.measured = reward, measured
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)

    def __call__(self, **called: Any) -> Any:
        """Return the function's rewards, and log what they and the completions show."""
        rewards = self.watched(**called)
        count = len(called.get("completions", rewards))
        if len(rewards) != count:
            raise EndoRewardError(f"{self.__name__} returned {len(rewards)} rewards for {count} completions")
        found = self.measured(called, rewards)
        log_metric = called.get("log_metric")
        if log_metric is not None:
            for name, value in found.items():
                log_metric(f"{PREFIX}/{name}", value)
        return rewards


def _of_all(rows: list[Any]) -> list[Any]:
    """Return the rows of all processes, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, rows)
    return [row for part in found for row in part]
