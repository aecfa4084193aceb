"""What 8-bit states lose: the update direction m / sqrt(v), and v after thousands of steps."""

import pytest
import torch

from adamw_problem import E4M3, stored
from eightfold.reference import optim as reference
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


def coat_stored(x):
    """The 'E4M3 + DRE' row's storage, as COAT's kernel writes it: exponent, root of max min and scale, a float each."""
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    k = (16 * reference.BOUND_LOG2 / (high / low).log2()).floor() / 16
    centre = high.sqrt() * low.sqrt()
    scale = (high / centre) ** k / 448
    return (((x / centre) ** k / scale).clamp(max=448).to(E4M3).float() * scale) ** (1 / k) * centre


@pytest.mark.parametrize(
    ("beta2", "decaying", "limit"),
    [(0.95, False, 0.044), (0.99, False, 0.08), (0.999, False, 0.19), (0.999, True, 0.20)],
)
def test_second_moment_after_3000_steps(beta2, decaying, limit):
    """RMS relative error of v against float32 storage: research 1.4, row 'E4M3 + DRE', and COAT's formulas beside ours.

    Set-up: 64 groups of 128 elements, gradient scales log-normal with spread 0.4, gradients normal around 0; 'decaying'
    lowers the scale 10 times over the run. v is stored after every step. At 0.999 few groups carry most of the error:
    other seeds give 0.16 to 0.20, for COAT's formulas as for ours.
    """
    generator = torch.Generator().manual_seed(2)
    scale = 1e-3 * torch.exp(0.4 * torch.randn((64, 128), generator=generator))
    exact = torch.zeros(64, 128)
    ours, coat = torch.zeros(64, 128), torch.zeros(64, 128)
    for step in range(3000):
        g = scale * torch.randn((64, 128), generator=generator) * (10 ** (-step / 3000) if decaying else 1.0)
        fresh = (1 - beta2) * g * g
        exact = beta2 * exact + fresh
        ours = stored(beta2 * ours + fresh)
        coat = coat_stored(beta2 * coat + fresh)
    error, coat_error = (((v - exact) / exact).square().mean().sqrt().item() for v in (ours, coat))
    assert error <= limit
    assert error <= 1.02 * coat_error
