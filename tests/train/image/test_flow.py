"""The objective: its distribution of times, what it minimises, and that a step repeats."""

import numpy as np
import pytest
import torch

from eightfold.train.image.config import FlowConfig
from eightfold.train.image.flow import flow_loss, noised
from eightfold.train.order import step_generator


def draws(options, count=20000, **changes):
    return noised(torch.zeros(count, 1, 1, 1), options, step_generator(1, 2, 3), **changes)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (-0.5, 0.7, 6.0)])
def test_times_are_logit_normal_then_shifted(mean, std, shift):
    times = draws(FlowConfig(mean=mean, std=std, shift=shift)).times.numpy()
    assert np.array_equal(times, np.floor(times))
    assert times.min() >= 0
    assert times.max() <= 999
    # A monotonic map keeps quantiles; normal quantiles at -1, 0 and 1 deviation.
    for z, share in ((-1, 0.1587), (0, 0.5), (1, 0.8413)):
        sigma = 1 / (1 + np.exp(-(mean + std * z)))
        want = 1000 * shift * sigma / (1 + (shift - 1) * sigma)
        assert np.quantile(times, share) == pytest.approx(want, abs=12)


def test_points_lie_between_data_and_noise():
    clean = torch.randn(64, 3, 4, 4)
    drawn = noised(clean, FlowConfig(), step_generator(0, 0, 0))
    noise = drawn.velocities + clean
    assert noise.std() == pytest.approx(1, abs=0.05)
    share = ((drawn.points - clean) / drawn.velocities).median(-1).values.median(-1).values[:, 0]
    torch.testing.assert_close(drawn.points, clean + share[:, None, None, None] * drawn.velocities, atol=2e-4, rtol=0)
    # The time is the share of noise, cut to a whole thousandth.
    assert ((1000 * share - drawn.times) > -0.05).all()
    assert ((1000 * share - drawn.times) < 1.05).all()


def test_the_loss_of_the_best_guess_is_what_it_has_to_be():
    """Where all data are 0, x = s noise and the velocity is x / s: no error. Guessing 0 costs noise's variance."""
    drawn = draws(FlowConfig())
    assert flow_loss(torch.zeros_like(drawn.velocities), drawn.velocities) / 20000 == pytest.approx(1, abs=0.03)
    assert flow_loss(drawn.velocities, drawn.velocities) == 0


def test_loss_is_a_sum_over_pictures_of_means():
    error = torch.arange(12.0).view(2, 3, 2, 1)
    want = error[0].square().mean() + error[1].square().mean()
    assert flow_loss(error, torch.zeros_like(error)) == want
    assert flow_loss(error.bfloat16(), torch.zeros_like(error)).dtype == torch.float32


def test_captions_are_dropped_in_training_alone():
    assert draws(FlowConfig(drop_caption=0.25)).dropped.float().mean() == pytest.approx(0.25, abs=0.02)
    assert not draws(FlowConfig(drop_caption=1.0), training=False).dropped.any()
    assert draws(FlowConfig(drop_caption=1.0)).dropped.all()


def test_a_step_repeats_and_another_differs():
    def step(seed, number):
        return noised(torch.ones(4, 3, 2, 2), FlowConfig(), step_generator(seed, 5, number))

    first = step(1, 7)
    for other, same in ((step(1, 7), True), (step(1, 8), False), (step(2, 7), False)):
        assert torch.equal(first.points, other.points) == same
        assert torch.equal(first.times, other.times) == same
