"""The casts: bytes of the kernels against bytes of the reference, on every kind of value, shape and layout."""

import math
import subprocess
import sys

import pytest
import torch

from eightfold.ops import _library, layouts, quant  # noqa: F401
from eightfold.reference import quant as reference

ops = torch.ops.eightfold
GROUPS = [(1, 128), (128, 128), (128, 1), (1, 16)]
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float8_e4m3fn: torch.uint8}
E4M3 = torch.float8_e4m3fn


def bits(t):
    return t.contiguous().view(BITS[t.dtype])


def assert_same(actual, expected):
    """Same dtype, shape, strides and bytes; NaNs count by their bytes."""
    if isinstance(actual, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
        return
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
    different = bits(actual.cpu()) != bits(expected.cpu())
    assert not different.any(), (
        f"{int(different.sum())} of {different.numel()} differ, first at {different.nonzero()[0].tolist()}"
    )


def bit_patterns(rows, cols, dtype, specials=2e-5):
    """Random bit patterns of either sign, denormals included; a few elements are NaN or Inf of any payload.

    Exponents fall up to 24 below a level that each 64x64 block has of its own, so that codes cover their whole range.
    """
    mantissa = {torch.bfloat16: 7, torch.float32: 23}[dtype]
    level = torch.randint(0, 255, (layouts.ceil_div(rows, 64), layouts.ceil_div(cols, 64)))
    level = level.repeat_interleave(64, 0)[:rows].repeat_interleave(64, 1)[:, :cols]
    exponent = (level - torch.randint(0, 25, (rows, cols))).clamp(min=0)
    exponent = torch.where(torch.rand(rows, cols) < specials, 255, exponent)
    sign = torch.randint(0, 2, (rows, cols)) << (mantissa + 8)
    fraction = torch.randint(0, 1 << mantissa, (rows, cols))
    fraction = torch.where((exponent == 255) & (fraction % 2 == 0), 0, fraction)  # half of them Inf
    pattern = sign | exponent << mantissa | fraction
    width = mantissa + 9
    signed = torch.where(pattern >= 1 << (width - 1), pattern - (1 << width), pattern)
    return signed.to(BITS[dtype]).view(dtype)


def check_all(x, device, power_of_two=False, groups=GROUPS):
    """Every op that quantises, on ``x`` given on the CPU."""
    on_device = x.to(device)
    for group in groups:
        expected = reference.quantize(x, list(group), power_of_two)
        assert_same(ops.quantize(on_device, list(group), power_of_two), expected)
    rows, cols = (reference.quantize(x, list(g), power_of_two) for g in ((1, 128), (128, 1)))
    assert_same(ops.quantize_both(on_device, power_of_two), (*rows, *cols))
    again = ops.requantize(*ops.quantize(on_device, [1, 128], power_of_two), power_of_two)
    assert_same(again, reference.requantize(*rows, power_of_two))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_on_bit_patterns(device, dtype):
    for rows, cols in ((1000, 2304), (1111, 1999)):
        x = bit_patterns(rows, cols, dtype)
        assert x.isnan().any()
        assert x.isinf().any()
        check_all(x, device)


def test_bytes_on_every_bf16_pattern(device):
    """All 65536 patterns, each in a row group with a finite neighbour of its size, NaN groups among them."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).view(-1, 16)
    check_all(torch.cat([every, every.flip(0)], 1).repeat(1, 5), device)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_cuda_and_cpu_on_many_patterns(dtype):
    for _ in range(6):  # 10^8 elements
        x = bit_patterns(4096, 4224, dtype, specials=1e-6)
        on_device = x.cuda()
        for group in GROUPS:
            assert_same(ops.quantize(on_device, list(group)), ops.quantize(x, list(group)))
        assert_same(ops.quantize_both(on_device), ops.quantize_both(x))
        assert_same(ops.quantize(x, [1, 128]), reference.quantize(x, [1, 128]))


def test_bytes_next_to_rounding_boundaries(device):
    """Quotients within an ulp of the middle between two codes, for many scales: an inexact division fails here."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (values[1:] + values[:-1]) / 2
    amax = torch.empty(4096, 1).uniform_(1, 2) * torch.randint(-30, 30, (4096, 1)).double().exp2().float()
    scale = amax / 448
    columns = [(middles * scale).view(torch.int32) + step for step in (-2, -1, 0, 1, 2)]
    for column in columns:
        x = torch.cat([column.view(torch.float32).clamp(max=amax), amax, -amax], 1)
        assert x.shape[1] == 128
        assert_same(ops.quantize(x.to(device), [1, 128]), reference.quantize(x, [1, 128]))
        assert_same(
            ops.quantize(x.t().contiguous().to(device), [128, 1]), reference.quantize(x.t().contiguous(), [128, 1])
        )


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 128), (3, 16), (7, 130), (128, 128), (129, 257), (300, 24), (513, 72), (2, 4100)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ragged_shapes(device, shape, dtype):
    x = torch.randn(shape).to(dtype)
    for power_of_two in (False, True):
        check_all(x, device, power_of_two)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 128)])
