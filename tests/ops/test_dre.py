"""DRE states against the reference, bit for bit where promised; every degenerate group; misuse."""

import functools
import math

import pytest
import torch

from adamw_problem import E4M3, SHAPES, WITH_CODES, bits, log_normal, stored
from eightfold.ops import optim as ops
from eightfold.reference import optim as reference


def close_codes(actual, expected, share=1e-2):
    """Equal but for neighbours at rounding boundaries."""
    difference = (bits(actual) - bits(expected)).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= share


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_matches_reference(device, shape, dtype):
    x = log_normal(shape, 2.0, device, zeros=0.1).to(dtype)
    length = x[0].numel()
    codes, maxima, exponents = ops.dre_quantize(x)
    expected = reference.dre_quantize(x.cpu(), length)
    assert codes.shape == x.shape
    assert maxima.shape == exponents.shape == (shape[0], -(-length // 128))
    torch.testing.assert_close(maxima.cpu(), expected[1], rtol=0, atol=0)
    torch.testing.assert_close(exponents.cpu(), expected[2], rtol=0, atol=0)
    close_codes(codes.cpu(), expected[0])
    values = ops.dre_dequantize(codes, maxima, exponents)
    expected_values = reference.dre_dequantize(codes.cpu(), maxima.cpu(), exponents.cpu(), length)
    torch.testing.assert_close(values.cpu(), expected_values, rtol=2e-5, atol=0)


def test_every_code_and_exponent_decodes_as_the_reference(device):
    codes = torch.arange(256, dtype=torch.uint8).view(1, 2, 128).expand(256, 2, 128).contiguous().view(E4M3)
    codes = torch.where((bits(codes) & 0x7F) == 0x7F, 0, bits(codes)).to(torch.uint8).view(E4M3)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 2).contiguous()
    for maximum in (1.0, 3e-39, 1.7e38):
        maxima = torch.full((256, 2), maximum)
        actual = ops.dre_dequantize(*(t.to(device) for t in (codes, maxima, exponents)), 256).cpu()
        expected = reference.dre_dequantize(codes, maxima, exponents, 256)
        # A result may differ by one step of the subnormals; below 1e-30 of the maximum only the sign is promised.
        relevant = expected.abs() > 1e-30 * maximum
        torch.testing.assert_close(actual[relevant], expected[relevant], rtol=1e-4, atol=1.5e-45)
        assert torch.equal(actual.sign(), expected.sign())
        assert torch.equal(actual[bits(codes) == 0x7E], torch.full_like(actual, maximum)[bits(codes) == 0x7E])


def test_codes_are_monotone(device):
    for sigma in (0.1, 1.0, 4.0):
        x = log_normal((256, 128), sigma, device).abs().sort(-1).values
        assert (bits(ops.dre_quantize(x)[0]).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("maximum", [1e-45, 2e-44, 1e-40, 1.2e-38, 1e-30, 1.0, 1e30, 3.4e38])
def test_largest_element_is_exact(device, maximum):
    x = torch.full((1, 128), maximum, device=device) * torch.linspace(1, 0.01, 128, device=device)
    values = stored(x)
    assert values[0, 0] == x[0, 0]
    assert values[0, 0] == torch.tensor(maximum)
    assert ((values > 0) == (x > 0)).all()


@pytest.mark.parametrize(
    "group",
    [
        torch.zeros(128),
        torch.full((128,), 0.3),
        torch.full((128,), 1e-45),
        torch.tensor([0.3, -0.3] * 64),  # one distinct magnitude: COAT loses the sign of half of these
        torch.tensor([-0.7]),
        torch.tensor([0.0] * 127 + [2.5]),
        torch.tensor([-2.5] + [0.0] * 127),  # COAT decodes the zeros to +-2.5
        torch.tensor([0.0] * 64 + [3e-42] * 64),
    ],
    ids=[
        "zeros",
        "constant",
        "constant subnormal",
        "one magnitude",
        "single",
        "last non-zero",
        "first non-zero",
        "half",
    ],
)
def test_degenerate_groups_are_exact(device, group):
    x = group[None].to(device)
    assert torch.equal(stored(x), x)


@pytest.mark.parametrize("zeros", [0.1, 0.5, 0.99])
def test_zeros_stay_zeros_and_do_not_hurt_their_neighbours(device, zeros):
    x = log_normal((200, 128), 1.0, device, zeros=zeros)
    values = stored(x)
    assert torch.equal(values == 0, x == 0)
    error = ((values - x).abs() / x.abs())[x != 0]
    assert error.median() < 0.02  # COAT's minimum of groups with zeros is wrong: about 0.1


def test_almost_constant_group(device):
    x = 1 + 1e-6 * torch.rand(64, 128, device=device)
    assert (stored(x) / x - 1).abs().max() < 0.004  # half a step of E4M3 divided by k = 16


@pytest.mark.parametrize("low", [1e-6, 1e-12, 1e-30, 1e-45])
def test_wide_groups_contract(device, low):
    """R > B: k below 1 keeps the smallest element, which plain E4M3 and 'only ever expand' rules flush to 0."""
    x = torch.logspace(0, max(math.log10(low), -37.9), 128)
    x[-1] = low
    x = x[None].to(device)
    codes, maxima, exponents = ops.dre_quantize(x)
    values = ops.dre_dequantize(codes, maxima, exponents)
    assert exponents[0, 0] < 15
    assert (values > 0).all()
    ratio = (values / x)[0, :-1].log().abs().max()
    assert ratio <= 0.25 * math.log(1 / low) / math.log(1e5) + 0.07


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_groups_stay_visible(device, bad):
    x = torch.randn(3, 256, device=device)
    x[1, 200] = bad
    codes, maxima, exponents = ops.dre_quantize(x)
    expected = torch.zeros(3, 256, dtype=torch.bool, device=device)
    expected[1, 128:] = True
    assert torch.equal(maxima.isnan().repeat_interleave(128, 1), expected)
    assert (bits(codes)[expected] == 0x7F).all()
    assert torch.equal(ops.dre_dequantize(codes, maxima, exponents).isnan(), expected)


def test_exponent_puts_the_smallest_element_next_to_code_3(device):
    """k is the sixteenth nearest to log2(B) / log2(M / m), or the one below it where (M / m)^k would exceed 1.5 B."""
    ratio = torch.cat([1 + torch.logspace(-6, 0, 500), torch.logspace(0.31, 37, 3000)]).double()
    x = torch.stack([torch.ones(3500), (1 / ratio).float()], 1)
    ratio = (x[:, 0].double() / x[:, 1].double()).log2()
    k = ops.dre_quantize(x.to(device))[2].cpu()[:, 0].double().add(1) / 16
    wanted = reference.BOUND_LOG2 / ratio
    assert (k * ratio <= reference.TOP_LOG2 * (1 + 1e-6)).all()
    assert (k - wanted <= 1 / 32 * (1 + 1e-4)).all()
    below = (k + 1 / 16) * ratio > reference.TOP_LOG2 * (1 - 1e-6)
    assert ((wanted - k <= 1 / 32 * (1 + 1e-4)) | (k == 16) | below).all()
    assert (k[ratio < 1] == 16).all()
    assert (k[ratio > 110] < 0.2).all()


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3, 0.6])
def test_storing_again_changes_nothing(device, spread):
    """k comes out the same from the decoded group, so that states without news do not drift."""
    once = stored(torch.exp(spread * torch.randn(500, 128)).to(device))
    again = once
    for _ in range(10):
        again = stored(again)
    torch.testing.assert_close(again, once, rtol=1e-5, atol=0)


