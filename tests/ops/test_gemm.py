"""The FP8 product: against float64 of the same codes, bit for bit across row counts, and every way to call it wrong."""

import pytest
import torch

from eightfold.ops import _library, gemm, layouts, quant  # noqa: F401
from eightfold.ops.quant import QuantizedTensor
from eightfold.reference import gemm as reference
from eightfold.reference import quant as reference_quant

ops = torch.ops.eightfold
# Relative Frobenius error. The tensor core keeps about 14 bits inside a block of 128; a CPU keeps 24.
FP32_ERROR = {"cpu": 1e-5, "cuda": 1e-3}
BF16_ERROR = {"cpu": 2**-9, "cuda": 2.2e-3}


def operand(rows, depth, group, device, mean=0.0):
    """Random values on levels that differ from group to group; group "cols" gives transposed column codes, (1, 128)."""
    level = 10 ** torch.empty(layouts.ceil_div(rows, 32), layouts.ceil_div(depth, 128)).uniform_(-2, 2)
    x = torch.randn(rows, depth) + mean
    x *= level.repeat_interleave(32, 0)[:rows].repeat_interleave(128, 1)[:, :depth]
    if group == "cols":
        codes, scales = reference_quant.quantize(x.t().contiguous(), [128, 1])
        columns = QuantizedTensor(codes, scales, (128, 1))
        return on_device(columns, device).t()
    return on_device(QuantizedTensor(*reference_quant.quantize(x, list(group)), group), device)


def on_device(q, device):
    return QuantizedTensor(strided_copy(q.codes, device), strided_copy(q.scales, device), q.group)


def strided_copy(t, device):
    """``t`` on ``device`` with its strides, the padding filled with NaN."""
    if 0 in t.shape:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    bytes_of = torch.full((size * t.element_size(),), 0xFF, dtype=torch.uint8)
    storage = bytes_of.view(t.dtype)
    raw = {1: torch.uint8, 4: torch.int32}[t.element_size()]
    storage.view(raw).as_strided(t.shape, t.stride()).copy_(t.view(raw))
    return storage.to(device).as_strided(t.shape, t.stride())


def exact(a, b, bias=None):
    args = (a.codes.cpu(), a.scales.cpu(), b.codes.cpu(), b.scales.cpu(), b.group[0])
    return reference.fp8_gemm(*args, None if bias is None else bias.cpu(), torch.float64, torch.float64)


def error(actual, expected):
    return float((actual.cpu().double() - expected).norm() / expected.norm())


