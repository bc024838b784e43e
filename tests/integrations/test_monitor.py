"""CollapseMonitor in a real GRPOTrainer: a planted collapse stops the run, a healthy run ends by itself."""

import logging
import pickle
from types import SimpleNamespace

import pytest
import torch

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.integrations import monitor as module
from endoreward_fast.integrations.collapse import Limits
from endoreward_fast.integrations.monitor import CollapseMonitor
from endoreward_fast.integrations.trl import EndoReward
from endoreward_fast.model.checkpoint import pocket_path

trl = pytest.importorskip("trl", reason="TRL asks for Python 3.11")
from trl_harness import SETTINGS, Trainer, dataset, grpo  # noqa: E402

RUN = {"per_device_train_batch_size": 8, "max_completion_length": 6, "lr_scheduler_type": "constant", "beta": 0.0}


def short(completion_ids, **_):
    """Pays for short completions, so the policy learns to say nothing at all."""
    return [-float(len(ids)) for ids in completion_ids]


def right(completions, answer, **_):
    return [float(c[-1]["content"].strip() == a) for c, a in zip(completions, answer, strict=True)]


def test_a_planted_collapse_stops_the_run_and_says_why(tmp_path, caplog):
    monitor = CollapseMonitor(window=2, patience=2, stop=True, limits=Limits(accuracy=None))  # no label decides
    rewards = [monitor.watch(short), monitor.accuracy(right)]
    settings = RUN | {"max_steps": 16, "learning_rate": 3e-3, "reward_weights": [1.0, 0.0]}
    trainer = grpo(trl.GRPOTrainer, tmp_path, rewards, options={"callbacks": [monitor]}, **settings)
    with caplog.at_level(logging.WARNING, module.__name__):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "collapse/reward" in log]
    assert trainer.state.global_step == monitor.collapse_step < 16
    assert "whatever the prompt, have the same answer" in monitor.reason
    [said] = [r.getMessage() for r in caplog.records if r.name == module.__name__]
    assert said == f"CollapseMonitor stops the training at step {monitor.collapse_step}: {monitor.reason}"
    assert logs[0]["collapse/one_answer"] <= 0.5 and logs[-1]["collapse/one_answer"] == 1
    assert logs[-1]["collapse/indicator"] == 1 and logs[1]["collapse/indicator"] == 0
    assert logs[-1]["collapse/reward"] == -1 and logs[-1]["collapse/accuracy"] == 0
    assert logs[0]["collapse/accuracy"] == logs[0]["rewards/right/mean"] > 0
    correlations = [log["collapse/length_correlation"] for log in logs if "collapse/length_correlation" in log]
    assert correlations and correlations == [pytest.approx(-1)] * len(correlations)  # absent where lengths are alike
    assert logs[0]["rewards/short/mean"] == logs[0]["collapse/reward"]


def test_a_healthy_run_is_left_alone(tmp_path):
    monitor = CollapseMonitor(window=2, patience=2, stop=True)
    settings = RUN | {"max_steps": 4, "learning_rate": 1e-4, "per_device_train_batch_size": 16}
    trainer = grpo(trl.GRPOTrainer, tmp_path, monitor.watch(right), options={"callbacks": [monitor]}, **settings)
    trainer.train()
    assert trainer.state.global_step == 4 and monitor.collapse_step is None is monitor.reason
    assert set(monitor.start) == {"reward", "majority", "one_answer", "entropy", "length", "truncated"}


