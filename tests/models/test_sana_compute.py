"""A block of SANA by its fused ops: values and gradients in every precision, which ops it runs, and what stands in for
kernels that do not take its sizes."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eightfold.models import pixel_ops
from eightfold.models import sana_compute as compute_module
from eightfold.models.sana import Sana
from eightfold.models.sana_compute import Pending, SanaCompute, gated_residual
from layer_cases import relative
from plain_sana import TINY
from saved_bytes import saved_storages, table

BATCH, SIZE, TEXT = 2, (6, 7), 5
CONFIG = dataclasses.replace(
    TINY, num_layers=1, num_attention_heads=4, attention_head_dim=32, cross_attention_head_dim=64
)
WIDTH, TOKENS = CONFIG.width, SIZE[0] * SIZE[1]


def block_of(precision, config=CONFIG, device="cpu", dtype=torch.float32):
    """The block of a model of random weights, always the same."""
    torch.manual_seed(3)
    block = Sana(config, precision).transformer_blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return block.to(device, dtype)


def inputs(block, device="cpu"):
    """Stream, pending branch, gate, modulation, keys and values: leaves, of values that bf16 has."""
    torch.manual_seed(4)
    heads = CONFIG.num_cross_attention_heads
    shapes = [(BATCH, TOKENS, WIDTH)] * 2 + [(BATCH, WIDTH), (BATCH, 6, WIDTH)]
    shapes += [(BATCH, heads, TEXT, CONFIG.cross_attention_head_dim)] * 2
    made = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    dtype = block.compute.dtype
    dtypes = [dtype, dtype, torch.float32, torch.float32, dtype, dtype]
    return [x.to(to).requires_grad_() for x, to in zip(made, dtypes, strict=True)]


def run(block, stream, branch, gate, modulation, keys, values, pending=True):
    """The stream behind the block, its last branch, and that branch's gate."""
    bias = torch.zeros(BATCH, 1, 1, TEXT, device=stream.device, dtype=stream.dtype)
    bias[1, ..., 3:] = -10000.0
    waiting = Pending(branch, gate) if pending else None
    stream, after = block(stream, waiting, modulation, (keys, values), bias, SIZE)
    return stream, *after


def gradients(block, given, run=run):
    outs = run(block, *given)
    torch.manual_seed(5)
    dys = [torch.randn(out.shape).to(out) for out in outs]
    of_text = ("attn2.kv.weight", "attn2.kv.bias", "attn2.norm_k.weight")  # keys and values are given
    named = {name: parameter for name, parameter in block.named_parameters() if name not in of_text}
    grads = torch.autograd.grad(outs, [*given, *named.values()], dys)
    names = ["stream", "branch", "gate", "modulation", "keys", "values", *named]
    return dict(zip(names, grads, strict=True))


# Of the norm. A cast to E4M3 is 2.6 % off on random data, and errors of the casts on the way add as squares: both
# operands of six products forward, and of twelve backward. Measured on a CPU: 0.006 and 0.009 in bf16, 0.065 and 0.096.
FORWARD = {"bf16": 0.01, "fp8": 0.08}
BACKWARD = {"bf16": 0.013, "fp8": 0.12}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("precision", FORWARD)
def test_block_is_near_the_block_in_fp32(precision, qk_norm, device):
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    block, exact = (block_of(p, config, device) for p in (precision, "fp32"))
    given, wide = inputs(block, device), inputs(exact, device)
    for out, want in zip(run(block, *given), run(exact, *wide), strict=True):
        assert relative(out, want) < FORWARD[precision]
    for (name, grad), want in zip(gradients(block, given).items(), gradients(exact, wide).values(), strict=True):
        assert relative(grad, want) < BACKWARD[precision], (name, relative(grad, want))


