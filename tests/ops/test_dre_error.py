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
    """Issue 2: relative MSE of m / sqrt(v) at least 1.6 times below plain per-group E4M3; no positive v stored as 0."""
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
RESEARCH = (0.044, 0.08, 0.19, 0.20)  # research 1.4, row "E4M3 + DRE"


def error_after_3000_steps(sigma, groups, *rules):
    """RMS relative error of v, pooled over all groups, for each of the four columns and each way of storing v.

    v = beta2 v + (1 - beta2) g^2, read from and written to its 8 bits at every step, against float32. g is normal,
    independent from step to step, times a scale of its own for each element: exp(sigma times a normal number).
    """
    generator = torch.Generator().manual_seed(0)
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
    """No worse than the research's row in each column: 256 groups of 128 elements, gradient scales of spread 0.3.

    The row's own spread is not recorded; at 0.5 plain E4M3 gives its row (0.08, 0.16, 0.31, 0.29). Ours over 512 groups
    (beta2 0.95, 0.99, 0.999, 0.999 decaying), two seeds where they differ:
    spread 0.3: 0.027 0.053 0.138-0.139 0.132-0.134    spread 0.5: 0.044 0.079 0.178-0.190 0.149-0.161
    spread 1.0: 0.082 0.142 0.240-0.262 0.223-0.225    spread 2.0: 0.155 0.300 0.317 0.306
    Groups as wide as the last two need k of 1 and below, and miss the row, as COAT's formulas do. At 0.999 and wider
    spreads a few groups carry most of the error, hence the hundreds of groups.
    """
    (ours,) = error_after_3000_steps(0.3, 256, stored)
    assert all(mine <= limit for mine, limit in zip(ours, RESEARCH, strict=True)), ours


def test_second_moment_does_not_drift():
    """Elements of one scale: rounding moves v either way, where COAT's k wanders and loses 40 % of v at 0.999."""
    ours, coat = error_after_3000_steps(0.0, 16, stored, coat_stored)
    assert all(mine <= limit for mine, limit in zip(ours, (0.012, 0.017, 0.05, 0.1), strict=True)), ours
    assert coat[2] > 0.3


@pytest.mark.parametrize(("sigma", "gain"), [(0.3, 1.6), (2.0, 1.8)])
def test_second_moment_against_plain_e4m3(sigma, gain):
    ours, plain = error_after_3000_steps(sigma, 16, stored, plain_stored)
    assert all(gain * mine <= theirs for mine, theirs in zip(ours, plain, strict=True)), (ours, plain)
