"""Advantages of groups against hand-written numbers, and groups that have nothing to tell."""

import math

import pytest
import torch

from eightfold.train.rl.advantages import AdvantageOptions, OverlongOptions, group_advantages, overlong_penalties

REWARDS = torch.tensor([1.0, 5.0, 0.0, 5.0, 0.0, 5.0])
GROUPS = torch.tensor([7, 2, 7, 2, 7, 2])  # interleaved: 7 holds 1, 0, 0 and 2 holds 5, 5, 5


def test_division_by_the_standard_deviation():
    found = group_advantages(REWARDS, GROUPS, AdvantageOptions(eps=0.5))
    deviation = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2) + 0.5
    expected = [2 / 3 / deviation, 0, -1 / 3 / deviation, 0, -1 / 3 / deviation, 0]
    assert found.values.tolist() == pytest.approx(expected, rel=1e-14)
    assert found.values.dtype == torch.float64
    assert (found.groups, found.equal, found.dropped) == (2, 1, 0)
    assert found.kept.all()


def test_without_the_division():
    found = group_advantages(REWARDS, GROUPS, AdvantageOptions(normalize_std=False))
    assert found.values.tolist() == pytest.approx([2 / 3, 0, -1 / 3, 0, -1 / 3, 0], rel=1e-14)


def test_dynamic_sampling_drops_groups_of_equal_rewards():
    found = group_advantages(REWARDS, GROUPS, AdvantageOptions(dynamic_sampling=True))
    assert found.kept.tolist() == [True, False, True, False, True, False]
    assert (found.groups, found.equal, found.dropped) == (2, 1, 1)
    kept = group_advantages(REWARDS, GROUPS)
    assert torch.equal(found.values, kept.values)


def test_equal_rewards_give_exactly_zero():
    """The mean of three times 0.1 is not 0.1 in floating point; with eps 0 the quotient would be noise over noise."""
    found = group_advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64), AdvantageOptions(eps=0))
    assert found.values.tolist() == [0, 0, 0]


def test_sample_alone_in_its_group():
    one = torch.tensor([4], dtype=torch.int64)
    found = group_advantages(torch.tensor([1.0]), one)
    assert found.values.tolist() == [0]
    assert found.kept.tolist() == [True]
    assert group_advantages(torch.tensor([1.0]), one, AdvantageOptions(dynamic_sampling=True)).kept.tolist() == [False]


def test_no_samples():
    found = group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert found.values.shape == found.kept.shape == (0,)
    assert found.groups == 0


def test_penalties_count_in_the_advantage_but_not_in_whether_rewards_are_equal():
    rewards, groups = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    penalties = torch.tensor([0.0, -0.5], dtype=torch.float64)
    options = AdvantageOptions(normalize_std=False)
    found = group_advantages(rewards, groups, options, penalties)
    assert found.values.tolist() == [0.25, -0.25]
    assert found.equal == 1
    dropped = group_advantages(rewards, groups, AdvantageOptions(dynamic_sampling=True), penalties)
    assert not dropped.kept.any()
    assert dropped.values.tolist() == [0, 0]


def test_overlong_penalties():
    lengths = torch.tensor([1, 80, 81, 90, 100, 130])
    assert overlong_penalties(lengths, 100, OverlongOptions(20)).tolist() == [0, 0, -0.05, -0.5, -1, -1]
    assert overlong_penalties(lengths, 100, OverlongOptions(20, penalty=2.0))[3] == -1
    assert overlong_penalties(lengths[:0], 100, OverlongOptions(20)).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "groups", "message"),
    [
        (torch.ones(3), torch.zeros(2, dtype=torch.int64), r"groups: expected int64 \(3,\), got torch.int64 \(2,\)"),
        (torch.ones(3), torch.zeros(3), r"groups: expected int64 .* got torch.float32"),
        (
            torch.tensor([1, 2]),
            torch.zeros(2, dtype=torch.int64),
            r"rewards: expected floating point \[2\], got .*int64",
        ),
        (
            torch.tensor([1, math.nan]),
            torch.zeros(2, dtype=torch.int64),
            "rewards: expected finite numbers, got nan at 1",
        ),
    ],
)
def test_bad_input(rewards, groups, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, groups)


def test_bad_options():
    with pytest.raises(ValueError, match=r"eps: expected 0 or more, got -1"):
        AdvantageOptions(eps=-1)
    with pytest.raises(ValueError, match=r"buffer: expected 1 or more tokens, got 0"):
        OverlongOptions(0)
    with pytest.raises(ValueError, match=r"buffer: expected at most the limit of 4 tokens, got 5"):
        overlong_penalties(torch.tensor([1]), 4, OverlongOptions(5))
