"""The bfloat16 and float32 product: against float64, a row's bits in any company, torch's machinery, errors."""

import pytest
import torch

from eightfold import reference
from eightfold.ops import gemm
from products import FP32_ERROR, error

op = torch.ops.eightfold.gemm
SHAPES = [(1, 8, 8), (3, 24, 72), (7, 1032, 400), (33, 144, 1000), (171, 520, 328), (300, 4104, 648), (333, 80, 4112)]
DTYPES = [torch.bfloat16, torch.float32]
BF16_ERROR = 2e-3  # of rounding alone, at most 2^-9


def case(m, n, k, dtype, device):
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("float32 is for CPUs")
    return torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)


def exact(a, b):
    return reference.gemm(a.cpu(), b.cpu(), torch.float64, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, device):
    a, b = case(*shape, dtype, device)
    out, narrow = gemm(a, b), gemm(a, b, torch.bfloat16)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert error(out, exact(a, b)) < FP32_ERROR[device.type]
    assert error(reference.gemm(a, b), exact(a, b)) < FP32_ERROR["cpu"]
    assert torch.equal(narrow, out.bfloat16())
    assert error(narrow, exact(a, b)) < BF16_ERROR


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_long_sums(mean, dtype, device):
    a, b = (t + mean for t in case(5, 48, 32768, dtype, device))
    assert error(gemm(a, b), exact(a, b)) < FP32_ERROR[device.type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(136, 400), (4104, 328)])
def test_a_row_has_the_same_bits_among_any_others(n, k, dtype, device):
    a, b = case(2500, n, k, dtype, device)
    a *= 10 ** torch.empty(2500, 1, device=device).uniform_(-3, 3)
    whole = gemm(a, b)
    assert torch.equal(gemm(a, b), whole)
    for m in range(1, 301, 1 if n < 1000 else 37):
        start = m * 7 % (2500 - m)
        assert torch.equal(gemm(a[start : start + m], b), whole[start : start + m]), (start, m)
    for start, m in ((2499, 1), (17, 511), (300, 2048), (100, 2177)):
        assert torch.equal(gemm(a[start : start + m], b), whole[start : start + m]), (start, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_has_the_same_bits_among_any_others(dtype, device):
    a, b = case(37, 704, 528, dtype, device)
    whole = gemm(a, b)
    for start, count in ((0, 8), (8, 24), (128, 136), (656, 48)):
        assert torch.equal(gemm(a, b[start : start + count]), whole[:, start : start + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 40, 300])
def test_results_do_not_depend_on_threads(m, dtype):
    a, b = case(m, 1040, 1552, dtype, torch.device("cpu"))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gemm(a, b))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_their_row_or_column_only(dtype, device):
    a, b = case(30, 272, 400, dtype, device)
    clean = gemm(a, b)
    a[29, 399], b[100, 130] = torch.nan, torch.inf
    out = gemm(a, b)
    broken = torch.zeros(30, 272, dtype=torch.bool, device=device)
    broken[29] = broken[:, 100] = True
    assert torch.equal(~out.isfinite(), broken)
    assert torch.equal(out[~broken], clean[~broken])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart(dtype, device):
    """Slices of wider matrices work as they are; what lies between their rows is not read."""
    a, b = case(40, 48, 512, dtype, device)
    expected = gemm(a[:, 128:384].contiguous(), b[:, 64:320].contiguous())
    for t, start in ((a, 128), (b, 64)):
        t[:, :start], t[:, start + 256 :] = torch.nan, torch.nan
    assert torch.equal(gemm(a[:, 128:384], b[:, 64:320]), expected)
    assert torch.equal(gemm(a[::2, 128:384], b[:, 64:320]), expected[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 32, 128), (4, 0, 128), (0, 0, 0), (4, 32, 0)], ids=str)
def test_empty(shape, dtype, device):
    a, b = case(*shape, dtype, device)
    for out_dtype in DTYPES:
        assert torch.equal(gemm(a, b, out_dtype), torch.zeros(shape[:2], dtype=out_dtype, device=device))


@pytest.mark.parametrize("m", [0, 1, 33])
def test_torch_citizen(m, device):
    a, b = case(m, 48, 72, torch.bfloat16, device)
    torch.library.opcheck(op, (a, b, torch.float32))
    compiled = torch.compile(lambda x: op(x * 2, b, torch.bfloat16) + 1, fullgraph=True, dynamic=True)
    for x in (a, torch.cat((a, a, a))):
        assert torch.equal(compiled(x), op(x * 2, b, torch.bfloat16) + 1)


@pytest.mark.gpu
def test_cuda_graph():
    a, b = case(100, 272, 400, torch.bfloat16, torch.device("cuda"))
    graph = torch.cuda.CUDAGraph()
    op(a, b)
    with torch.cuda.graph(graph):
        out = op(a, b)
    a.normal_()
    graph.replay()
    assert torch.equal(out, op(a, b))


ROWS = torch.zeros(6, 64).bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": ROWS[0]}, r"gemm: a must have 2 dimensions, got shape \[64\]"),
        ({"b": ROWS[None]}, r"gemm: b must have 2 dimensions, got shape \[1, 6, 64\]"),
        ({"a": ROWS.half()}, "gemm: a must be bfloat16 or float32, got float16"),
        ({"a": ROWS.float()}, "gemm: b must have the dtype of a, float32, got bfloat16"),
        ({"out_dtype": torch.float16}, "gemm: out_dtype must be float32 or bfloat16, got float16"),
        (
            {"a": ROWS[:, :32]},
            r"a and b must have the same second dimension, got shapes \[6, 32\] and \[16, 64\]",
        ),
        ({"a": ROWS[:, :36], "b": ROWS[:, :36]}, "the second dimension of a and b must be a multiple of 8, got 36"),
        ({"b": ROWS}, r"gemm: b must have a multiple of 8 rows, got shape \[6, 64\]"),
        ({"a": torch.zeros(64, 6).bfloat16().t()}, "gemm: a must have stride 1 in its last dimension"),
        (
            {"a": torch.zeros(6, 68).bfloat16()[:, :64]},
            r"a must have rows at a multiple of 16 .* strides \[68, 1\]",
        ),
        ({"a": torch.zeros(6, 72).bfloat16()[:, 4:68]}, "gemm: a must start at a multiple of 16 bytes"),
        (
            {"b": torch.zeros(1, 64).bfloat16().expand(16, 64)},
            r"b must have rows at a multiple of 16 .* strides \[0, 1\]",
        ),
    ],
)
def test_errors(change, message):
    arguments = {"a": ROWS, "b": torch.zeros(16, 64).bfloat16()}
    with pytest.raises(RuntimeError, match=message):
        op(**{**arguments, **change})


@pytest.mark.gpu
def test_errors_on_cuda():
    a, b = torch.zeros(4, 16), torch.zeros(8, 16)
    with pytest.raises(RuntimeError, match=r"gemm: a \(on CUDA\) must be bfloat16, got float32"):
        op(a.cuda(), b.cuda())
    with pytest.raises(RuntimeError, match="gemm: b is on cpu but the first argument is on cuda:0"):
        op(a.cuda().bfloat16(), b.bfloat16())
