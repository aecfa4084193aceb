"""Linear attention of a packed projection to q, k and v: forward, with the cast of its result, forward and backward.

The floor is bytes: q, k, v read and the result written once, 8 bytes a token and channel; the backward pass 14 more (q,
k, v and the gradient read, theirs written). Shapes are SANA-1.6B's: 1024 px in training, and a guidance pair at 1024
and 4096 px.
"""

import torch
import torch.nn.functional as F

from eightfold import reference

from .common import Bench, Case, Run, compiled, relative_error

ops = torch.ops.eightfold
FORMS = {"torch.compile": torch.bfloat16, "torch.compile, fp32": torch.float32}


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    shapes = ((16, 1024, 70, 32), (2, 1024, 70, 32), (2, 16384, 70, 32)) if cuda else ((1, 256, 8, 32),)
    wider = ((2, 16384, 35, 64), (2, 16384, 20, 128)) if cuda else ()
    for shape in (*shapes, *wider):
        for make in (_forward, _quantize, _both):
            bench.add(make(*_inputs(bench.device, *shape)))


def _inputs(device: torch.device, *shape: int) -> tuple[str, torch.Tensor]:
    batch, tokens, heads, dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=torch.bfloat16)
    return f"{batch}x{tokens} {heads}x{dim}", qkv


def _form(qkv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As diffusers and NVlabs/Sana have it: v with a column of ones, so that one product gives S and z."""
    q, k, v = (x.transpose(1, 2).to(dtype) for x in qkv.unbind(2))
    n = q.relu() @ (k.relu().mT @ F.pad(v, (0, 1), value=1.0))
    return (n[..., :-1] / (n[..., -1:] + 1e-15)).transpose(1, 2).to(qkv.dtype).contiguous()


def _exact(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The reference of the first sample and heads."""
    return reference.linear_attention(*(x[:1, :, :4] for x in qkv.unbind(2)))


def _forward(shape: str, qkv: torch.Tensor) -> Case:
    q, k, v = qkv.unbind(2)
    return Case(
        "linear_attention",
        shape,
        ours=lambda: ops.linear_attention(q, k, v)[0],
        error=lambda: relative_error(ops.linear_attention(q, k, v)[0][:1, :, :4], _exact(qkv)[0]),
        tolerance=3e-3,
        bytes=8 * q.numel(),
        peers={name: compiled(_form, qkv, dtype) for name, dtype in FORMS.items()},
    )


def _quantize(shape: str, qkv: torch.Tensor) -> Case:
    q, k, v = qkv.unbind(2)
    rows = q.shape[0] * q.shape[1]

    def apart() -> tuple[torch.Tensor, ...]:
        return ops.quantize(ops.linear_attention(q, k, v)[0].view(rows, -1), (1, 128))

    def error() -> float:
        codes, scales, *_ = ops.linear_attention_quantize(q, k, v)
        return max(relative_error(a.float(), b.float()) for a, b in zip((codes, scales), apart(), strict=True))

    return Case(
        "linear_attention_quantize",
        shape,
        ours=lambda: ops.linear_attention_quantize(q, k, v),
        error=error,
        tolerance=0.0,
        bytes=(7 + 4 / 128) * q.numel(),
        peers={"ops apart": apart},
    )


def _both(shape: str, qkv: torch.Tensor) -> Case:
    q, k, v = qkv.unbind(2)
    grad = torch.randn_like(q)

    def ours() -> torch.Tensor:
        _, *states = ops.linear_attention(q, k, v)
        return ops.linear_attention_backward(grad, q, k, v, *states)[0]

    def error() -> float:
        states = _exact(qkv)[1:]
        exact, *_ = reference.linear_attention_backward(*(x[:1, :, :4] for x in (grad, q, k, v)), *states)
        return max(relative_error(ours()[:1, :, i, :4], exact[:, :, i]) for i in range(3))

    def peer(dtype: torch.dtype) -> Run:
        leaf = qkv.clone().requires_grad_()
        form = torch.compile(_form, dynamic=False)
        return lambda: torch.autograd.grad(form(leaf, dtype), leaf, grad)

    return Case(
        "linear_attention + backward",
        shape,
        ours=ours,
        error=error,
        tolerance=5e-3,
        bytes=22 * q.numel(),
        peers={name: peer(dtype) for name, dtype in FORMS.items()},
        graph=False,
        queue_cycles=1_000_000,
    )
