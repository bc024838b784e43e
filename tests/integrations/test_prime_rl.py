"""EndoScoring on prime-rl's graphs of messages: recorded ones, and its own code where prime-rl is installed.

prime-rl asks for Python 3.12 and is installed from its source, so the usual environment lacks it.
"""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel, rewards_to_go
from endoreward_fast.integrations.prime_rl import EndoScoring
from tiny_models import EOS, TOKENIZER, alone, build, sampled_rewards
from trainer_contracts import PRIME_RL, Algorithm, episodes, needs, trace

REAL = pytest.param(True, marks=needs(PRIME_RL), id="prime-rl")
SOURCES = pytest.mark.parametrize("real", [pytest.param(False, id="recorded"), REAL])
ONE_TURN = [(None, [1, 2], False), (0, [3, 4, EOS], True)]
TWO_TURNS = [(None, [1, 2], False), (0, [3, 4], True), (1, [5, 6], False), (2, [7, EOS], True)]
FORKED = [
    (None, [1, 2], False),
    (0, [3, 4], True),
    (1, [5], False),
    (2, [7, EOS], True),
    (1, [6], False),
    (4, [8], True),
]


@pytest.fixture(scope="module")
def scorer():
    return EndoRewardModel(build(LlamaConfig), TOKENIZER)


def algorithm(scorer, real=False, **options):
    """An algorithm as prime-rl builds it: from its configuration and the policy's pool."""
    base = Algorithm
    if real:
        from prime_rl.orchestrator.algo.base import Algorithm as base

    class EndoAlgorithm(EndoScoring, base):
        pass

    made = EndoAlgorithm(SimpleNamespace(model=scorer, **options), None)
    asyncio.run(made.setup())
    return made


def finalize(made, traces, real):
    group = episodes(traces, real)
    asyncio.run(made.finalize_group(group) if real else made.score_group(group))


def compact(scorer, prompt, completion, own):
    """The rewards of the tokens that the policy chose."""
    rewards = sampled_rewards(scorer, prompt, completion, {EOS} if own[-1] else ())
    return rewards[torch.tensor(own, dtype=torch.bool)]


def first_value(scorer):
    return alone(scorer, torch.tensor([1, 2, 3])).value[0, 2].item()


def given(one):
    return [node.advantages for node in one.nodes if any(node.mask)]


@SOURCES
def test_advantages_are_rewards_to_go_less_the_groups_mean(scorer, real):
    traces = [trace(ONE_TURN, real=real), trace(TWO_TURNS, real=real)]
    finalize(algorithm(scorer, real, scale="none", gamma=0.9), traces, real)
    rows = [
        compact(scorer, [1, 2], [3, 4, EOS], [1] * 3),
        compact(scorer, [1, 2], [3, 4, 5, 6, 7, EOS], [1, 1, 0, 0, 1, 1]),
    ]
    to_go = [rewards_to_go(r[None], torch.ones_like(r[None], dtype=torch.bool), gamma=0.9)[0] for r in rows]
    mean = (to_go[0] + to_go[1][:3]) / 2
    first, second = given(traces[0]), given(traces[1])
    torch.testing.assert_close(torch.tensor(first[0]), to_go[0] - mean, rtol=1e-4, atol=1e-4)
    wanted = torch.cat([to_go[1][:3] - mean, torch.zeros(1)])  # the last position is in one completion only
    assert [len(values) for values in second] == [2, 2]  # by node, the tool's tokens left out
    torch.testing.assert_close(torch.tensor([*second[0], *second[1]]), wanted, rtol=1e-4, atol=1e-4)
    assert traces[1].metrics == {
        "endo_reward/token": pytest.approx(rows[1].mean().item(), abs=1e-3), "endo_reward/length": 4.0,
        "endo_reward/first_value": pytest.approx(first_value(scorer), abs=1e-3), "endo_reward/unscored": 0.0,
    }  # fmt: skip
    if real:
        from prime_rl.orchestrator.trajectories import trace_to_samples

        [sample] = trace_to_samples(traces[1])
        assert sample.advantages == [0, 0, *second[0], 0, 0, *second[1]]


@SOURCES
def test_a_shared_node_is_scored_once_and_every_branch_is_a_sample(scorer, real):
    forked, other = trace(FORKED, real=real), trace(ONE_TURN, real=real)
    finalize(algorithm(scorer, real, scale="none"), [forked, other], real)
    rows = [
        compact(scorer, [1, 2], [3, 4, 5, 7, EOS], [1, 1, 0, 1, 1]),
        compact(scorer, [1, 2, 3, 4, 6], [8], [1]),
        compact(scorer, [1, 2], [3, 4, EOS], [1] * 3),
    ]
    to_go = [row.flip(0).cumsum(0).flip(0) for row in rows]
    shared, left, right = given(forked)
    mean = sum(row[0] for row in to_go) / 3
    assert right == [pytest.approx((to_go[1][0] - mean).item(), abs=1e-3)]
    assert shared[0] == pytest.approx((to_go[0][0] - mean).item(), abs=1e-3) and len(left) == 2


