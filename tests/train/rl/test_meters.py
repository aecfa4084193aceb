"""What a step reports, against hand-written numbers; sums over parts and processes."""

import math

import pytest
import torch

from eightfold.train.distributed import World
from eightfold.train.rl.advantages import AdvantageOptions, group_advantages
from eightfold.train.rl.meters import SampleMeters, TokenMeters
from eightfold.train.rl.objective import PolicyBatch, policy_loss

CPU = torch.device("cpu")


def token_meters(deltas, masked=()):
    """Meters of one sequence whose trainer's log-probs exceed the rollout's by ``deltas``."""
    rollout = torch.full((len(deltas),), -1.0, dtype=torch.float64)
    mask = torch.ones(len(deltas), dtype=torch.bool)
    mask[list(masked)] = False
    batch = PolicyBatch(
        starts=torch.tensor([0, len(deltas)]),
        mask=mask,
        advantages=torch.ones(1),
        rollout_logp=rollout,
        entropy=torch.arange(len(deltas), dtype=torch.float64),
    )
    return policy_loss(rollout + torch.tensor(deltas, dtype=torch.float64), batch)[1]


def test_mismatch():
    means = token_meters([0.0, 0.5, -0.25, 9.0], masked=[3]).means()
    assert means["delta_logp_mean"] == pytest.approx(0.25)
    assert means["delta_logp_max"] == 0.5
    expected = (math.exp(0.5) - 0.5 - 1) + (math.exp(-0.25) + 0.25 - 1)
    assert means["rollout_kl"] == pytest.approx(expected / 3, rel=1e-14)
    assert means["probability_error"] == pytest.approx((1 + math.exp(0.5) + math.exp(0.25)) / 3, rel=1e-14)
    assert means["entropy"] == 1.0
    assert "reference_kl" not in means


def test_no_mismatch_is_exactly_none():
    means = token_meters([0.0, 0.0, 0.0]).means()
    assert means["delta_logp_max"] == means["delta_logp_mean"] == means["rollout_kl"] == 0
    assert means["probability_error"] == 1


def test_tiny_mismatch_is_not_lost_to_cancellation():
    """exp(d) - d - 1 in plain arithmetic has no digit left at d = 1e-7."""
    assert token_meters([1e-7]).means()["rollout_kl"] == pytest.approx(0.5e-14, rel=0.05)


def test_parts_add_up():
    parts = [token_meters([0.1, -0.2]), token_meters([0.3]), TokenMeters()]
    whole = token_meters([0.1, -0.2, 0.3]).means()
    merged = (parts[0] + parts[1] + parts[2]).means()
    del whole["entropy"], merged["entropy"]  # numbered from 0 in each part
    assert merged == pytest.approx(whole, rel=1e-14)
    assert (TokenMeters() + parts[0]).numbers() == parts[0].numbers()


class OtherProcess(World):
    """A world of two processes, of which the other says what it was given."""

    def gather(self, value):
        return [value, OTHER]


OTHER = SampleMeters(samples=1, reward=1, reward_square=1, length=9, length_max=9, truncated=1, groups=1)


def test_samples():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
    advantages = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), AdvantageOptions(dynamic_sampling=True))
    lengths, truncated = torch.tensor([2, 4, 6, 0]), torch.tensor([False, False, True, False])
    meters = SampleMeters.of(rewards, lengths, truncated, advantages, verifier_failures=3)
    assert meters.means() == {
        "reward_mean": 0.5,
        "reward_std": pytest.approx(math.sqrt(0.5 / 4)),
        "length_mean": 3,
        "length_max": 6,
        "truncation_rate": 0.25,
        "verifier_failures": 3,
        "groups_equal": 0.5,
        "groups_dropped": 0.5,
    }
    assert meters.over(World(0, 1, CPU)) == meters
    both = meters.over(OtherProcess(0, 2, CPU)).means()
    assert both["reward_mean"] == pytest.approx(3 / 5)
    assert both["length_max"] == 9
    assert both["truncation_rate"] == pytest.approx(2 / 5)


def test_no_samples():
    empty = torch.empty(0)
    advantages = group_advantages(empty, empty.long())
    assert SampleMeters.of(empty, empty.long(), empty.bool(), advantages).means() == {}


def test_lengths_of_another_batch():
    advantages = group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"lengths: expected \(2,\) like rewards, got \(3,\)"):
        SampleMeters.of(torch.ones(2), torch.ones(3), torch.zeros(2, dtype=torch.bool), advantages)
