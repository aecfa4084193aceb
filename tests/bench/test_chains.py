"""The chains beside which the fused kernels are timed do the same work."""

import pytest
import torch

from eightfold import reference

ROWS, COLS = 256, 384


@pytest.fixture
def chains(bench):
    return bench.chains


def close(codes, expected):
    """Codes and scales [groups, rows] of a chain against the reference's, some of which round the other way."""
    values = codes[0].float().view(codes[0].shape[0], -1, 128) * codes[1].t()[..., None]
    wanted = expected[0].float().reshape(values.shape) * expected[1][..., None]
    assert (values - wanted).norm() < 2e-2 * wanted.norm()  # swiglu's product is not rounded to bf16 on the way


def turned(columns):
    return columns[0].t().contiguous(), columns[1].t().contiguous()


def test_casts(chains):
    x = torch.randn(ROWS, COLS).bfloat16()
    both = reference.quantize_both(x)
    close(chains.both(x)[0], both[:2])
    close(chains.both(x)[1], turned(both[2:]))
    squares, wanted = chains.squares(x), reference.quantize(x, [128, 128])
    assert torch.equal(squares[1], wanted[1])
    assert torch.equal(squares[0].float(), wanted[0].float())


def test_norms(chains):
    x, residual, dy = (torch.randn(ROWS, COLS).bfloat16() for _ in range(3))
    weight = torch.rand(COLS).bfloat16() + 0.5
    wanted = reference.rms_norm_quantize(x, weight, chains.EPS, True)
    rows, columns, saved = chains.norm_training(x, weight)
    close(rows, wanted[:2])
    close(columns, turned(wanted[2:4]))
    close(saved, wanted[4:6])
    close(chains.norm(x, weight), wanted[:2])
    total, training = chains.add_norm_training(x, residual, weight)
    assert torch.equal(total, x + residual)
    close(training[0], reference.rms_norm_quantize(x + residual, weight, chains.EPS, True)[:2])
    close(
        chains.add_norm(x, residual, weight)[1],
        reference.rms_norm_quantize(x + residual, weight, chains.EPS, False)[:2],
    )
    got = chains.norm_backward(dy, *wanted[4:7], weight)
    for a, b in zip(got, reference.rms_norm_backward(dy, *wanted[4:7], weight, None), strict=True):
        assert (a.float() - b.float()).norm() < 5e-3 * b.float().norm()


def test_swiglu(chains):
    gate, up, dh = (torch.randn(ROWS, COLS).bfloat16() for _ in range(3))
    torch.testing.assert_close(chains.swiglu_alone(gate, up), reference.swiglu(gate, up))
    wanted = reference.swiglu_quantize(gate, up, True)
    for codes, at in zip(chains.swiglu_training(gate, up), (0, 2, 4), strict=True):
        close(codes, wanted[at : at + 2])
    saved = wanted[2:]
    backward = reference.swiglu_backward_quantize(dh, *saved)
    dgate, dup, h = chains.swiglu_backward(dh, *saved)
    close(dgate[0], backward[0:2])
    close(dgate[1], turned(backward[2:4]))
    close(dup[0], backward[4:6])
    close(dup[1], turned(backward[6:8]))
    close(h, turned(backward[8:10]))