def test_empty(device, shape):
    check_all(torch.empty(shape, dtype=torch.bfloat16), device)
    codes = torch.empty(shape, dtype=E4M3, device=device)
    assert ops.transpose_codes(codes).shape == shape[::-1]


@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_one_value(device, group):
    """A constant group decodes to itself; zeros keep their sign; a group below the floor stays small."""
    x = torch.full((256, 256), -3.7, device=device)
    q = quant.quantize(x, group)
    assert (bits(q.codes) == 0xFE).all()  # -448
    torch.testing.assert_close(q.dequantize(torch.float32), x, rtol=2e-7, atol=0)

    zeros = torch.zeros(256, 256, device=device)
    zeros[:, ::2] = -0.0
    q = quant.quantize(zeros, group)
    assert torch.equal(q.scales, torch.full_like(q.scales, 1e-10) / 448)
    assert torch.equal(bits(q.codes), bits(zeros).lt(0).to(torch.uint8) * 0x80)

    tiny = torch.full((256, 256), 1e-12, device=device)  # below the floor: scaled by the floor, not to 448
    q = quant.quantize(tiny, group)
    assert q.codes.float().amax() < 5
    assert q.dequantize(torch.float32).sub(tiny).abs().amax() < 1e-13


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf])
def test_non_finite_groups_are_never_silently_finite(device, group, special):
    x = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    x[130, 5] = special
    codes, scales = ops.quantize(x, list(group))
    hit = torch.zeros(256, 256, dtype=torch.bool, device=device)
    row, col = 130 // group[0] * group[0], 5 // group[1] * group[1]
    hit[row : row + group[0], col : col + group[1]] = True
    assert torch.equal(bits(codes), torch.where(hit, 0x7F, 0x7E).to(torch.uint8))
    assert torch.equal(bits(scales) == 0x7FC00000, scales.isnan())
    assert scales.isnan().sum() == 1


def test_power_of_two_scales_are_exact(device):
    x = torch.randn(200, 300, device=device)
    codes, scales = ops.quantize(x, [1, 128], True)
    assert torch.equal(scales, scales.log2().ceil().exp2())
    plain = ops.quantize(x, [1, 128])[1]
    assert (scales >= plain).all()
    assert (scales < 2 * plain).all()
    assert codes.float().abs().amax() <= 448


@pytest.mark.parametrize("group", [(1, 128), (128, 1)])
def test_rounding_is_unbiased(device, group):
    """Uniform values round down as often as up, within five standard deviations: rounding to nearest has no bias."""
    x = torch.rand(2048, 1024, device=device) * 2 - 1
    x[::128] = 1
    x[:, ::128] = 1  # one scale for all groups, so that codes cut the range at fixed points
    error = quant.quantize(x, group).dequantize(torch.float32).double() - x.double()
    for signed in (error, error * x.sign()):
        rounded = signed[error != 0]
        down = (rounded < 0).double().mean().item()
        assert abs(down - 0.5) < 5 * 0.5 / math.sqrt(rounded.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("start", "width", "total"), [(0, 256, 400), (8, 256, 272), (3, 250, 301), (1, 128, 512)])