@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_sampling_has_the_bits_of_training(precision, pending, device):
    block = block_of(precision, device=device)
    given = inputs(block, device)
    training = run(block, *given, pending=pending)
    with torch.no_grad():
        sampling = run(block, *given, pending=pending)
    assert all(out.requires_grad for out in training)
    assert all(torch.equal(a, b) for a, b in zip(training, sampling, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_block_compiles(precision, device):
    block = block_of(precision, device=device)
    given = inputs(block, device)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    for out, want in zip(compiled(block, *given), run(block, *given), strict=True):
        assert torch.equal(out, want)
    wanted = gradients(block, given)
    for (name, grad), want in zip(gradients(block, given, compiled).items(), wanted.values(), strict=True):
        assert torch.equal(grad, want), name
    with torch.no_grad():
        for out, want in zip(compiled(block, *given), run(block, *given), strict=True):
            assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_of_16_bits(precision, dtype):
    block, exact = block_of(precision, dtype=dtype), block_of("fp32")
    exact.load_state_dict(block.state_dict())
    for out, want in zip(run(block, *inputs(block)), run(exact, *inputs(exact)), strict=True):
        assert relative(out, want) < FORWARD["bf16"]


# ---- what a block runs ----


class Ran(TorchDispatchMode):
    """Names of the ops that ran, but for views and empty tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        name = function._schema.name.removeprefix("eightfold::")
        if not view and name not in ("aten::empty_like", "aten::_unsafe_view"):
            self.names.append("attention" if "scaled_dot_product" in name else name)
        return function(*args, **(kwargs or {}))


def ran(function):
    with Ran() as mode:
        function()
    return mode.names


NORM = "gated_residual_layer_norm_modulate"


def sampled(precision, qk_norm):
    block = block_of(precision, dataclasses.replace(CONFIG, qk_norm=qk_norm))
    with torch.no_grad(), block.compute.constant_weights():
        given = inputs(block)
        run(block, *given)  # casts the weights
        return ran(lambda: run(block, *given))[1:]  # without the mask of `run`


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_in_fp8_runs_fifteen_ops(qk_norm):
    # aten::clone: rms_norm reads whole rows, q and k are parts of them.
    of_qk, of_q = (["aten::clone", "rms_norm"] * 2, ["rms_norm"]) if qk_norm else ([], [])
    assert sampled("fp8", qk_norm)[1:] == [
        *("aten::add", f"{NORM}_quantize", "fp8_gemm", *of_qk, "linear_attention_quantize", "fp8_gemm"),
        *("aten::addcmul", "quantize", "fp8_gemm", *of_q, "attention", "quantize", "fp8_gemm"),
        *(f"{NORM}_quantize", "fp8_gemm", "depthwise_glu_quantize", "fp8_gemm"),
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_between_two_products_stands_one_op(precision):
    products = ("aten::mm", "aten::addmm", "aten::_to_copy", "aten::add_")  # in bf16 on a CPU they are taken in fp32
    between = [name for name in sampled(precision, False)[1:] if name not in products]
    assert between == [*("aten::add", NORM, "linear_attention", "aten::addcmul", "attention", NORM, "depthwise_glu")]


def test_what_training_in_fp8_runs():
    block = block_of("fp8")
    given = inputs(block)
    forward = ran(lambda: run(block, *given))[2:]
    cast = ["quantize", "fp8_gemm"]  # of the weight
    assert forward == [
        *("aten::add", f"{NORM}_quantize", *cast, "linear_attention", "quantize_both", *cast),
        *("aten::addcmul", "quantize_both", *cast, "attention", "quantize", *cast),
        *(f"{NORM}_quantize", *cast, "depthwise_glu", "quantize_both", *cast),
    ]
    outs = run(block, *given)
    backward = ran(lambda: torch.autograd.grad(outs[:2], given, [torch.ones_like(out) for out in outs[:2]]))
    assert [name for name in backward if "backward" in name and "::" not in name] == [
        "depthwise_glu_backward",
        "layer_norm_modulate_backward",
        "linear_attention_backward",
        "layer_norm_modulate_backward",
    ]
    assert "aten::cat" not in backward  # the gradient of q, k and v is one tensor


KEPT = [("bf16", False, 21.2), ("fp8", False, 18), ("fp8", True, 21.6)]


@pytest.mark.parametrize(("precision", "qk_norm", "most"), KEPT)
def test_what_a_block_keeps(precision, qk_norm, most):
    """In the proportions of SANA 1.6B at a fifth of its width, in U = tokens * width * 2 bytes."""
    sizes = {"num_attention_heads": 14, "num_cross_attention_heads": 4, "cross_attention_head_dim": 112}
    block = block_of(precision, dataclasses.replace(CONFIG, **sizes, qk_norm=qk_norm))
    stream, branch = (torch.randn(BATCH, 256, 448).bfloat16().requires_grad_() for _ in range(2))
    gate, modulation = torch.randn(BATCH, 448, requires_grad=True), torch.randn(BATCH, 6, 448, requires_grad=True)
    text = tuple(torch.randn(BATCH, 4, 20, 112).bfloat16() for _ in range(2))
    parameters = list(block.parameters())
    given = stream, Pending(branch, gate), modulation, text, None, (16, 16)
    saved, out = saved_storages(lambda: block(*given), parameters)
    unit = BATCH * 256 * 448 * 2
    print(table(saved, unit, f"\n{precision}, qk_norm={qk_norm}"))
    assert sum(each.bytes for each in saved) / unit <= most
    torch.autograd.backward([out[0], out[1].branch], [torch.ones_like(stream)] * 2)
    assert stream.grad.isfinite().all()


# ---- where kernels do not take a size ----


@pytest.mark.parametrize("pending", [True, False])
def test_compositions_are_the_kernels(monkeypatch, pending):
    block = block_of("fp32")
    given = inputs(block)
    wanted, grads = run(block, *given, pending=pending), gradients(block, given)
    for name in ("norm_kernel_takes", "attention_kernel_takes", "glu_kernel_takes"):
        monkeypatch.setattr(compute_module, name, lambda x: False)
    monkeypatch.setattr(pixel_ops, "glu_kernel_takes", lambda x: False)
    names = ran(lambda: run(block, *given, pending=pending))
    assert [name for name in names if "::" not in name] == ["attention"]  # of the text, torch's: none of ours
    for out, want in zip(run(block, *given, pending=pending), wanted, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    for (name, grad), want in zip(gradients(block, given).items(), grads.values(), strict=True):
        assert relative(grad, want) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "dim", "ratio"), [(3, 12, 2.5), (4, 32, 1.7)])
def test_sizes_that_no_kernel_takes(heads, dim, ratio):
    sizes = {"num_attention_heads": heads, "attention_head_dim": dim, "mlp_ratio": ratio}
    config = dataclasses.replace(CONFIG, **sizes, cross_attention_head_dim=heads * dim // 2)
    model = Sana(config, "bf16")
    latents, text = torch.randn(BATCH, 4, *SIZE), torch.randn(BATCH, TEXT, config.caption_channels)
    want = model(latents, torch.tensor([500.0, 20.0]), text)
    got = model.cuda()(latents.cuda(), torch.tensor([500.0, 20.0]).cuda(), text.cuda())
    assert relative(got.cpu(), want) < 0.02


# ---- the operations ----


def attend(q, k, v):
    """Linear attention of q, k and v [B, N, heads, dim], with nothing behind it."""
    width = q.shape[2] * q.shape[3]
    nothing = nn.Linear(width, width, bias=False)
    nn.init.eye_(nothing.weight)
    qkv = torch.stack([q, k, v], dim=2).flatten(2)
    out = SanaCompute("fp32").linear_attention_linear(qkv, q.shape[2], (None, None), 1e-15, nothing)
    return out.detach().view(q.shape)


@pytest.mark.parametrize("dim", [8, 32])  # in torch, and by the kernel
def test_linear_attention_is_its_definition(dim):
    q, k, v = torch.randn(3, 2, 9, 4, dim).unbind()
    weights = torch.einsum("bnhd,bmhd->bhnm", q.double().relu(), k.double().relu())
    expected = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v.double())
    torch.testing.assert_close(attend(q, k, v).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_query_without_positive_elements_gives_zero():
    q, k, v = torch.randn(3, 1, 5, 2, 8).unbind()
    q[0, 2, 1] = -1.0
    out = attend(q, k, v)
    assert not out[0, 2, 1].any()
    assert out[0, 2, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_residual(dtype, device):
    x, branch, dy = (torch.randn(2, 9, 16, device=device).to(dtype) for _ in range(3))
    gate = torch.randn(2, 16, device=device)
    leaves = [t.requires_grad_() for t in (x, branch, gate)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out, want = gated_residual(*leaves), wide[0] + wide[2][:, None] * wide[1]
    assert out.dtype == dtype
    rounding = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(out.double(), want, **rounding)
    for grad, expected in zip(
        torch.autograd.grad(out, leaves, dy), torch.autograd.grad(want, wide, dy.double()), strict=True
    ):
        torch.testing.assert_close(grad.double(), expected, **rounding)
