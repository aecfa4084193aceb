"""Lists for came8bit_, a plain float64 CAME written from the formulas, and the comparisons its tests share."""

import math

import torch

from eightfold.ops import optim as ops
from eightfold.reference import optim as reference

# Matrices: one element, one row, one column, rows that blocks of 2,048 and packs of 8 do not divide, several tiles.
MATRICES = [(1, 1), (1, 300), (300, 1), (40, 52), (7, 2048), (33, 640), (130, 257), (264, 520), (600, 96), (16, 2240)]
VECTORS = [(1,), (300,), (20, 1, 3, 3), (4100,)]
KINDS = {
    "fp32": {},
    "fp32, bf16 gradients": {"grad": torch.bfloat16},
    "bf16": {"param": torch.bfloat16, "grad": torch.bfloat16},
    "bf16, fp32 gradients": {"param": torch.bfloat16},
}
OPTIONS = {
    "beta1": 0.9,
    "beta2": 0.999,
    "beta3": 0.9999,
    "eps1": 1e-30,
    "eps2": 1e-16,
    "clip_threshold": 1.0,
    "weight_decay": 0.1,
    "seed": 5,
}
STATES = ("m", "m_scales", "v_rows", "v_cols", "u_rows", "u_cols")


class Problem:
    """Tensors with zero states; every step draws new gradients, whose scale differs by row and column."""

    def __init__(
        self,
        device,
        matrices=MATRICES,
        vectors=VECTORS,
        param=torch.float32,
        grad=torch.float32,
        quantized=True,
        misaligned=False,
    ):
        self.device, self.grad_dtype, self.misaligned = device, grad, misaligned
        self.generator = torch.Generator().manual_seed(0)
        self.shapes, self.matrices = [*matrices, *vectors], len(matrices)
        self.params = [self.place(0.1 * self.normal(s), param) for s in self.shapes]
        self.m, self.m_scales, self.v_rows, self.v_cols, self.u_rows, self.u_cols = ([] for _ in STATES)
        for i, shape in enumerate(self.shapes):
            numel, matrix = math.prod(shape), i < self.matrices
            rows, cols = (shape[0], numel // max(shape[0], 1)) if matrix else (0, 0)
            in_bytes = quantized and matrix
            self.m.append(self.place(torch.zeros(shape), torch.uint8 if in_bytes else torch.float32))
            self.m_scales.append(torch.zeros(-(-numel // 2048) if in_bytes else 0, 2, device=device))
            self.v_rows.append(torch.zeros(rows if matrix else shape, device=device))
            self.v_cols.append(torch.zeros(cols, device=device))
            self.u_rows.append(torch.zeros(rows, device=device))
            self.u_cols.append(torch.zeros(cols, device=device))
        self.offsets = [8 * 4096 * i for i in range(len(self.shapes))]
        self.steps = [torch.tensor(0.0, device=device) for _ in self.shapes]
        self.lr = torch.tensor(1e-2, device=device)
        self.scale = torch.tensor(0.7, device=device)
        self.draw()

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator)

    def place(self, t, dtype):
        backing = torch.empty(t.numel() + self.misaligned, dtype=dtype, device=self.device)
        return backing[int(self.misaligned) :].view(t.shape).copy_(t)

    def draw(self):
        self.grads = []
        for shape in self.shapes:
            scales = [torch.exp(torch.linspace(-1, 1, n)).view(-1, *[1] * i) for i, n in enumerate(reversed(shape))]
            g = 1e-3 * self.normal(shape)
            for scale in scales:
                g = g * scale
            self.grads.append(self.place(g, self.grad_dtype))

    def lists(self):
        return [self.params, self.grads, *(getattr(self, name) for name in STATES), self.offsets, self.steps, self.lr]

    def step(self, op=ops.came8bit_, count=1, scale=True, **options):
        for i in range(count):
            if i:
                self.draw()
            for step in self.steps:
                step += 1
            op(*self.lists(), self.scale if scale else None, **OPTIONS | options)
        return self

    def moments(self):
        """First moments as values, float32 on the CPU."""
        return [
            (reference.affine_dequantize(m, s) if m.dtype == torch.uint8 else m).cpu()
            for m, s in zip(self.m, self.m_scales, strict=True)
        ]

    def outputs(self):
        return [t.cpu() for t in (*self.params, *(t for name in STATES for t in getattr(self, name)))]


class Plain:
    """CAME in float64 as the paper writes it, of one matrix or of anything else; m is not rounded."""

    def __init__(self, param, matrix, lr, weight_decay=0.1, betas=(0.9, 0.999, 0.9999), clip=1.0):
        self.param, self.matrix, self.lr, self.decay, self.betas, self.clip = (
            param.double().cpu().clone(),
            matrix,
            lr,
            weight_decay,
            betas,
            clip,
        )
        self.m, self.v, self.r, self.c, self.big_r, self.big_c = (0.0 for _ in range(6))

    def step(self, g):
        b1, b2, b3 = self.betas
        g = g.double().cpu()
        if self.matrix:
            self.r = b2 * self.r + (1 - b2) * (g**2 + 1e-30).mean(1)
            self.c = b2 * self.c + (1 - b2) * (g**2 + 1e-30).mean(0)
            w = g / torch.outer(self.r, self.c).sqrt() * self.r.mean().sqrt()
        else:
            self.v = b2 * self.v + (1 - b2) * (g**2 + 1e-30)
            w = g / self.v.sqrt()
        w = w / max(1.0, (w**2).mean().sqrt().item() / self.clip)
        self.m = b1 * self.m + (1 - b1) * w
        step = self.m
        if self.matrix:
            q = (w - self.m) ** 2 + 1e-16
            self.big_r = b3 * self.big_r + (1 - b3) * q.mean(1)
            self.big_c = b3 * self.big_c + (1 - b3) * q.mean(0)
            step = self.m / torch.outer(self.big_r, self.big_c).sqrt() * self.big_r.mean().sqrt()
        self.param = self.param * (1 - self.lr * self.decay) - self.lr * step


def assert_same(a, b):
    for x, y in zip(a.outputs(), b.outputs(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def relative(actual, expected):
    """Norm of the difference over that of ``expected``."""
    a, e = actual.double().cpu(), expected.double().cpu()
    return ((a - e).norm() / e.norm().clamp(min=1e-300)).item()
