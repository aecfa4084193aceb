"""Rotary position embedding, with the norm of heads before it, and its backward pass with the casts. Floor: all in and
out once, at copy bandwidth."""

import torch

from eightfold import reference

from .common import Bench, Case, compiled, relative_error

ops = torch.ops.eightfold


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    shapes = ((4, 2048, 32, 128), (4, 2048, 28, 128), (4, 2048, 4, 128)) if cuda else ((1, 512, 9, 64),)
    for batch, tokens, heads, dim in shapes:
        x = torch.randn(batch, tokens, heads, dim, device=bench.device, dtype=torch.bfloat16)
        angle = torch.rand(1, tokens, 1, dim // 2, device=bench.device) * 100
        cos, sin = angle.cos(), angle.sin()
        bench.add(
            Case(
                "rotary",
                f"{batch}x{tokens}x{heads}x{dim}",
                ours=lambda x=x, cos=cos, sin=sin: ops.rotary(x, cos, sin),
                error=lambda x=x, cos=cos, sin=sin: relative_error(
                    ops.rotary(x, cos, sin), reference.rotary(x, cos, sin)
                ),
                tolerance=1e-6,
                bytes=4 * x.numel() + 8 * cos.numel(),
                peers={"torch.compile": compiled(_plain, x, cos, sin)} if cuda else {},
            )
        )
    layers = ((4, 2048, 32, 32, 128), (4, 2048, 28, 4, 128)) if cuda else ((1, 512, 8, 4, 64),)
    for layer in layers:
        for bias in (False, True):
            _backward(bench, *layer, bias)
    for layer in ((1, 7680, 32, 128), (1, 7680, 8, 128)) if cuda else ((1, 512, 9, 64),):  # q and k of Qwen3-8B
        _norm(bench, *layer)


def _norm(bench: Bench, batch: int, tokens: int, heads: int, dim: int) -> None:
    """In training, both ways."""
    x, dy = (torch.randn(batch, tokens, heads, dim, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(dim, device=bench.device) + 0.5
    angle = torch.rand(1, tokens, 1, dim // 2, device=bench.device) * 100
    tables = angle.cos(), angle.sin()
    forward = x, weight, 1e-6, *tables, True
    saved = ops.rms_norm_rotary(*forward)[1:]
    backward = dy, *saved, weight, *tables

    def forward_apart():
        y, *_ = ops.rms_norm(x.view(-1, dim), weight, 1e-6, True)
        return ops.rotary(y.view(x.shape), *tables)

    def backward_apart():
        rotated_back = ops.rotary(dy, *tables, True).view(-1, dim)
        return ops.rms_norm_backward(rotated_back, *saved, weight, None)[0].view(x.shape)

    for name, inputs, apart in (
        ("rms_norm_rotary", forward, forward_apart),
        ("rms_norm_rotary_backward", backward, backward_apart),
    ):
        ours, exact = getattr(ops, name), getattr(reference, name)
        bench.add(
            Case(
                name,
                f"{batch}x{tokens}x{heads}x{dim}",
                ours=lambda ours=ours, inputs=inputs: ours(*inputs),
                error=lambda ours=ours, exact=exact, inputs=inputs: relative_error(ours(*inputs)[0], exact(*inputs)[0]),
                tolerance=5e-3,
                bytes=x.numel() // dim * (5 * dim + 8) + 8 * angle.numel(),
                peers={"ops apart": apart},
            )
        )


def _backward(bench: Bench, batch: int, tokens: int, heads: int, kv_heads: int, dim: int, bias: bool) -> None:
    """The gradients of queries, keys and values as attention leaves them; with ``bias``, the sums of them too."""
    cuda = bench.device.type == "cuda"
    shapes = [(batch, tokens, h, dim) for h in (heads, kv_heads, kv_heads)]
    grads = [torch.randn(s, device=bench.device, dtype=torch.bfloat16) for s in shapes]
    angle = torch.rand(1, tokens, 1, dim // 2, device=bench.device) * 100
    inputs = (*grads, angle.cos(), angle.sin())
    elements = sum(g.numel() for g in grads)

    def error() -> float:
        ours, exact = (f.rotary_backward_quantize(*inputs, True, bias) for f in (ops, reference))
        return max(relative_error(a.float(), b.float()) for a, b in zip(ours, exact, strict=True) if a.numel())

    def apart(dq, dk, dv, cos, sin):
        parts = [ops.rotary(dq, cos, sin, True), ops.rotary(dk, cos, sin, True), dv]
        parts = [x.flatten(2).flatten(0, 1) for x in parts]
        return ops.quantize_beside(parts), [x.sum(0, dtype=torch.float32) for x in parts] if bias else None

    peers = {"ops apart": lambda: apart(*inputs)}
    if cuda:
        peers["torch.compile"] = compiled(_plain_backward, *inputs, bias)
    bench.add(
        Case(
            "rotary_backward_quantize" + (" and sums" if bias else ""),
            f"{batch}x{tokens}x{heads}+{2 * kv_heads}x{dim}",
            ours=lambda: ops.rotary_backward_quantize(*inputs, True, bias),
            error=error,
            tolerance=1e-5,
            bytes=4 * elements + elements // 16 + 8 * angle.numel(),
            peers=peers,
        )
    )


def _plain_backward(dq, dk, dv, cos, sin, bias):
    """In torch: codes by rows and by columns, scales, sums."""
    parts = [_plain(dq, cos, -sin), _plain(dk, cos, -sin), dv]
    whole = torch.cat([x.flatten(2).flatten(0, 1) for x in parts], 1)
    rows, cols = whole.shape
    out = []
    for x in (whole.view(rows, cols // 128, 128), whole.t().reshape(cols, rows // 128, 128)):
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        out += [(x / scale).to(torch.float8_e4m3fn), scale]
    return *out, whole.sum(0, dtype=torch.float32) if bias else None


def _plain(x, cos, sin):
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
