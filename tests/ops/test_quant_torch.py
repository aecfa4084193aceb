"""The casts as torch operators: messages, opcheck, torch.compile, CUDA graphs, threads, the references as stand-ins."""

import subprocess
import sys

import pytest
import torch

from cast_bytes import E4M3, GROUPS, assert_same, bits
from eightfold.ops import quant

ops = torch.ops.eightfold


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.quantize(x, [1, 64]), r"quantize: group must be \(1, 128\).*got \(1, 64\)"),
        (lambda x: ops.quantize(x.half(), [1, 128]), "quantize: x must be bfloat16 or float32, got float16"),
        (lambda x: ops.quantize(x[0], [1, 128]), r"quantize: x must have 2 dimensions, got shape \[256\]"),
        (lambda x: ops.quantize(x.t(), [1, 128]), r"quantize: x must have stride 1.*strides \[1, 256\]"),
        (lambda x: ops.quantize_both(x[:, ::2]), r"quantize_both: x must have stride 1.*strides \[256, 2\]"),
        (lambda x: ops.transpose_codes(x), "transpose_codes: codes must be float8_e4m3fn, got float32"),
        (lambda x: ops.requantize(x.to(E4M3), x), r"requantize: scales must have shape \[200, 2\], got \[200, 256\]"),
        (
            lambda x: ops.requantize(x.to(E4M3), x[:, :2].contiguous()),
            "requantize: scales must have stride 1 in the first",
        ),
        (lambda x: ops.requantize(x.to(E4M3).t(), x[:2].t()), "requantize: codes must have stride 1"),
        (
            lambda x: ops.dequantize(x.to(E4M3), x, [1, 0], torch.float32),
            r"dequantize: group must be two positive.*\(1, 0\)",
        ),
        (
            lambda x: ops.dequantize(x.to(E4M3), x, [1, 1], torch.float16),
            "dequantize: dtype must be bfloat16 or float32",
        ),
        (
            lambda x: ops.dequantize(x.to(E4M3)[:, ::2], x, [1, 2], torch.float32),
            "dequantize: codes must have stride 1 in",
        ),
        (lambda x: ops.dequantize(x.to(E4M3), x.double(), [1, 1], torch.float32), "dequantize: scales must be float32"),
        (
            lambda x: quant.requantize(quant.quantize(x, (1, 16))),
            r"requantize: q.group must be \(1, 128\), got \(1, 16\)",
        ),
        (
            lambda x: quant.transpose(quant.quantize(x, (1, 128))),
            r"transpose: q.group must be \(128, 128\), got \(1, 128\)",
        ),
    ],
)
def test_errors_name_the_argument(device, call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(torch.randn(200, 256, device=device))


@pytest.mark.gpu
def test_scales_on_another_device():
    codes, scales = ops.quantize(torch.randn(4, 128, device="cuda"), [1, 128])
    with pytest.raises(RuntimeError, match="scales is on cpu but the first argument is on cuda:0"):
        ops.dequantize(codes, scales.cpu(), [1, 128], torch.float32)


# opcheck's test_schema computes with the inputs, which torch cannot do in FP8; inputs_stay_apart checks the same.
CHECKS_OF_FP8 = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def inputs_stay_apart(op, *args):
    """The op leaves its inputs as they were, and its output shares no memory with them."""
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    before = [bits(a).clone() for a in inputs]
    out = op(*args)
    outputs = [out] if isinstance(out, torch.Tensor) else out
    assert all(torch.equal(bits(a), b) for a, b in zip(inputs, before, strict=True))
    addresses = {a.untyped_storage().data_ptr() for a in inputs if a.numel()}
    return not addresses & {o.untyped_storage().data_ptr() for o in outputs if o.numel()}


@pytest.mark.parametrize("shape", [(70, 200), (1, 16), (0, 128)])
def test_opcheck(device, shape):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    for group in GROUPS:
        torch.library.opcheck(ops.quantize.default, (x, list(group)))
    torch.library.opcheck(ops.quantize_both.default, (x,), {"power_of_two": True})
    codes, scales = ops.quantize(x, [1, 128])
    for op, args in (
        (ops.requantize.default, (codes, scales)),
        (ops.transpose_codes.default, (codes,)),
        (ops.dequantize.default, (codes, scales, [1, 128], torch.float32)),
        (ops.dequantize.default, (*ops.quantize(x, [128, 1]), [128, 1], torch.bfloat16)),
    ):
        torch.library.opcheck(op, args, test_utils=CHECKS_OF_FP8)
        assert inputs_stay_apart(op, *args)


def test_compile_with_dynamic_shapes(device):
    def round_trip(x):
        rows, cols = quant.quantize_both(x * 2)
        weight = quant.transpose(quant.quantize(x, (128, 128)))
        again = quant.requantize(rows)
        return (rows.dequantize(), cols.dequantize(), again.dequantize(), weight.t().dequantize()), cols.t()

    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True)
    for shape in ((64, 128), (100, 272), (257, 130)):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        (values, cols), (plain_values, plain_cols) = compiled(x), round_trip(x)
        assert_same(values, tuple(t.cpu() for t in plain_values))
        assert cols.group == (1, 128)
        assert_same((cols.codes, cols.scales), (plain_cols.codes, plain_cols.scales))


@pytest.mark.gpu
def test_cuda_graph():
    x = torch.randn(300, 400, device="cuda", dtype=torch.bfloat16)

    def work():
        rows, cols = quant.quantize_both(x)
        w = quant.quantize(x, (128, 128))
        return rows.dequantize(), cols.dequantize(), quant.requantize(rows).codes.t(), ops.transpose_codes(w.codes)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    x.copy_(torch.randn(300, 400))
    graph.replay()
    assert_same(captured, work())


def test_results_do_not_depend_on_threads():
    x = torch.randn(500, 700)
    threads = torch.get_num_threads()
    many = ops.quantize_both(x)
    try:
        torch.set_num_threads(1)
        assert_same(ops.quantize_both(x), many)
    finally:
        torch.set_num_threads(threads)


FALLBACK = """
import warnings
import torch
from eightfold.ops import _fallback, quant

assert not torch.cuda.is_initialized()
assert _fallback.has_kernels("CPU")
assert torch._C._dispatch_has_kernel_for_dispatch_key("eightfold::quantize", "CUDA")  # kernels, or their stand-ins
assert "quantize" not in _fallback.install("CPU"), "a kernel was replaced without being asked"
x = torch.randn(50, 300)
kernel = quant.quantize(x, (1, 128))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert "quantize" in _fallback.install("CPU", replace=True, reason="a reason")
    assert not caught, [str(w.message) for w in caught]
    first, second = quant.quantize(x, (1, 128)), quant.quantize(x, (1, 128), power_of_two=True)
assert [str(w.message) for w in caught] == ["eightfold: a reason: running the torch composition: right, not fast"]
assert torch.equal(first.codes.view(torch.uint8), kernel.codes.view(torch.uint8))
assert torch.equal(first.scales, kernel.scales)
assert first.codes.stride() == kernel.codes.stride() and first.scales.stride() == kernel.scales.stride()
rows = torch.compile(lambda x: quant.quantize_both(x)[0].dequantize(), fullgraph=True)(x)
assert torch.equal(rows, first.dequantize())
"""


def test_fallback_to_references():
    """In a process of its own, for registrations are global: references replace kernels when told, and warn once."""
    done = subprocess.run([sys.executable, "-c", FALLBACK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
