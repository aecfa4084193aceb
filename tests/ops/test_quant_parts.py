"""quantize_stacked and quantize_beside: the bytes of each part's own cast, in one buffer."""

import pytest
import torch

from cast_bytes import E4M3, assert_same, bit_patterns, bits
from eightfold.ops import layouts, quant
from eightfold.reference import quant as reference

ops = torch.ops.eightfold
DTYPES = [torch.bfloat16, torch.float32]
HEIGHTS = [(128,), (48,), (256, 128, 384), (128, 80), (0, 128, 16), (128,) * 7 + (3,)]


def parts(sizes, other, dtype, along, device):
    """Of every bit pattern; the second is a view of a wider tensor."""
    made = []
    for i, size in enumerate(sizes):
        shape = (size, other) if along == 0 else (other, size)
        x = bit_patterns(*shape, dtype)
        if i == 1:
            x = torch.nn.functional.pad(x.float(), (8, 24)).to(dtype)[:, 8 : 8 + shape[1]]
        made.append(x.to(device))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", [1, 130, 256, 400])
@pytest.mark.parametrize("sizes", HEIGHTS)
def test_stacked(device, sizes, other, dtype):
    xs = parts(sizes, other, dtype, 0, device)
    for transposed in (False, True):
        assert_same(ops.quantize_stacked(xs, transposed), reference.quantize_stacked([x.cpu() for x in xs], transposed))
    codes, scales = ops.quantize_stacked(xs)
    begin = 0
    for x in xs:
        one, one_scales = ops.quantize(x, [128, 128])
        assert torch.equal(bits(codes[begin : begin + x.shape[0]]), bits(one))
        at = begin // 128
        assert torch.equal(bits(scales[at : at + one_scales.shape[0]]), bits(one_scales))
        begin += x.shape[0]
    turned, turned_scales = ops.quantize_stacked(xs, True)
    assert torch.equal(bits(turned), bits(codes.view(torch.uint8).t().contiguous().view(E4M3)))
    assert torch.equal(bits(turned_scales), bits(scales.t()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", [1, 130, 256])
@pytest.mark.parametrize("sizes", HEIGHTS)
def test_beside(device, sizes, other, dtype):
    xs = parts(sizes, other, dtype, 1, device)
    for columns in (False, True):
        assert_same(ops.quantize_beside(xs, columns), reference.quantize_beside([x.cpu() for x in xs], columns))
    codes, scales, col_codes, col_scales = ops.quantize_beside(xs)
    begin = 0
    for x in xs:
        one = ops.quantize_both(x)
        end, at = begin + x.shape[1], begin // 128
        whole = (
            codes[:, begin:end],
            scales[:, at : at + one[1].shape[1]],
            col_codes[:, begin:end],
            col_scales[:, begin:end],
        )
        for a, b in zip(whole, one, strict=True):
            assert torch.equal(bits(a), bits(b))
        begin = end


def test_views_of_a_whole_are_operands(device):
    """Products of slices have the bits of separate casts: what a caller does who needs one of several."""
    xs = parts((128, 256), 192, torch.bfloat16, 1, device)
    _, _, codes, scales = ops.quantize_beside([x.nan_to_num(0, 1, 1).clamp(-4, 4) for x in xs])
    x = quant.quantize(torch.randn(192, 64, device=device), (128, 1)).t()
    for begin, end in ((0, 128), (128, 384)):
        left = codes[:, begin:end].t(), scales[:, begin:end].t()
        whole = ops.fp8_gemm(codes.t(), scales.t(), x.codes, x.scales, 1)
        assert torch.equal(ops.fp8_gemm(*left, x.codes, x.scales, 1), whole[begin:end])


def test_public_functions(device):
    xs = [torch.randn(128, 256, device=device), torch.randn(64, 256, device=device)]
    q = quant.quantize_stacked(xs)
    assert q.group == (128, 128)
    assert q.shape == (192, 256)
    assert quant.quantize_stacked(xs, transposed=True).shape == (256, 192)
    rows, cols = quant.quantize_beside([x.t().contiguous() for x in xs])
    assert (rows.group, cols.group) == ((1, 128), (128, 1))
    assert quant.quantize_beside(xs[:1], columns=False)[1] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.quantize_beside([x] * 9), "quantize_beside: xs must be 1 to 8 tensors, got 9"),
        (lambda x: ops.quantize_stacked([x[:128], x[:, :64]]), r"xs\[1\] must have 256 columns, .* \[200, 64\]"),
        (lambda x: ops.quantize_beside([x, x[:64]]), r"xs\[1\] must have 200 rows, .* got shape \[64, 256\]"),
        (lambda x: ops.quantize_stacked([x, x]), r"xs\[0\] must have a multiple of 128 rows, .* \[200, 256\]"),
        (lambda x: ops.quantize_beside([x[:, :100], x]), r"xs\[0\] must have a multiple of 128 columns"),
        (lambda x: ops.quantize_beside([x, x.bfloat16()]), r"xs\[1\] must be float32, got bfloat16"),
        (lambda x: ops.quantize_stacked([x.half()]), r"xs\[0\] must be bfloat16 or float32, got float16"),
        (lambda x: ops.quantize_stacked([x.t()]), r"xs\[0\] must have stride 1"),
    ],
)
def test_errors_name_the_argument(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(200, 256, device=device))


def test_opcheck_and_compile(device):
    xs = [torch.randn(128, 256, device=device), torch.randn(40, 256, device=device)]
    for flag in (False, True):
        torch.library.opcheck(ops.quantize_stacked.default, (xs, flag))
        torch.library.opcheck(ops.quantize_beside.default, ([x.t().contiguous() for x in xs], flag))

    def both(xs):
        return ops.quantize_stacked(xs, True), ops.quantize_beside([xs[0], xs[0]])

    torch._dynamo.reset()
    for a, b in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(xs), both(xs), strict=True):
        assert_same(a, b)


def test_turned_layout():
    assert layouts.empty_turned_codes(40, 3, torch.device("cpu")).stride() == (48, 1)


@pytest.mark.gpu
def test_cuda_graph():
    xs = [torch.randn(256, 384, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    new = [torch.randn_like(x) for x in xs]
    want = ops.quantize_stacked(new, True), ops.quantize_beside(new)
    for _ in range(2):
        ops.quantize_stacked(xs, True), ops.quantize_beside(xs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.quantize_stacked(xs, True), ops.quantize_beside(xs)
    for x, y in zip(xs, new, strict=True):
        x.copy_(y)
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)
