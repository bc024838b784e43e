"""Token advantages of a group as lists, against the function for tensors and numbers worked out by hand."""

import pytest

from endoreward_fast.integrations.token_level import group_advantages, mean_of, spread


def test_values_go_to_the_policys_tokens():
    assert spread([1.0, 2.0], [0, 1, 0, 1]) == [0.0, 1.0, 0.0, 2.0] and spread([], []) == []


def test_advantages_are_rewards_to_go_less_the_mean_at_their_position():
    found = group_advantages([[1.0, 2.0], [5.0], None], [2, 1, 3], scale="none")
    assert found == [[-1.0, 0.0], [1.0], [0.0, 0.0, 0.0]]
    discounted = group_advantages([[1.0, 2.0], [5.0, 4.0]], [2, 2], gamma=0.5, scale="none")
    assert discounted == [[-2.5, -1.0], [2.5, 1.0]]  # to go: (2, 2) and (7, 4)


def test_a_group_of_any_size_has_grpos_bound():
    found = group_advantages([[0.0, 9.0], [1.0, -9.0], [0.0]], [2, 2, 1])
    assert max(abs(a) for row in found for a in row) <= 2 / 3**0.5


def test_another_reward_counts_with_its_weight_and_for_completions_without_one():
    found = group_advantages([[1.0], [1.0], None], [1, 1, 2], others=[0.0, 0.0, 3.0], weight=2.0, scale="none")
    assert found == [[-2.0], [-2.0], [4.0, 4.0]]
    rewards, lengths = [[1.0], [3.0], None], [1, 1, 1]
    assert group_advantages(rewards, lengths, others=[0.0, 9.0, 9.0]) == group_advantages(rewards, lengths)


@pytest.mark.parametrize("rewards, lengths", [([None], [0]), ([None, None], [0, 2]), ([[1.0]], [1])])
def test_groups_that_compare_nothing_get_zero(rewards, lengths):
    assert group_advantages(rewards, lengths) == [[0.0] * n for n in lengths]


def test_means_are_over_scored_completions():
    one = {"token": 1.0, "first_value": 2.0, "length": 3.0, "unscored": 0.0}
    lost = {"token": 0.0, "first_value": 0.0, "length": 0.0, "unscored": 1.0}
    assert mean_of([one, one | {"token": 3.0}, lost]) == {
        "endo_reward/token": 2, "endo_reward/first_value": 2, "endo_reward/length": 3, "endo_reward/unscored": 1,
    }  # fmt: skip
    assert mean_of([lost]) == {"endo_reward/unscored": 1}