def test_token_level_rewards_can_be_watched(tmp_path):
    monitor = CollapseMonitor()
    pocket = EndoRewardModel.from_pretrained("pocket")
    reward = monitor.watch(EndoReward(pocket))
    trainer = grpo(Trainer, tmp_path, reward, options={"callbacks": [monitor]}, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert trainer.endo_reward is reward.watched and log["endo_reward/unscored"] == 0
    assert log["collapse/reward"] == pytest.approx(log["rewards/endo_reward/mean"], rel=1e-5)
    assert monitor.start == {}  # five logs make a start


def called(monitor, completions, rewards, prompts=None):
    """What a watched function logs for completions."""
    logged, ids = {}, [[1] * len(str(c)) for c in completions]
    watched = monitor.watch(lambda **_: rewards)
    found = watched(prompts=prompts or ["a"] * len(ids), completions=completions, completion_ids=ids,
                    log_metric=logged.__setitem__, trainer_state=None)  # fmt: skip
    assert found is rewards
    return logged


def test_answers_are_taken_from_completions():
    texts = ["so 5", "thus 5", "then 5", "then"]
    plain = called(CollapseMonitor(), texts, [1.0] * 4)
    assert plain["collapse/majority"] == 1 / 4 and "collapse/no_answer" not in plain
    taken = CollapseMonitor(extract=lambda text: text[-1] if text[-1].isdigit() else None)
    assert called(taken, texts, [1.0] * 4)["collapse/majority"] == 3 / 4
    assert called(taken, texts, [1.0] * 4)["collapse/no_answer"] == 1 / 4
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert called(taken, chats, [1.0] * 4)["collapse/majority"] == 3 / 4
    with pytest.raises(EndoRewardError, match="extract returned int"):
        called(CollapseMonitor(extract=len), texts, [1.0] * 4)


def test_completions_of_all_processes_are_measured_together(monkeypatch):
    """One group over two processes: half of it on each, with the other answer."""
    others = [module.Sampled(module.digest("a"), module.digest("y"), 2, 1, 0.0)] * 2
    dist = torch.distributed

    def gather(found, mine):
        found[:] = [mine, others]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert called(CollapseMonitor(), ["x", "x"], [1.0, None])["collapse/majority"] == 1 / 2


def log(monitor, step, **values):
    control = SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    ours = {f"collapse/{name}": value for name, value in values.items()}
    return monitor.on_log(None, state, control, logs={"entropy": 1.0, **ours}).should_training_stop


@pytest.mark.parametrize("stop", [True, False])
def test_patience_counts_consecutive_logs(stop, caplog):
    monitor = CollapseMonitor(window=1, patience=2, stop=stop, limits=Limits(one_answer=0.8))
    course = [0.1, 0.9, 0.1, 0.9, 0.9, 0.9]
    with caplog.at_level(logging.WARNING, module.__name__):
        found = [log(monitor, n, reward=1.0, one_answer=value) for n, value in enumerate(course)]
    assert found == [False] * 4 + [stop] * 2
    assert monitor.collapse_step == 4 and len(caplog.records) == 1
    assert ("stops the training" if stop else "has seen a collapse") in caplog.text


def test_evaluations_and_summaries_are_no_part_of_the_course():
    monitor = CollapseMonitor(window=1)
    control = SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    for logs in ({"eval_collapse/reward": 1.0}, {"train_runtime": 1.0}, None):
        assert monitor.on_log(None, state, control, logs=logs) is control
    assert monitor.start == {} and monitor.indicator is None


def test_what_cannot_be_watched_is_refused():
    async def later(**_):
        return []

    monitor = CollapseMonitor()
    with pytest.raises(EndoRewardError, match="async reward functions"):
        monitor.watch(later)
    for model in (torch.nn.Identity(), "a/reward-model"):
        with pytest.raises(EndoRewardError, match="is no function"):
            monitor.watch(model)
    with pytest.raises(EndoRewardError, match="no completion_ids: install TRL"):
        monitor.watch(lambda **_: [])(prompts=[], completions=[])
    for options in ({"window": 0}, {"patience": 1.5}):
        with pytest.raises(EndoRewardError, match="whole number of at least 1"):
            CollapseMonitor(**options)


def test_rloo_is_watched_alike(tmp_path):
    monitor = CollapseMonitor(window=1)
    args = trl.RLOOConfig(output_dir=str(tmp_path), **SETTINGS | {"max_steps": 1})
    trainer = trl.RLOOTrainer(
        str(pocket_path()), reward_funcs=[monitor.watch(short)], args=args, train_dataset=dataset("chat"),
        callbacks=[monitor],
    )  # fmt: skip
    trainer.train()
    assert set(monitor.start) >= {"reward", "majority", "one_answer", "entropy", "kl", "length", "truncated"}


def test_the_trainer_has_to_know_the_monitor_and_one_reward():
    def begin(monitor, logging="steps"):
        args = SimpleNamespace(logging_strategy=logging)
        return monitor.on_train_begin(args, SimpleNamespace(log_history=[]), None)

    with pytest.raises(EndoRewardError, match=r"watches no reward function: put monitor.watch\(function\) into"):
        begin(CollapseMonitor())
    twice = CollapseMonitor()
    for function in (short, right):
        twice.watch(function)
    with pytest.raises(EndoRewardError, match="watches 2 reward functions, and their logs would be averaged"):
        begin(twice)
    silent = CollapseMonitor()
    silent.watch(short)
    with pytest.raises(EndoRewardError, match="logging_strategy='no' gives the CollapseMonitor no logs: set it to"):
        begin(silent, logging="no")
    alone, training = CollapseMonitor(), SimpleNamespace(max_steps=4)
    call = {"prompts": ["a"], "completions": ["b"], "completion_ids": [[1]], "log_metric": print}
    watched = alone.watch(short)
    assert watched(**call, trainer_state=SimpleNamespace(max_steps=0)) == [-1.0]  # evaluate() before train()
    with pytest.raises(EndoRewardError, match=r"no callback of this trainer: add callbacks=\[monitor\]"):
        watched(**call, trainer_state=training)
    begin(alone)
    assert watched(**call, trainer_state=training) == [-1.0]


def test_a_watched_function_is_called_as_it_was_and_its_count_is_checked():
    def plain(prompts, completions, completion_ids):
        return [1.0] * (len(prompts) - 1)

    call = {"prompts": ["a", "b"], "completions": ["c", "d"], "completion_ids": [[1], [2]]}
    with pytest.raises(EndoRewardError, match="plain returned 1 rewards for 2 completions"):
        CollapseMonitor().watch(plain)(**call)


def test_a_row_without_a_label_is_no_part_of_the_accuracy():
    logged = {}
    CollapseMonitor().accuracy(lambda **_: [1.0, None, torch.nan, 0.0])(
        completions=["a"] * 4, log_metric=logged.__setitem__
    )
    assert logged == {"collapse/accuracy": 0.5}


def test_options_that_are_no_options_are_refused():
    for options, words in (
        ({"limits": {"kl": 0.3}}, "limits is a dict: expected Limits"),
        ({"extract": "answer"}, "extract is a str: expected a function"),
        ({"start": {"entropyy": 1.0}}, r"start\['entropyy'\]: expected one of reward, entropy"),
        ({"start": {"entropy": None}}, r"start\['entropy'\]=None: expected a finite number"),
    ):
        with pytest.raises(EndoRewardError, match=words):
            CollapseMonitor(**options)


def test_a_monitor_can_be_sent_to_another_process():
    monitor = CollapseMonitor(window=1)
    log(monitor, 1, reward=1.0)
    again = pickle.loads(pickle.dumps(monitor))
    assert again.start == monitor.start == {"reward": 1.0, "entropy": 1.0}


ARGS = SimpleNamespace(logging_strategy="steps")


def test_a_resumed_run_goes_on_with_the_course_of_its_logs():
    def begun(history=(), **options):
        monitor = CollapseMonitor(window=1, patience=2, **options)
        monitor.watch(short)
        monitor.on_train_begin(ARGS, SimpleNamespace(log_history=list(history)), None)
        return monitor

    collapsed = {"reward": 1.0, "one_answer": 0.9}
    first = begun()
    log(first, 1, reward=1.0, one_answer=0.1)
    log(first, 2, **collapsed)
    history = [
        {"entropy": 1.0, "collapse/reward": 1.0, "collapse/one_answer": 0.1, "step": 1},
        {"eval_collapse/reward": 1.0, "step": 1},
        {"entropy": 1.0, "collapse/reward": 1.0, "collapse/one_answer": 0.9, "step": 2},
    ]
    resumed = begun(history)
    assert resumed.start == first.start and resumed.indicator == 1 and resumed.collapse_step is None
    log(resumed, 3, **collapsed)
    assert resumed.collapse_step == 3
    assert begun([*history, history[-1] | {"step": 3}]).collapse_step == 3  # collapsed before it was stopped
    assert begun(history, start={"one_answer": 0.95}).indicator == 0  # a start that is given stays
    first.on_train_begin(ARGS, SimpleNamespace(log_history=[]), None)  # train() once more, from the start
    assert first.start == {} and first.indicator is None is first.collapse_step
