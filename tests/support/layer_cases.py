"""Every function of nn.functional beside its exact form, with the tolerances of one FP8 pass."""

import torch

from eightfold.nn import functional as F

H, I, EPS = 256, 352, 1e-5  # I is not a multiple of 128
DTYPES = [torch.bfloat16, torch.float32]


def make(device, *shapes, dtype=torch.float32, scale=None):
    tensors = [torch.randn(*s, device=device) * (scale or (s[-1] ** -0.5 if len(s) == 2 else 1.0)) for s in shapes]
    return [t.to(dtype).requires_grad_() for t in tensors]


def relative(ours, exact):
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())


def exact_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def exact_mlp(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


# name -> (parameter shapes, the FP8 function, the exact function, (tolerance of outputs, of gradients))
# Tolerances: a cast to E4M3 is 2.6 % off on random data, and errors of the casts on the way add as squares.
CASES = {
    "linear": (
        [(384, H), (384,)],
        lambda x, r, w, b: [F.fp8_linear(x, w, b)],
        lambda x, r, w, b: [x @ w.t() + b],
        (0.045, 0.045),
    ),
    "rms_norm": (
        [(H,)],
        lambda x, r, w: [F.fp8_rms_norm(x, w, EPS)],
        lambda x, r, w: [exact_norm(x, w)],
        (0.005, 0.045),
    ),
    "norm_linears": (
        [(H,), (384, H), (128, H), (384,)],
        lambda x, r, n, w, v, b: F.fp8_norm_linears(x, n, EPS, [w, v], [b, None])[1],
        lambda x, r, n, w, v, b: [exact_norm(x, n) @ w.t() + b, exact_norm(x, n) @ v.t()],
        (0.045, 0.06),
    ),
    "add_norm_linears": (
        [(H,), (384, H), (128, H), (128,)],
        lambda x, r, n, w, v, b: (lambda s, out: [s, *out])(
            *F.fp8_norm_linears(x, n, EPS, [w, v], [None, b], residual=r)
        ),
        lambda x, r, n, w, v, b: [x + r, exact_norm(x + r, n) @ w.t(), exact_norm(x + r, n) @ v.t() + b],
        (0.045, 0.06),
    ),
    "swiglu_mlp": (
        [(I, H), (I, H), (H, I)],
        lambda x, r, g, u, d: [F.fp8_swiglu_mlp(x, g, u, d)],
        lambda x, r, g, u, d: [exact_mlp(x, g, u, d)],
        (0.065, 0.08),
    ),
    "norm_swiglu_mlp": (
        [(H,), (I, H), (I, H), (H, I)],
        lambda x, r, n, g, u, d: [F.fp8_norm_swiglu_mlp(x, n, EPS, g, u, d)[1]],
        lambda x, r, n, g, u, d: [exact_mlp(exact_norm(x, n), g, u, d)],
        (0.065, 0.085),
    ),
    "add_norm_swiglu_mlp": (
        [(H,), (I, H), (I, H), (H, I)],
        lambda x, r, n, g, u, d: list(F.fp8_norm_swiglu_mlp(x, n, EPS, g, u, d, residual=r)),
        lambda x, r, n, g, u, d: [x + r, exact_mlp(exact_norm(x + r, n), g, u, d)],
        (0.065, 0.085),
    ),
}


def setup_case(name, device, dtype, shape=(3, 50), weight_dtype=torch.float32):
    shapes, ours, exact, tolerance = CASES[name]
    x, residual = make(device, (*shape, H), (*shape, H), dtype=dtype, scale=1.0)
    parameters = make(device, *shapes, dtype=weight_dtype)
    return [x, residual, *parameters], ours, exact, tolerance


def gradients(function, inputs, dys):
    used = [t for t in inputs if t.requires_grad]
    return torch.autograd.grad(function(*inputs), used, dys, allow_unused=True)