SHAPES = [
    (1, 16, 16),
    (1, 1040, 384),
    (2, 144, 400),
    (3, 48, 1680),
    (5, 2064, 128),
    (7, 48, 144),
    (64, 576, 576),
    (65, 272, 1040),
    (129, 1536, 576),
    (200, 2064, 2320),
    (333, 80, 4112),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(device, shape):
    m, n, k = shape
    a = operand(m, k, (1, 128), device)
    b = operand(n, k, (128, 128), device)
    bias = torch.randn(n, device=device)
    assert error(gemm.fp8_gemm(a, b, out_dtype=torch.float32), exact(a, b)) < FP32_ERROR[device.type]
    assert error(gemm.fp8_gemm(a, b, bias, torch.float32), exact(a, b, bias)) < FP32_ERROR[device.type]
    out = gemm.fp8_gemm(a, b, bias.bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()
    assert error(out, exact(a, b, bias.bfloat16())) < BF16_ERROR[device.type]


@pytest.mark.parametrize(
    "shape", [(16, 16, 1), (48, 33, 100), (576, 130, 257), (70, 576, 1000), (130, 100, 4100)], ids=str
)
def test_weight_gradient(device, shape):
    """Both operands are column codes, so that K is the ragged number of tokens; N is free."""
    m, n, k = shape
    a, b = operand(m, k, "cols", device), operand(n, k, "cols", device)
    assert b.group == (1, 128)
    assert error(gemm.fp8_gemm(a, b, out_dtype=torch.float32), exact(a, b)) < FP32_ERROR[device.type]
    out = torch.randn(m, n, device=device)
    expected = out.cpu().double() + exact(a, b)
    assert gemm.fp8_gemm_accumulate_(out, a, b) is out
    assert error(out, expected) < FP32_ERROR[device.type]


def test_accumulate_adds_the_product_once(device):
    """Small products on a large sum: adding every block of K to ``out`` would round 32 times instead of once."""
    a, b = operand(40, 4096, (1, 128), device), operand(48, 4096, (128, 128), device)
    product = gemm.fp8_gemm(a, b, out_dtype=torch.float32)
    start = torch.full((40, 48), 1e4 * float(product.abs().max()), device=device)
    out = start.clone()
    gemm.fp8_gemm_accumulate_(out, a, b)
    assert torch.equal(out, start + product)


def test_transposed_weight(device):
    """dgrad: the transposed codes and scales of a weight give the product with its transpose."""
    w = torch.randn(208, 400)
    weight = on_device(QuantizedTensor(*reference_quant.quantize(w, [128, 128]), (128, 128)), device)
    dy = operand(50, 208, (1, 128), device)
    out = gemm.fp8_gemm(dy, quant.transpose(weight), out_dtype=torch.float32)
    values = (
        reference_quant.dequantize(*(t.cpu() for t in (q.codes, q.scales)), list(q.group), torch.float32).double()
        for q in (dy, weight)
    )
    dy_values, w_values = values
    assert error(out, dy_values @ w_values) < FP32_ERROR[device.type]


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_long_sums(device, mean):
    a, b = operand(5, 32768, (1, 128), device, mean), operand(48, 32768, (128, 128), device, mean)
    assert error(gemm.fp8_gemm(a, b, out_dtype=torch.float32), exact(a, b)) < FP32_ERROR[device.type]


@pytest.mark.parametrize("k", [128, 4096, 32768])
@pytest.mark.parametrize("b_group", [(128, 128), (1, 128)], ids=str)
def test_accuracy_on_normal_data(device, k, b_group):
    """The promise of the README: Hopper's tensor cores give 1.3e-4 in fp32, rounding to bf16 alone 1.66e-3."""
    a = on_device(QuantizedTensor(*reference_quant.quantize(torch.randn(256, k), [1, 128]), (1, 128)), device)
    b = on_device(QuantizedTensor(*reference_quant.quantize(torch.randn(256, k), list(b_group)), b_group), device)
    expected = exact(a, b)
    limit = 2e-4 if device.type == "cuda" else 1e-5
    assert error(gemm.fp8_gemm(a, b, out_dtype=torch.float32), expected) < limit
    assert error(gemm.fp8_gemm(a, b), expected) < 1.75e-3


def test_rounding_has_no_bias(device):
    """bf16 results are the float32 ones rounded to nearest: above and below equally often."""
    a, b = operand(256, 256, (1, 128), device), operand(256, 256, (128, 128), device)
    wide, narrow = gemm.fp8_gemm(a, b, out_dtype=torch.float32), gemm.fp8_gemm(a, b)
    assert torch.equal(wide.bfloat16(), narrow)
    assert error(narrow, wide.cpu().double()) < 1.75e-3
    above = ((narrow.float() - wide) * wide.sign()).sign().mean()
    assert abs(float(above)) < 0.02


@pytest.mark.parametrize(("n", "k"), [(144, 400), (2064, 1552), (576, 576)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_batch(device, n, k, out_dtype):
    """The same row of ``a`` gives the same bits among any number of others, at any place."""
    b = operand(n, k, (128, 128), device)
    rows = torch.randn(4096, k) * 10 ** torch.empty(4096, 1).uniform_(-3, 3)
    bias = torch.randn(n, device=device)

    def product(x):
        codes, scales = reference_quant.quantize(x, [1, 128])
        return gemm.fp8_gemm(on_device(QuantizedTensor(codes, scales, (1, 128)), device), b, bias, out_dtype)

    whole = product(rows)
    for start, count in (
        (0, 1),
        (4095, 1),
        (17, 2),
        (33, 3),
        (100, 5),
        (7, 7),
        (1, 64),
        (500, 128),
        (13, 129),
        (77, 1025),
    ):
        part = product(rows[start : start + count].contiguous())
        assert torch.equal(part, whole[start : start + count]), (start, count)
    assert torch.equal(product(rows), whole)


def test_columns_do_not_depend_on_their_neighbours(device):
    a, b = operand(37, 528, "cols", device), operand(700, 528, "cols", device)
    whole = gemm.fp8_gemm(a, b, out_dtype=torch.float32)
    for start, count in ((0, 1), (4, 17), (128, 130), (656, 44)):
        stop = start + count
        part = QuantizedTensor(b.codes[start:stop], b.scales[start:stop], b.group)
        assert torch.equal(gemm.fp8_gemm(a, part, out_dtype=torch.float32), whole[:, start:stop])


@pytest.mark.parametrize("m", [1, 40, 300])
def test_results_do_not_depend_on_threads(m):
    a, b = operand(m, 1552, (1, 128), "cpu"), operand(1040, 1552, (128, 128), "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gemm.fp8_gemm(a, b, out_dtype=torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_flushing_denormals_changes_nothing():
    """E4M3's subnormal codes are decoded alike in every floating-point mode."""
    codes = torch.arange(256, dtype=torch.uint8)[torch.arange(256) & 0x7F != 0x7F]
    a = QuantizedTensor(
        codes.repeat(64, 2)[:, :384].contiguous().view(torch.float8_e4m3fn), torch.ones(3, 64).t(), (1, 128)
    )
    b = QuantizedTensor(
        a.codes.view(torch.uint8).flip(1).contiguous().view(torch.float8_e4m3fn), torch.ones(1, 3), (128, 128)
    )
    expected = gemm.fp8_gemm(a, b, out_dtype=torch.float32)
    assert error(expected, exact(a, b)) < 1e-5
    try:
        torch.set_flush_denormal(True)
        assert torch.equal(gemm.fp8_gemm(a, b, out_dtype=torch.float32), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("m", [1, 30, 300])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_reaches_its_row_or_column_only(device, m, code):
    a, b = operand(m, 400, (1, 128), device), operand(272, 400, (128, 128), device)
    clean = gemm.fp8_gemm(a, b)
    for row, column in ((m - 1, None), (None, 271), (m // 2, 100)):
        broken_a, broken_b = on_device(a, "cpu"), on_device(b, "cpu")
        expected = torch.zeros(m, 272, dtype=torch.bool)
        if row is not None:
            broken_a.codes.view(torch.uint8)[row, 399] = code
            expected[row] = True
        if column is not None:
            broken_b.codes.view(torch.uint8)[column, 130] = code
            expected[:, column] = True
        out = gemm.fp8_gemm(on_device(broken_a, device), on_device(broken_b, device))
        assert torch.equal(out.isnan().cpu(), expected)
        assert torch.equal(out[~expected.to(device)], clean[~expected.to(device)])


def test_nan_scale_reaches_its_group(device):
    a, b = operand(20, 400, (1, 128), device), operand(272, 400, (128, 128), device)
    a.scales[3, 2] = float("nan")
    b.scales[1, 3] = float("nan")
    expected = torch.zeros(20, 272, dtype=torch.bool)
    expected[3] = expected[:, 128:256] = True
    assert torch.equal(gemm.fp8_gemm(a, b).isnan().cpu(), expected)


@pytest.mark.parametrize("shape", [(0, 32, 128), (4, 0, 128), (0, 0, 128), (4, 32, 0)], ids=str)
def test_empty(device, shape):
    m, n, k = shape
    a, b = operand(m, k, (1, 128), device), operand(n, k, (128, 128), device)
    bias = torch.randn(n, device=device)
    assert torch.equal(gemm.fp8_gemm(a, b, bias, torch.float32), bias.expand(m, n))
    out = torch.ones(m, n, device=device)
    gemm.fp8_gemm_accumulate_(out, a, b)
    assert torch.equal(out, torch.ones(m, n, device=device))


def test_rows_apart(device):
    """Codes that are a slice of a wider matrix work as they are."""
    codes, scales = reference_quant.quantize(torch.randn(40, 512), [1, 128])
    wide = QuantizedTensor(codes.to(device), strided_copy(scales, device), (1, 128))
    part = QuantizedTensor(wide.codes[:, 128:384], wide.scales[:, 1:3], (1, 128))
    b = operand(48, 256, (128, 128), device)
    assert not part.codes.is_contiguous()
    assert error(gemm.fp8_gemm(part, b, out_dtype=torch.float32), exact(part, b)) < FP32_ERROR[device.type]


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
        (_call("fp8_gemm_accumulate_", out=lambda t: t.bfloat16()), "accumulate_: out must be float32, got bfloat16"),
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
        gemm.fp8_gemm(weight, weight)
    with pytest.raises(ValueError, match=r"fp8_gemm: b.group must be \(128, 128\) or \(1, 128\), got \(128, 1\)"):
        gemm.fp8_gemm(rows, QuantizedTensor(rows.codes, rows.scales, (128, 1)))


@pytest.mark.gpu
def test_operands_on_two_devices():
    a, b = operand(6, 256, (1, 128), "cuda"), operand(32, 256, (128, 128), "cpu")
    with pytest.raises(RuntimeError, match="b is on cpu but the first argument is on cuda:0"):
        gemm.fp8_gemm(a, b)


# opcheck's test_schema computes with the inputs, which torch cannot do in FP8.
CHECKS_OF_FP8 = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("m", [0, 4, 32])  # opcheck clones its inputs densely, which drops the padding of other scales
def test_opcheck(device, m):
    a, b = operand(m, 272, (1, 128), device), operand(48, 272, (128, 128), device)
    args = (a.codes, a.scales, b.codes, b.scales, 128)
    torch.library.opcheck(ops.fp8_gemm.default, (*args, None, torch.bfloat16), test_utils=CHECKS_OF_FP8)
    torch.library.opcheck(
        ops.fp8_gemm.default, (*args, torch.randn(48, device=device), torch.float32), test_utils=CHECKS_OF_FP8
    )
    out = torch.zeros(m, 48, device=device)
    torch.library.opcheck(ops.fp8_gemm_accumulate_.default, (out, *args), test_utils=CHECKS_OF_FP8)


def test_inputs_stay_as_they_were(device):
    a, b = operand(33, 272, (1, 128), device), operand(48, 272, (128, 128), device)
    tensors = [
        t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for q in (a, b) for t in (q.codes, q.scales)
    ]
    before = [t.clone() for t in tensors]
    gemm.fp8_gemm(a, b)
    gemm.fp8_gemm_accumulate_(torch.zeros(33, 48, device=device), a, b)
    assert all(torch.equal(t, c) for t, c in zip(tensors, before, strict=True))


def test_compile_with_dynamic_shapes(device):
    weight = operand(48, 272, (128, 128), device)

    def step(x, grad):
        rows = quant.quantize(x, (1, 128))
        y = gemm.fp8_gemm(rows, weight)
        dy_cols, x_cols = (quant.quantize(t, (128, 1)) for t in (y, x))
        gemm.fp8_gemm_accumulate_(grad, dy_cols.t(), x_cols.t())
        return y

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (64, 37):
        x = torch.randn(rows, 272, device=device)
        grads = [torch.ones(48, 272, device=device) for _ in range(2)]
        assert torch.equal(compiled(x, grads[0]), step(x, grads[1]))
        assert torch.equal(*grads)


@pytest.mark.gpu
def test_graph_capture():
    a, b = operand(100, 400, (1, 128), "cuda"), operand(272, 400, (128, 128), "cuda")
    other = operand(100, 400, (1, 128), "cuda")
    out = torch.zeros(100, 272, device="cuda")

    def work():
        gemm.fp8_gemm_accumulate_(out, a, b)
        return gemm.fp8_gemm(a, b)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    a.codes.view(torch.uint8).copy_(other.codes.view(torch.uint8))
    a.scales.copy_(other.scales)
    out.zero_()
    graph.replay()
    assert torch.equal(captured, gemm.fp8_gemm(other, b))
    assert torch.equal(out, gemm.fp8_gemm(other, b, out_dtype=torch.float32))


def test_reference_agrees(device):
    """The executable specification is within float32 rounding of the kernel."""
    a, b = operand(70, 400, (1, 128), device), operand(144, 400, (128, 128), device)
    args = (a.codes, a.scales, b.codes, b.scales, 128)
    bias = torch.randn(144, device=device)
    expected = reference.fp8_gemm(*args, bias, torch.float32)
    assert error(ops.fp8_gemm(*args, bias, torch.float32), expected.cpu().double()) < FP32_ERROR[device.type]
    outs = [torch.ones(70, 144, device=device) for _ in range(2)]
    reference.fp8_gemm_accumulate_(outs[0], *args)
    ops.fp8_gemm_accumulate_(outs[1], *args)
    assert error(outs[1], outs[0].cpu().double()) < FP32_ERROR[device.type]
