"""fp8_modulate_linear beside the modulated norm and fp8_linear apart: the same bits, forward and backward."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eightfold.nn import WeightCache
from eightfold.nn import functional as F
from eightfold.ops import gated_residual_layer_norm_modulate, layer_norm_modulate
from layer_cases import DTYPES, H, make

BATCH, TOKENS, OUT, EPS = 3, 70, 144, 1e-6
KINDS = ["gated", "ungated", "alone"]
NAMES = ("x", "scale", "shift", "weight", "bias", "branch", "gate")


def setup(kind, device, dtype=torch.bfloat16, weight_dtype=torch.float32, vector_dtype=torch.float32, tokens=TOKENS):
    x, branch = make(device, (BATCH, tokens, H), (BATCH, tokens, H), dtype=dtype, scale=1.0)
    table = torch.randn(BATCH, 6, H, device=device, dtype=vector_dtype)
    scale, shift, gate = (vector.requires_grad_() for vector in table.unbind(1)[:3])  # rows that lie apart
    weight, bias = make(device, (OUT, H), (OUT,), dtype=weight_dtype)
    found = dict(zip(NAMES, (x, scale, shift, weight, bias, branch, gate), strict=True))
    drop = {"gated": (), "ungated": ("gate",), "alone": ("branch", "gate")}[kind]
    return {name: tensor for name, tensor in found.items() if name not in drop}


def fused(x, scale, shift, weight, bias, branch=None, gate=None, **options):
    total, out = F.fp8_modulate_linear(x, scale, shift, EPS, weight, bias, branch, gate, **options)
    return [out] if total is None else [total, out]


def apart(x, scale, shift, weight, bias, branch=None, gate=None):
    if branch is None:
        return [F.fp8_linear(layer_norm_modulate(x, scale, shift, EPS), weight, bias)]
    total, normed = gated_residual_layer_norm_modulate(x, branch, gate, scale, shift, EPS)
    return [total, F.fp8_linear(normed, weight, bias)]


def gradients(function, given, outs=None):
    outs = function(**given) if outs is None else outs
    torch.manual_seed(1)
    dys = [torch.randn_like(out) for out in outs]
    wanted = [tensor for tensor in given.values() if tensor.requires_grad]
    return torch.autograd.grad(outs, wanted, dys)


def same(ours, others):
    for a, b in zip(ours, others, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("vector_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_functions_apart(device, kind, dtype, vector_dtype):
    given = setup(kind, device, dtype, dtype, vector_dtype)
    training = fused(**given)
    same(training, apart(**given))
    same(gradients(fused, given), gradients(apart, given))
    with torch.no_grad():
        same(fused(**given), training)
        same(fused(**given, cache=WeightCache()), training)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_change_no_other_gradient(device, kind):
    given = setup(kind, device)
    wanted = dict(zip(given, gradients(fused, given), strict=True))
    for frozen in given:
        some = {name: t.detach().requires_grad_(name != frozen) for name, t in given.items()}
        same(gradients(fused, some), [grad for name, grad in wanted.items() if name != frozen])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_strides(device, kind):
    given = setup(kind, device)
    wanted = gradients(fused, given)
    again = checkpoint(lambda *t: fused(**dict(zip(given, t, strict=True))), *given.values(), use_reentrant=False)
    same(gradients(fused, given, again), wanted)
    strided = {
        name: t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() if t.dim() == 3 else t
        for name, t in given.items()
    }
    same(gradients(fused, strided), wanted)


def test_no_tokens(device):
    given = setup("gated", device, tokens=0)
    for grad in gradients(fused, given):
        assert not grad.any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(5, 32)}, ValueError, r"x must be \[batch, tokens, features\], got \[5, 32\]"),
        ({"x": torch.zeros(2, 5, 32).half()}, TypeError, "x must be bfloat16 or float32, got torch.float16"),
        ({"branch": torch.zeros(2, 4, 32)}, ValueError, "branch must be as x"),
        ({"branch": None}, ValueError, r"gate must be None without a branch, got \[2, 32\]"),
        ({"scale": torch.zeros(32)}, ValueError, r"scale must be \[2, 32\], a vector of each sample, got \[32\]"),
        ({"shift": torch.zeros(2, 16)}, ValueError, r"shift must be \[2, 32\], .* got \[2, 16\]"),
        ({"gate": torch.zeros(1, 32)}, ValueError, r"gate must be \[2, 32\], .* got \[1, 32\]"),
        ({"weight": torch.zeros(48, 16)}, ValueError, r"weight must be \[out, 32\], as x has it, got \[48, 16\]"),
        ({"bias": torch.zeros(47)}, ValueError, r"bias of weight must be \[48\], got \[47\]"),
    ],
)
def test_errors_name_the_argument_and_its_value(changes, error, message):
    vectors = dict.fromkeys(("scale", "shift", "gate"), torch.zeros(2, 32))
    tensors = {"x": torch.zeros(2, 5, 32), "branch": torch.zeros(2, 5, 32), "weight": torch.zeros(48, 32), "bias": None}
    call = partial(F.fp8_modulate_linear, eps=EPS, **{**vectors, **tensors, **changes})
    with pytest.raises(error, match=message):
        call()