def test_views_of_wider_tensors(device, dtype, start, width, total):
    """Any row stride, aligned or not, gives the bytes of the contiguous copy, whatever surrounds the view."""
    wide = torch.full((150, total), math.nan, dtype=dtype)
    wide[:, start : start + width] = torch.randn(150, width)
    view = wide.to(device)[:, start : start + width]
    for group in GROUPS:
        assert_same(ops.quantize(view, list(group)), reference.quantize(view.cpu(), list(group)))
    assert_same(ops.quantize_both(view), reference.quantize_both(view.cpu()))


@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (128, 256), (130, 270), (320, 144)])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantize(device, shape, group, dtype):
    x = torch.randn(shape)
    expected = reference.dequantize(*reference.quantize(x, list(group)), list(group), dtype)
    q = quant.quantize(x.to(device), group)
    assert_same(q.dequantize(dtype), expected)
    assert_same(q.t().dequantize(dtype), expected.t().clone(memory_format=torch.contiguous_format))
    step = 0.07 if dtype == torch.bfloat16 else 0.0625  # half of the gap between codes, relative
    bound = (x.abs() * step).clamp(min=2**-10 * reference.quantize(x, list(group))[1].amax())
    assert ((q.dequantize(dtype).cpu().float() - x).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(1, 7), (16, 128), (128, 384), (130, 45), (272, 260)])
def test_transpose_codes(device, shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8).view(E4M3)
    assert_same(ops.transpose_codes(codes.to(device)), reference.transpose_codes(codes))
    wide = torch.randint(0, 256, (shape[0], shape[1] + 9), dtype=torch.uint8).view(E4M3)
    view = wide.to(device)[:, 3 : 3 + shape[1]]
    assert_same(ops.transpose_codes(view), reference.transpose_codes(wide[:, 3 : 3 + shape[1]]))


def test_transpose_of_squares_is_the_cast_of_the_transpose(device):
    w = torch.randn(272, 400, device=device)
    turned, again = quant.transpose(quant.quantize(w, (128, 128))), quant.quantize(w.t().contiguous(), (128, 128))
    assert_same((turned.codes, turned.scales), (again.codes.cpu(), again.scales.cpu()))


def test_column_codes_are_a_matrix_operand(device):
    """.t() of column codes has the layout that fp8_gemm takes: contraction contiguous, padded to 16 bytes."""
    q = quant.quantize(torch.randn(100, 60, device=device), (128, 1)).t()
    assert q.shape == (60, 100)
    assert q.group == (1, 128)
    assert q.codes.stride() == (112, 1)
    assert q.codes.data_ptr() % 16 == 0
    assert q.scales.stride() == (1, 60)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """Rows so far apart that the last starts beyond 2^31 elements, and codes and outputs beyond 2^31 bytes."""
    stride = (1 << 31) // 99 // 8 * 8
    storage = torch.empty(stride * 100 + 512, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((101, 512), (stride, 1))
    x.copy_(torch.randn(101, 512))
    for group in GROUPS:
        assert_same(ops.quantize(x, list(group)), reference.quantize(x.cpu(), list(group)))
    del storage, x
    rows = 600_000  # 600,000 x 4,096 = 2.4e9 elements
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16).repeat(rows // 64, 1)
    codes, scales, col_codes, col_scales = ops.quantize_both(x)
    assert_same((codes[-64:], scales[-64:].contiguous()), (codes[:64].cpu(), scales[:64].cpu().contiguous()))
    assert torch.equal(bits(col_codes.t()[:, -64:]), bits(col_codes.t()[:, :64]))
    assert torch.equal(col_scales[0], col_scales[-1])


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
    assert_same(captured, tuple(t.cpu().clone() for t in work()))


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
