"""fp8_norm_qkv beside fp8_norm_linears and rotary apart: the same bits, but for the order of the biases' sums."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eightfold.nn import WeightCache
from eightfold.nn import functional as F
from eightfold.ops import rotary
from layer_cases import DTYPES, EPS, H, make, relative

BATCH, TOKENS = 2, 72
# rows of the three weights, head size: heads shared by queries, odd ones, weights that share no products
WIDTHS = {"grouped": (512, 128, 128, 64), "one": (256, 128, 48, 16), "apart": (192, 64, 64, 64)}


def qkv(x, residual, norm, *parameters, tables, head_dim, **options):
    weights, biases = parameters[:3], parameters[3:]
    total, out = F.fp8_norm_qkv(x, norm, EPS, weights, biases or None, tables, head_dim, residual, **options)
    return [*out, *([] if total is None else [total])]


def composed(x, residual, norm, *parameters, tables, head_dim, **options):
    weights, biases = parameters[:3], parameters[3:]
    total, out = F.fp8_norm_linears(x, norm, EPS, weights, biases or None, residual, **options)
    q, k, v = (y.unflatten(-1, (-1, head_dim)) for y in out)
    return [rotary(q, *tables), rotary(k, *tables), v, *([] if total is None else [total])]


def setup(widths, device, dtype=torch.bfloat16, biased=True, residual=True, weight_dtype=torch.float32):
    *rows, head_dim = WIDTHS[widths]
    x, added = make(device, (BATCH, TOKENS, H), (BATCH, TOKENS, H), dtype=dtype, scale=1.0)
    shapes = [(H,), *((r, H) for r in rows), *((r,) for r in rows if biased)]
    angle = torch.rand(1, TOKENS, 1, head_dim // 2, device=device) * 100
    options = {"tables": (angle.cos(), angle.sin()), "head_dim": head_dim}
    return [x, added if residual else None, *make(device, *shapes, dtype=weight_dtype)], options


def run(function, inputs, options, swapped=True):
    outs = function(*inputs, **options)
    torch.manual_seed(1)
    dys = [torch.randn_like(out) for out in outs]
    if swapped:  # as attention leaves them: heads before tokens
        dys = [dy.transpose(1, 2).contiguous().transpose(1, 2) for dy in dys]
    return outs, torch.autograd.grad(outs, [t for t in inputs if t is not None and t.requires_grad], dys)


def assert_equal(ours, apart, biases=0):
    """All bits; of the last ``biases`` gradients fp32 rounding."""
    same = len(ours) - biases
    assert len(ours) == len(apart)
    for a, b in zip(ours[:same], apart[:same], strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    for a, b in zip(ours[same:], apart[same:], strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < (1e-6 if a.dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("save", ["columns", "input"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
def test_bits_of_the_functions_apart(device, widths, dtype, biased, residual, save):
    inputs, options = setup(widths, device, dtype, biased, residual, dtype)
    options["save"] = save
    for swapped in (False, True):
        outs, grads = run(qkv, inputs, options, swapped)
        apart, apart_grads = run(composed, inputs, options, swapped)
        assert_equal(outs, apart)
        assert_equal(grads, apart_grads, 3 * biased)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(qkv(*inputs, **options), outs, strict=True))


@pytest.mark.parametrize(
    "frozen", [(3,), (3, 4, 5), (0, 1, 2), (6, 7, 8), (3, 4, 5, 6, 7), (0, 1, 2, 3, 4, 5)], ids=str
)
def test_frozen_inputs(device, frozen):
    """Only the biases of some layers, no weight at all, and so on: the gradients that remain keep their bits."""
    inputs, options = setup("grouped", device)
    _, wanted = run(qkv, inputs, options)
    some = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    _, grads = run(qkv, some, options)
    assert_equal(grads, [want for i, want in enumerate(wanted) if i not in frozen])


def test_caches_and_mixed_biases(device):
    inputs, options = setup("grouped", device)
    outs, grads = run(qkv, inputs, options)
    caches = [WeightCache() for _ in range(3)]
    for _ in range(2):
        cached, cached_grads = run(qkv, inputs, {**options, "caches": caches})
        assert_equal([*cached, *cached_grads], [*outs, *grads])
    inputs[7] = inputs[7].detach().bfloat16().requires_grad_()
    inputs[8] = None
    (_, grads), (_, apart) = run(qkv, inputs, options), run(composed, inputs, options)
    assert_equal(grads, apart, 2)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._opname if function.namespace == "eightfold" else f"aten.{function._opname}"] += 1
        return function(*args, **(kwargs or {}))


def test_launches(device):
    """The backward pass reads the gradients of q, k and v once; nothing copies them, nothing adds them up."""
    inputs, options = setup("grouped", device)
    outs = qkv(*inputs, **options)
    dys = [torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2) for out in outs[:3]]
    with Calls() as calls:
        torch.autograd.grad(outs, inputs, [*dys, torch.randn_like(outs[3])])
    ours = {name: count for name, count in calls.counts.items() if not name.startswith("aten.")}
    expected = {"rotary_backward_quantize": 1, "quantize_stacked": 1, "fp8_gemm": 2, "rms_norm_backward": 1}
    assert ours == expected
    assert not {"aten.sum", "aten.clone", "aten.copy_"} & set(calls.counts)


@pytest.mark.parametrize("widths", ["grouped", "apart"])
def test_compiled(device, widths):
    inputs, options = setup(widths, device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: qkv(*t, **options), fullgraph=True, backend="aot_eager_decomp_partition")
    (outs, grads), (eager, eager_grads) = run(compiled, inputs, {}), run(qkv, inputs, options)
    assert_equal([*outs, *grads], [*eager, *eager_grads], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, H)}, r"x must be \[batch, tokens, features\], got \[6, 256\]"),
        ({"weights": [torch.zeros(64, H)]}, "weights must be those of queries, keys and values, got 1"),
        ({"weights": [torch.zeros(n, H) for n in (64, 96, 64)]}, r"rows of weights\[1\] must be heads of 64, got \[96"),
        ({"save": "no"}, "save must be 'columns' or 'input', got 'no'"),
    ],
)
def test_errors_name_the_argument(change, message):
    weights = [torch.zeros(64, H)] * 3
    given = {"x": torch.zeros(2, 3, H), "norm_weight": torch.ones(H), "eps": EPS, "weights": weights, "biases": None}
    table = torch.zeros(1, 3, 1, 32)
    with pytest.raises(ValueError, match="fp8_norm_qkv: " + message):
        F.fp8_norm_qkv(**{**given, "tables": (table, table), "head_dim": 64, **change})
