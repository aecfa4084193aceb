"""Lists for adamw_dre_ with states that have seen a step, and the comparisons its tests share."""

import math

import torch

from eightfold.ops import optim as ops
from eightfold.reference import optim as reference

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1), (1, 127), (3, 128), (5, 129), (7, 300), (2, 64), (64, 3), (4, 8, 100), (1, 4096), (33, 576)]
KINDS = {
    "fp32": {},
    "fp32, bf16 gradients": {"grad": torch.bfloat16},
    "bf16": {"param": torch.bfloat16, "grad": torch.bfloat16},
    "bf16, fp32 gradients": {"param": torch.bfloat16},
    "bf16 with master": {"param": torch.bfloat16, "grad": torch.bfloat16, "master": True},
    "fp32 with master": {"master": True},
}
# opcheck's test_schema multiplies its arguments, which torch cannot do with E4M3.
WITH_CODES = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def bits(codes):
    return codes.view(torch.uint8).int()


def log_normal(shape, sigma, device, zeros=0.0):
    x = torch.randn(shape) * torch.exp(sigma * torch.randn(shape))
    return torch.where(torch.rand(shape) < zeros, 0.0, x).to(device)


def stored(x, row_length=None):
    row_length = row_length or x.shape[-1]
    return ops.dre_dequantize(*ops.dre_quantize(x, row_length), row_length)


class Problem:
    """Lists for adamw_dre_: tensors of `shapes`, with states that have seen one step of random gradients."""

    def __init__(
        self, device, shapes=SHAPES, param=torch.float32, grad=torch.float32, master=False, misaligned=False, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)

        def place(t):
            if misaligned:
                backing = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
                return backing[1:].view(t.shape).copy_(t)
            return t.to(device)

        def random(shape, scale):
            return scale * torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))

        values = [random(s, 0.1) for s in shapes]
        self.params = [place(v.to(param)) for v in values]
        self.grads = [place(random(s, 1e-3).to(grad)) for s in shapes]
        self.masters = [place(v) if master else torch.empty(0, device=device) for v in values]
        self.row_lengths = [max(math.prod(s[1:]), 1) for s in shapes]
        first = [random(s, 1e-4) for s in shapes]
        quantized = zip(first, self.row_lengths, strict=True)
        m = [reference.dre_quantize(x, n) if x.numel() else self.empty_state(x, n) for x, n in quantized]
        quantized = zip(first, self.row_lengths, strict=True)
        v = [reference.dre_quantize(x * x, n) if x.numel() else self.empty_state(x, n) for x, n in quantized]
        self.states = [
            [place(s[part].view(torch.uint8) if part == 0 else s[part]) for s in moment]
            for moment in (m, v)
            for part in range(3)
        ]
        for part in (0, 3):
            self.states[part] = [t.view(E4M3) for t in self.states[part]]
        self.offsets = [4096 * i for i in range(len(shapes))]
        self.steps = [torch.tensor(2.0, device=device) for _ in shapes]
        self.lr = torch.tensor(1e-2, device=device)
        self.scale = torch.tensor(0.7, device=device)

    @staticmethod
    def empty_state(x, length):
        groups = -(-length // 128)
        return torch.empty(x.shape, dtype=E4M3), torch.empty(0, groups), torch.empty(0, groups, dtype=torch.uint8)

    def lists(self):
        return [
            self.params,
            self.grads,
            self.masters,
            *self.states,
            self.row_lengths,
            self.offsets,
            self.steps,
            self.lr,
        ]

    def step(self, op=ops.adamw_dre_, scale=True, **options):
        options = {
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "stochastic_states": False,
            "seed": 5,
        } | options
        op(*self.lists(), self.scale if scale else None, **options)
        return self

    def outputs(self):
        tensors = [*self.params, *self.masters, *(t for part in self.states for t in part)]
        return [t.view(torch.uint8).cpu() if t.dtype == E4M3 else t.cpu() for t in tensors]


def assert_same(a, b):
    for x, y in zip(a.outputs(), b.outputs(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def compare(actual, expected, share=1e-2):
    """Parameters to float32 rounding, maxima likewise, codes equal but for neighbours at boundaries."""
    for a, e in zip(actual.params + actual.masters, expected.params + expected.masters, strict=True):
        if a.dtype == torch.bfloat16:
            # Equal bits except where float32 rounding moves a value over its threshold: then one bf16 step, or, of a
            # parameter whose step all but cancels it, the rounding of that step (1e-2).
            a, e = a.cpu(), e.cpu()
            assert ((a != e).float().mean() if a.numel() else 0) <= 0.005 + 1.5 / max(a.numel(), 1)
            torch.testing.assert_close(a, e, rtol=2**-7, atol=1e-7)
        else:
            torch.testing.assert_close(a.cpu(), e.cpu(), rtol=1e-5, atol=1e-6)  # a step is 1e-2
    for part in range(6):
        a, e = (
            torch.cat([t.view(torch.uint8).flatten() if t.dtype == E4M3 else t.flatten() for t in p.states[part]]).cpu()
            for p in (actual, expected)
        )
        if part in (0, 3):
            difference = (a.int() - e.int()).abs()
            assert (difference > 0).float().mean() <= share
        elif part in (1, 4):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=0)
        else:
            assert (a != e).float().mean() <= share
