"""Every way to call the FP8 product wrong, with its message."""

import pytest
import torch

from eightfold.ops import fp8_gemm
from eightfold.ops.quant import QuantizedTensor
from products import operand

ops = torch.ops.eightfold


def _call(op="fp8_gemm", **changes):
    def run(device):
        a, b = operand(6, 256, (1, 128), device), operand(32, 256, (128, 128), device)
        args = {"a": a.codes, "a_scales": a.scales, "b": b.codes, "b_scales": b.scales, "b_group_rows": 128}
        if op == "fp8_gemm":
            args |= {"bias": None, "out_dtype": torch.float32}
        else:
            args = {"out": torch.zeros(6, 32, device=device), **args}
        args |= {name: change(args[name]) if callable(change) else change for name, change in changes.items()}
        getattr(ops, op)(*args.values())

    return run


def _view(t, dtype):
    return t.view(torch.uint8).view(dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_call(a=lambda t: t[0]), r"fp8_gemm: a must have 2 dimensions, got shape \[256\]"),
        (_call(a=lambda t: t.float()), "fp8_gemm: a must be float8_e4m3fn, got float32"),
        (_call(b=lambda t: _view(t, torch.float8_e5m2)), "fp8_gemm: b must be float8_e4m3fn, got float8_e5m2"),
        (_call(a=lambda t: t.view(torch.uint8).t().contiguous().t().view(t.dtype)), "a must have stride 1 in its last"),
        (
            _call(a=lambda t: t[:, :248].contiguous()),
            r"a must have rows at a multiple of 16 bytes .* strides \[248, 1\]",
        ),
        (_call(a=lambda t: t[:, 8:136], a_scales=lambda t: t[:, :1]), "a must start at a multiple of 16 bytes"),
        (
            _call(a=lambda t: t[:, :128]),
            r"a and b must have the same second dimension, got shapes \[6, 128\] and \[32, 256\]",
        ),
        (_call(b=lambda t: t[:24]), r"b must have a multiple of 16 rows .* got shape \[24, 256\]"),
        (_call(b_group_rows=64), "b_group_rows must be 1 or 128, got 64"),
        (_call(a_scales=lambda t: t[:, :1]), r"a_scales must have shape \[6, 2\], got \[6, 1\]"),
        (_call(a_scales=lambda t: t.double()), "a_scales must be float32, got float64"),
        (_call(a_scales=lambda t: t.contiguous()), r"a_scales must have stride 1 along its rows .* strides \[2, 1\]"),
        (_call(b_scales=lambda t: t.t()), r"b_scales must have shape \[1, 2\], got \[2, 1\]"),
        (_call(b_group_rows=1), r"b_scales must have shape \[32, 2\], got \[1, 2\]"),
        (_call(out_dtype=torch.float16), "out_dtype must be bfloat16 or float32, got float16"),
        (_call(bias=torch.zeros(32, dtype=torch.float16)), "bias must be float32 or bfloat16, got float16"),
        (_call(bias=torch.zeros(31)), r"bias must have shape \[32\], got \[31\]"),
        (_call(bias=torch.zeros(64)[::2]), "bias must be contiguous"),
        (_call("fp8_gemm_accumulate_", out=lambda t: t.half()), "accumulate_: out must be .*float32.*, got float16"),
        (
            _call("fp8_gemm_accumulate_", out=lambda t: t.bfloat16()),
            "accumulate_: out must be float32 with b_group_rows 128, got bfloat16",
        ),
        (_call("fp8_gemm_accumulate_", out=lambda t: t[:, :16]), r"out must have shape \[6, 32\], got \[6, 16\]"),
        (_call("fp8_gemm_accumulate_", out=lambda t: t.t().contiguous().t()), "out must be contiguous"),
    ],
)
def test_errors_name_the_argument(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(device)


def test_groups_are_checked(device):
    rows, weight = operand(16, 256, (1, 128), device), operand(16, 256, (128, 128), device)
    with pytest.raises(ValueError, match=r"fp8_gemm: a.group must be \(1, 128\), got \(128, 128\)"):
        fp8_gemm(weight, weight)
    with pytest.raises(ValueError, match=r"fp8_gemm: b.group must be \(128, 128\) or \(1, 128\), got \(128, 1\)"):
        fp8_gemm(rows, QuantizedTensor(rows.codes, rows.scales, (128, 1)))


@pytest.mark.gpu
def test_operands_on_two_devices():
    a, b = operand(6, 256, (1, 128), "cuda"), operand(32, 256, (128, 128), "cpu")
    with pytest.raises(RuntimeError, match="b is on cpu but the first argument is on cuda:0"):
        fp8_gemm(a, b)
