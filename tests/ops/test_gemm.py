"""The FP8 product against float64 of the same codes, in every layout torch can hand it over."""

import pytest
import torch

from eightfold import reference
from eightfold.ops import fp8_gemm, fp8_gemm_accumulate_, gemm_plan, quant
from eightfold.ops.quant import QuantizedTensor
from eightfold.reference import quant as reference_quant
from products import BF16_ERROR, FP32_ERROR, error, exact, on_device, operand, strided_copy

ops = torch.ops.eightfold
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
    assert error(fp8_gemm(a, b, out_dtype=torch.float32), exact(a, b)) < FP32_ERROR[device.type]
    assert error(fp8_gemm(a, b, bias, torch.float32), exact(a, b, bias)) < FP32_ERROR[device.type]
    out = fp8_gemm(a, b, bias.bfloat16())
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
    assert error(fp8_gemm(a, b, out_dtype=torch.float32), exact(a, b)) < FP32_ERROR[device.type]
    out = torch.randn(m, n, device=device)
    expected = out.cpu().double() + exact(a, b)
    assert fp8_gemm_accumulate_(out, a, b) is out
    assert error(out, expected) < FP32_ERROR[device.type]


def test_accumulate_adds_the_product_once(device):
    """Small products on a large sum: adding every block of K to ``out`` would round 32 times instead of once."""
    a, b = operand(40, 4096, (1, 128), device), operand(48, 4096, (128, 128), device)
    product = fp8_gemm(a, b, out_dtype=torch.float32)
    start = torch.full((40, 48), 1e4 * float(product.abs().max()), device=device)
    out = start.clone()
    fp8_gemm_accumulate_(out, a, b)
    assert torch.equal(out, start + product)


