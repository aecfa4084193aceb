"""torch.compile(fullgraph=True) of the layers, forward and backward."""

import pytest
import torch
from torch import nn

from eightfold.nn import FP8Linear, FP8RMSNorm, FP8SwiGLU, cache_weights, functional


class Model(nn.Module):
    """Every function once."""

    def __init__(self, device):
        super().__init__()
        self.norm, self.norm2 = FP8RMSNorm(64, device=device), FP8RMSNorm(64, device=device)
        self.a, self.b = FP8Linear(64, 64, device=device), FP8Linear(64, 32, False, device=device)
        self.mlp = FP8SwiGLU(64, 96, device=device)
        self.o = FP8Linear(64, 64, device=device, save="input")
        self.table = nn.Parameter(torch.randn(3, 64, device=device))

    def forward(self, x):
        total, (a, b) = functional.fp8_norm_linears(
            self.norm(x), self.norm2.weight, 1e-6, [self.a.weight, self.b.weight], [self.a.bias, None], residual=x
        )
        gate, *vectors = self.table.expand(len(x), 3, 64).unbind(1)
        _, a = functional.fp8_modulate_linear(a, *vectors, 1e-6, self.a.weight, self.a.bias, x, gate)
        a = self.o(self.mlp(a))
        total, a = functional.fp8_norm_swiglu_mlp(a, self.norm2.weight, 1e-6, *self.mlp.parameters(), residual=total)
        return total, a, b


def run(model, function, x):
    x = x.clone().requires_grad_()
    outs = function(x)
    loss = sum((o.float() * torch.linspace(-1, 1, o.shape[-1], device=x.device)).sum() for o in outs)
    return *outs, *torch.autograd.grad(loss, (x, *model.parameters()))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cached", [False, True])
def test_fullgraph_is_eager(device, backend, cached):
    model = cache_weights(Model(device), cached)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    x = torch.randn(2, 9, 64, device=device, dtype=torch.bfloat16)
    for ours, want in zip(run(model, compiled, x), run(model, model, x), strict=True):
        if backend == "aot_eager":
            assert torch.equal(ours, want)
        else:  # inductor keeps bfloat16 sums in float32
            assert (ours - want).float().norm() <= 0.01 * want.float().norm()
    with torch.no_grad():
        for ours, want in zip(compiled(x), model(x), strict=True):
            assert torch.equal(ours, want)


def test_columns_made_in_the_backward_pass(device):
    """save="input": the compiler must not make them in the forward pass and keep them."""
    x, norm = torch.randn(20, 64, device=device, requires_grad=True), torch.ones(64, device=device, requires_grad=True)
    weights = [torch.randn(n, 64, device=device, requires_grad=True) for n in (128, 48)]

    def layer(x):
        return functional.fp8_norm_linears(x, norm, 1e-5, weights, save="input")[1]

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition", dynamic=False)(x)
    saved = [t for t in compiled[0].grad_fn.saved_tensors if t.dtype == torch.float8_e4m3fn]
    assert [t.shape for t in saved] == [x.shape]
    dys = [torch.randn_like(y) for y in compiled]
    inputs = (x, norm, *weights)
    wanted = torch.autograd.grad(layer(x), inputs, dys)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled, inputs, dys), wanted, strict=True))


def test_new_token_counts_do_not_recompile(device):
    """One compilation for all counts of a kind: strides are padded to 16 tokens, and 128 tokens share a column scale,
    so that counts up to 128, multiples of 4 and multiples of 16 are compiled apart."""
    model = Model(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    run(model, compiled, torch.randn(2, 71, 64, device=device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((2, 75), (3, 131)):
            x = torch.randn(*shape, 64, device=device)
            for ours, want in zip(run(model, compiled, x), run(model, model, x), strict=True):
                assert torch.equal(ours, want)


def test_cached_weights_compile_after_eager_calls(device):
    model = cache_weights(Model(device))
    x = torch.randn(2, 9, 64, device=device)
    want = model(x)
    with torch.no_grad():
        model.o.weight.neg_()
    torch._dynamo.reset()
    changed = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(changed[1], model(x)[1])
    assert not torch.equal(changed[1], want[1])


@pytest.mark.gpu
def test_cuda_graph():
    device = torch.device("cuda")
    model = Model(device)
    x = torch.randn(2, 9, 64, device=device, dtype=torch.bfloat16)
    new = torch.randn_like(x)
    with torch.no_grad():
        want = model(new)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(x)
    x.copy_(new)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


def test_bf16_linear(device, monkeypatch):
    monkeypatch.setattr(functional, "_CPU_HAS_BF16", False)
    weight = torch.randn(32, 64, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(functional.bf16_linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 64, device=device, dtype=torch.bfloat16)
    grads = [
        torch.autograd.grad(f(x, weight).float().square().sum(), weight)[0] for f in (compiled, functional.bf16_linear)
    ]
    assert torch.equal(*grads)