@SOURCES
def test_traces_that_are_not_trained_are_left_alone(scorer, real):
    silent = trace([(None, [1, 2], False)], real=real)
    others = [trace(ONE_TURN, real=real, error=True), trace(ONE_TURN, real=real, trainable=False), silent]
    kept = [trace(ONE_TURN, real=real), trace(TWO_TURNS, real=real)]
    finalize(algorithm(scorer, real), [others[0], kept[0], *others[1:], kept[1]], real)
    assert all(node.advantages is None for one in others for node in one.nodes)
    assert all(len(given(one)[0]) and None not in given(one) for one in kept)
    finalize(algorithm(scorer, real), others, real)  # nothing to train at all


@pytest.mark.filterwarnings("ignore:a completion gets reward")
@SOURCES
def test_an_unscored_trace_gets_zero_and_leaves_the_others_theirs(scorer, real):
    long = [(None, [1], False), (0, [2] * scorer.max_positions, True)]
    bad = [(None, [1], False), (0, [10**6, EOS], True)]
    apart = [trace(ONE_TURN, real=real), trace(TWO_TURNS, real=real)]
    finalize(algorithm(scorer, real), apart, real)
    mixed = [trace(long, real=real), trace(ONE_TURN, real=real), trace(bad, real=real), trace(TWO_TURNS, real=real)]
    made = algorithm(scorer, real)
    finalize(made, mixed, real)
    assert given(mixed[0]) == [[0.0] * scorer.max_positions] and given(mixed[2]) == [[0.0, 0.0]]
    for one, other in ((mixed[1], apart[0]), (mixed[3], apart[1])):
        for mine, theirs in zip(given(one), given(other), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
    assert mixed[0].metrics == {"endo_reward/unscored": 1.0}
    assert sum(made.reward.reasons.values()) == 2 and any("limit is 128" in reason for reason in made.reward.reasons)


@SOURCES
def test_the_environments_reward_is_added_with_its_weight(scorer, real):
    traces = [trace(ONE_TURN, real=real, reward=value) for value in (1.0, 0.0)]
    finalize(algorithm(scorer, real, scale="none", environment=2.0), traces, real)
    assert given(traces[0]) == [pytest.approx([1.0] * 3, abs=1e-4)]  # equal completions differ in nothing else
    assert given(traces[1]) == [pytest.approx([-1.0] * 3, abs=1e-4)]


def test_images_are_unscored(scorer):
    seen, other = trace(ONE_TURN), trace(TWO_TURNS)
    seen.branches[0].multi_modal_data = object()
    with pytest.warns(UserWarning, match="it has images"):
        finalize(algorithm(scorer), [seen, other], False)
    assert given(seen) == [[0.0] * 3]


def test_mistakes_are_named_in_one_line(scorer):
    with pytest.raises(EndoRewardError, match="has no model: add model: str"):
        algorithm(None)
    with pytest.raises(EndoRewardError, match="scale='batch': expected 'group' or 'none'"):
        algorithm(scorer, scale="batch")
    for options in ({"gamma": 2}, {"gamma": None}, {"environment": "1"}, {"environment": float("nan")}):
        [name] = options
        with pytest.raises(EndoRewardError, match=f"{name}=.*: expected a"):  # before anything is generated
            algorithm(scorer, **options)
    odd = trace(ONE_TURN)
    odd.nodes[1].mask = [True]
    with pytest.raises(EndoRewardError, match="1 mask entries for 3 tokens"):
        finalize(algorithm(scorer), [odd], False)


@needs(PRIME_RL)
def test_prime_rl_builds_and_runs_the_algorithm_of_the_page(monkeypatch):
    """The two classes of docs/trainers.md, registered as prime-rl registers its own."""
    from typing import Literal

    from prime_rl.configs.algorithm import BaseAlgoConfig
    from prime_rl.orchestrator.algo import ALGORITHM_CLASSES, build_algorithm
    from prime_rl.orchestrator.algo.base import Algorithm as Base

    class EndoAlgoConfig(BaseAlgoConfig):
        type: Literal["endo"] = "endo"
        model: str
        gamma: float = 1.0
        environment: float = 0.0

    class EndoAlgorithm(EndoScoring, Base):
        pass

    monkeypatch.setitem(ALGORITHM_CLASSES, "endo", EndoAlgorithm)
    made = build_algorithm(EndoAlgoConfig(model="pocket", gamma=0.9), None)
    asyncio.run(made.setup())
    turns = [(None, [5, 6], False), (0, [7, 8, 2], True)], [(None, [5, 6], False), (0, [9, 10], True)]
    traces = [trace(nodes, real=True) for nodes in turns]
    finalize(made, traces, True)
    assert made.gamma == 0.9 and given(traces[0])[0][0] == pytest.approx(-given(traces[1])[0][0])
    assert abs(given(traces[0])[0][0]) <= 0.7072