@pytest.mark.parametrize("shape", [(16, 16, 1), (48, 33, 100), (70, 576, 1000), (576, 1, 257), (512, 96, 300)], ids=str)
def test_accumulate_in_bf16_rounds_once(device, shape):
    """The sum of what is there and the float32 product, rounded to bf16: a product rounded before would differ."""
    m, n, k = shape
    a, b = operand(m, k, "cols", device), operand(n, k, "cols", device)
    product = fp8_gemm(a, b, out_dtype=torch.float32)
    start = (torch.randn(m, n, device=device) * product.abs().mean()).bfloat16()
    out = start.clone()
    assert fp8_gemm_accumulate_(out, a, b) is out
    assert torch.equal(out, (start.float() + product).bfloat16())
    assert m * n < 1000 or not torch.equal(out, start + product.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((4796, 1248, 300), (256, 128)),
        ((4796, 1248, 100), (256, 128)),
        ((3772, 1056, 300), (128, 192)),
        ((1212, 3360, 300), (128, 128)),
    ],
    ids=str,
)
def test_every_tile_accumulates(shape, tile, dtype, bare_memory):
    """Several tiles a block, ragged rows and columns; what lies around the output stays as it was."""
    m, n, k = shape
    plan = gemm_plan(m // 128 * 128, n, k, b_group_rows=1, sm_count=132)
    assert (plan["tile_m"], plan["tile_n"]) == tile
    a, b = operand(m, k, "cols", "cuda"), operand(n, k, "cols", "cuda")
    product = fp8_gemm(a, b, out_dtype=torch.float32)
    around = torch.randn(m + 2, n, device="cuda", dtype=dtype)
    out = around.clone()
    for _ in range(2):
        fp8_gemm_accumulate_(out[1:-1], a, b)
    once = (around[1:-1].float() + product).to(dtype)
    assert torch.equal(out[1:-1], (once.float() + product).to(dtype))
    assert torch.equal(out[0], around[0])
    assert torch.equal(out[-1], around[-1])


def test_transposed_weight(device):
    """dgrad: the transposed codes and scales of a weight give the product with its transpose."""
    w = torch.randn(208, 400)
    weight = on_device(QuantizedTensor(*reference_quant.quantize(w, [128, 128]), (128, 128)), device)
    dy = operand(50, 208, (1, 128), device)
    out = fp8_gemm(dy, quant.transpose(weight), out_dtype=torch.float32)
    values = (
        reference_quant.dequantize(*(t.cpu() for t in (q.codes, q.scales)), list(q.group), torch.float32).double()
        for q in (dy, weight)
    )
    dy_values, w_values = values
    assert error(out, dy_values @ w_values) < FP32_ERROR[device.type]


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_long_sums(device, mean):
    a, b = operand(5, 32768, (1, 128), device, mean), operand(48, 32768, (128, 128), device, mean)
    assert error(fp8_gemm(a, b, out_dtype=torch.float32), exact(a, b)) < FP32_ERROR[device.type]


@pytest.mark.parametrize("k", [128, 4096, 32768])
@pytest.mark.parametrize("b_group", [(128, 128), (1, 128)], ids=str)
def test_accuracy_on_normal_data(device, k, b_group):
    """The promise of the README: Hopper's tensor cores give 1.3e-4 in fp32, rounding to bf16 alone 1.66e-3."""
    a = on_device(QuantizedTensor(*reference_quant.quantize(torch.randn(256, k), [1, 128]), (1, 128)), device)
    b = on_device(QuantizedTensor(*reference_quant.quantize(torch.randn(256, k), list(b_group)), b_group), device)
    expected = exact(a, b)
    limit = 2e-4 if device.type == "cuda" else 1e-5
    assert error(fp8_gemm(a, b, out_dtype=torch.float32), expected) < limit
    assert error(fp8_gemm(a, b), expected) < 1.75e-3


def test_rounding_has_no_bias(device):
    """bf16 results are the float32 ones rounded to nearest: above and below equally often."""
    a, b = operand(256, 256, (1, 128), device), operand(256, 256, (128, 128), device)
    wide, narrow = fp8_gemm(a, b, out_dtype=torch.float32), fp8_gemm(a, b)
    assert torch.equal(wide.bfloat16(), narrow)
    assert error(narrow, wide.cpu().double()) < 1.75e-3
    above = ((narrow.float() - wide) * wide.sign()).sign().mean()
    assert abs(float(above)) < 0.02


@pytest.mark.parametrize("shape", [(0, 32, 128), (4, 0, 128), (0, 0, 128), (4, 32, 0)], ids=str)
def test_empty(device, shape):
    m, n, k = shape
    a, b = operand(m, k, (1, 128), device), operand(n, k, (128, 128), device)
    bias = torch.randn(n, device=device)
    assert torch.equal(fp8_gemm(a, b, bias, torch.float32), bias.expand(m, n))
    columns = operand(m, k, "cols", device), operand(n, k, "cols", device)
    for dtype, operands in ((torch.float32, (a, b)), (torch.float32, columns), (torch.bfloat16, columns)):
        out = torch.ones(m, n, device=device, dtype=dtype)
        fp8_gemm_accumulate_(out, *operands)
        assert torch.equal(out, torch.ones(m, n, device=device, dtype=dtype))


def test_rows_apart(device):
    """Codes that are a slice of a wider matrix work as they are."""
    codes, scales = reference_quant.quantize(torch.randn(40, 512), [1, 128])
    wide = QuantizedTensor(codes.to(device), strided_copy(scales, device), (1, 128))
    part = QuantizedTensor(wide.codes[:, 128:384], wide.scales[:, 1:3], (1, 128))
    b = operand(48, 256, (128, 128), device)
    assert not part.codes.is_contiguous()
    assert error(fp8_gemm(part, b, out_dtype=torch.float32), exact(part, b)) < FP32_ERROR[device.type]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck_of_weight_gradients(device, dtype):
    a, b = operand(32, 128, (1, 128), device), operand(48, 128, (1, 128), device)
    args = (torch.zeros(32, 48, device=device, dtype=dtype), a.codes, a.scales, b.codes, b.scales, 1)
    torch.library.opcheck(ops.fp8_gemm_accumulate_.default, args, test_utils=CHECKS_OF_FP8)


def test_inputs_stay_as_they_were(device):
    a, b = operand(33, 272, (1, 128), device), operand(48, 272, (128, 128), device)
    tensors = [
        t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for q in (a, b) for t in (q.codes, q.scales)
    ]
    before = [t.clone() for t in tensors]
    fp8_gemm(a, b)
    fp8_gemm_accumulate_(torch.zeros(33, 48, device=device), a, b)
    assert all(torch.equal(t, c) for t, c in zip(tensors, before, strict=True))


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compile_with_dynamic_shapes(device, grad_dtype):
    weight = operand(48, 272, (128, 128), device)

    def step(x, grad):
        rows = quant.quantize(x, (1, 128))
        y = fp8_gemm(rows, weight)
        dy_cols, x_cols = (quant.quantize(t, (128, 1)) for t in (y, x))
        fp8_gemm_accumulate_(grad, dy_cols.t(), x_cols.t())
        return y

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (64, 37):
        x = torch.randn(rows, 272, device=device)
        grads = [torch.ones(48, 272, device=device, dtype=grad_dtype) for _ in range(2)]
        assert torch.equal(compiled(x, grads[0]), step(x, grads[1]))
        assert torch.equal(*grads)


@pytest.mark.gpu
def test_graph_capture():
    a, b = operand(100, 400, (1, 128), "cuda"), operand(272, 400, (128, 128), "cuda")
    other = operand(100, 400, (1, 128), "cuda")
    out, start = torch.zeros(100, 272, device="cuda"), torch.randn(256, 96, device="cuda", dtype=torch.bfloat16)
    columns = operand(256, 300, "cols", "cuda"), operand(96, 300, "cols", "cuda")
    total = start.clone()

    def work():
        fp8_gemm_accumulate_(out, a, b)
        fp8_gemm_accumulate_(total, *columns)
        return fp8_gemm(a, b)

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
    total.copy_(start)
    graph.replay()
    assert torch.equal(total, (start.float() + fp8_gemm(*columns, out_dtype=torch.float32)).bfloat16())
    assert torch.equal(captured, fp8_gemm(other, b))
    assert torch.equal(out, fp8_gemm(other, b, out_dtype=torch.float32))


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
    a, b = operand(70, 400, "cols", device), operand(144, 400, "cols", device)
    args = (a.codes, a.scales, b.codes, b.scales, 1)
    outs = [torch.ones(70, 144, device=device, dtype=torch.bfloat16) for _ in range(2)]
    reference.fp8_gemm_accumulate_(outs[0], *args)
    ops.fp8_gemm_accumulate_(outs[1], *args)
    assert error(outs[1], outs[0].cpu().double()) < BF16_ERROR[device.type]