def test_state_bytes():
    x = torch.randn(64, 1024)
    total = sum(t.nbytes for _ in "mv" for t in ops.dre_quantize(x))
    assert total / x.numel() == 2 * (1 + 5 / 128)
    assert total / x.numel() <= 2.1


def test_opcheck(device):
    x = log_normal((5, 300), 1.0, device)
    torch.library.opcheck(torch.ops.eightfold.dre_quantize.default, (x, 300))
    state = ops.dre_quantize(x)
    torch.library.opcheck(torch.ops.eightfold.dre_dequantize.default, (*state, 300), test_utils=WITH_CODES)


def test_compile(device):
    x = log_normal((5, 300), 1.0, device)
    compiled = torch.compile(
        lambda x: ops.dre_dequantize(*ops.dre_quantize(x * 2)), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), stored(x * 2))


@pytest.mark.gpu
def test_large_tensor():
    """Element indices beyond 2^31."""
    rows, length = 17000, 128 * 1024
    x = torch.zeros(rows, length, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3.0
    codes, maxima, exponents = ops.dre_quantize(x)
    assert (bits(codes[-1]) == 0x7E).all()
    assert (maxima[-1] == 3).all()
    assert (ops.dre_dequantize(codes[-1:], maxima[-1:], exponents[-1:]) == 3).all()


def test_quantize_errors():
    x = torch.randn(4, 300)
    call = functools.partial(pytest.raises, RuntimeError)
    with call(match=r"dre_quantize: x must be float32 or bfloat16, got float64"):
        ops.dre_quantize(x.double())
    with call(match=r"dre_quantize: x must be contiguous, got shape \[300, 4\] with strides \[1, 300\]"):
        ops.dre_quantize(x.t())
    with call(match=r"dre_quantize: x of shape \[4, 300\] does not split into rows of row_length 7"):
        ops.dre_quantize(x, 7)
    with call(match=r"dre_quantize: row_length must be at least 1, got 0"):
        ops.dre_quantize(x, 0)
    codes, maxima, exponents = ops.dre_quantize(x)
    with call(match=r"dre_dequantize: codes must be float8_e4m3fn, got uint8"):
        ops.dre_dequantize(codes.view(torch.uint8), maxima, exponents)
    with call(match=r"dre_dequantize: maxima must have shape \[4, 3\], got \[4, 2\]"):
        ops.dre_dequantize(codes, maxima[:, :2].contiguous(), exponents)
    with call(match=r"dre_dequantize: exponents must be uint8, got float32"):
        ops.dre_dequantize(codes, maxima, exponents.float())


@pytest.mark.parametrize("shape", [(0, 128), (0,), (3, 0)])
def test_empty(device, shape):
    x = torch.empty(shape, device=device)
    codes, maxima, exponents = ops.dre_quantize(x, 128)
    assert codes.shape == shape
    assert maxima.shape == exponents.shape == (0, 1)
    assert ops.dre_dequantize(codes, maxima, exponents, 128).shape == shape
