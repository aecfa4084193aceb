"""What 8-bit states lose: the update direction m / sqrt(v), and v after thousands of steps."""

import pytest
import torch

from adamw_problem import E4M3, stored
from eightfold.reference.quant import dequantize, quantize


def moments(sigma, device):
    """Moments whose gradients have log-normal scales with spread sigma, 40 steps in (betas 0.9 and 0.999)."""
    generator = torch.Generator().manual_seed(1)
    scale = 1e-4 * torch.exp(sigma * torch.randn((256, 128), generator=generator))
    m, v = torch.zeros(256, 128), torch.zeros(256, 128)
    for _ in range(40):
        g = scale * torch.randn((256, 128), generator=generator)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return m.to(device), v.to(device)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_error_of_the_update_direction(device, sigma):
    """Relative MSE of m / sqrt(v) at least 1.6 times below plain per-group E4M3; no positive v stored as 0."""
    m, v = moments(sigma, device)

    def mse(m_stored, v_stored):
        exact = m.double() / (v.double().sqrt() + 1e-8)
        return (
            (m_stored.double() / (v_stored.double().sqrt() + 1e-8) - exact).square().mean() / exact.square().mean()
        ).item()

    plain = mse(*(dequantize(*quantize(x.cpu(), [1, 128]), [1, 128], torch.float32).to(device) for x in (m, v)))
    expanded = mse(stored(m), stored(v))
    assert (stored(v) > 0).all()
    assert expanded * 1.6 <= plain
    assert expanded <= {0.3: 4e-4, 1.0: 9e-4, 2.0: 2.5e-3}[sigma]


COAT_BOUND_LOG2 = 16.614709844115207  # log2(448^2 / 2)


def coat_stored(x):
    """The 'E4M3 + DRE' row's storage, as COAT's kernel writes it: exponent, root of max min and scale, a float each."""
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    k = (16 * COAT_BOUND_LOG2 / (high / low).log2()).floor() / 16
    centre = high.sqrt() * low.sqrt()
    scale = (high / centre) ** k / 448
    return (((x / centre) ** k / scale).clamp(max=448).to(E4M3).float() * scale) ** (1 / k) * centre


def plain_stored(x):
    """E4M3 with one scale for each 128, and nothing else."""
    scale = x.amax(-1, keepdim=True) / 448
    return (x / scale).to(E4M3).float() * scale


BETA2 = torch.tensor([0.95, 0.99, 0.999, 0.999])[:, None, None]
DECAYING = torch.tensor([False, False, False, True])[:, None, None]  # gradients fall ten times over the run
# Emulated figures of COAT's formulas, two significant digits: E4M3 per 128, and E4M3 + DRE.
PLAIN_ROW, DRE_ROW = (0.08, 0.16, 0.31, 0.29), (0.044, 0.08, 0.19, 0.20)


def error_after_3000_steps(sigma, groups, *rules, seed=0):
    """RMS relative error of v, pooled over all groups, for each of the four columns and each way of storing v.

    v = beta2 v + (1 - beta2) g^2, read from and written to its 8 bits at every step, against float32. g is normal,
    independent from step to step, times a scale of its own for each element: exp(sigma times a normal number).
    """
    generator = torch.Generator().manual_seed(seed)
    scale = 1e-3 * torch.exp(sigma * torch.randn((groups, 128), generator=generator))
    exact = torch.zeros(4, groups, 128)
    states = [exact] * len(rules)
    for step in range(3000):
        g = scale * torch.randn((groups, 128), generator=generator)
        fresh = (1 - BETA2) * g * g * torch.where(DECAYING, 10 ** (-2 * step / 3000), 1.0)
        exact = BETA2 * exact + fresh
        states = [rule(BETA2 * v + fresh) for rule, v in zip(rules, states, strict=True)]
    return [((v.double() - exact) / exact).square().mean((1, 2)).sqrt().tolist() for v in states]


def test_second_moment_after_3000_steps():
    """No worse than the row of COAT's formulas in each column, to the digits it has: 1,024 groups of 128 elements.

    The row does not say how far apart the gradient scales in a group are. Plain E4M3 gives its own row at a spread of
    0.5, so that is the set-up, and the test checks both. Measured at other spreads over 512 groups (beta2 0.95, 0.99,
    0.999, 0.999 decaying): 0.3: 0.027 0.053 0.138 0.133; 1.0: 0.082 0.142 0.25 0.22; 2.0: 0.155 0.30 0.32 0.31. Groups
    as wide as the last two need k of 1 and below.
    """
    runs = [error_after_3000_steps(0.5, 256, stored, seed=seed) for seed in range(4)]
    (ours,) = torch.tensor(runs).double().square().mean(0).sqrt().tolist()
    (plain,) = error_after_3000_steps(0.5, 256, plain_stored)
    assert plain == pytest.approx(PLAIN_ROW, rel=0.1)
    digits = (3, 2, 2, 2)
    assert all(round(m, d) <= row for m, row, d in zip(ours, DRE_ROW, digits, strict=True)), ours


def test_second_moment_does_not_drift():
    """Elements of one scale: rounding moves v either way, where COAT's k wanders and loses 40 % of v at 0.999."""
    ours, coat = error_after_3000_steps(0.0, 16, stored, coat_stored)
    assert all(mine <= limit for mine, limit in zip(ours, (0.012, 0.017, 0.05, 0.1), strict=True)), ours
    assert coat[2] > 0.3


@pytest.mark.parametrize(("sigma", "gain"), [(0.3, 1.6), (2.0, 1.8)])
def test_second_moment_against_plain_e4m3(sigma, gain):
    ours, plain = error_after_3000_steps(sigma, 16, stored, plain_stored)
    assert all(gain * mine <= theirs for mine, theirs in zip(ours, plain, strict=True)), (ours, plain)
