"""An element of the FP8 product depends on its own row and column only: bit for bit, NaN included."""

import pytest
import torch

from eightfold.ops import fp8_gemm
from eightfold.ops.quant import QuantizedTensor
from eightfold.reference import quant as reference_quant
from products import error, exact, on_device, operand


@pytest.mark.parametrize(("n", "k"), [(144, 400), (2064, 1552), (576, 576)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_batch(device, n, k, out_dtype):
    """The same row of ``a`` gives the same bits among any number of others, at any place."""
    b = operand(n, k, (128, 128), device)
    rows = torch.randn(4096, k) * 10 ** torch.empty(4096, 1).uniform_(-3, 3)
    bias = torch.randn(n, device=device)

    def product(x):
        codes, scales = reference_quant.quantize(x, [1, 128])
        return fp8_gemm(on_device(QuantizedTensor(codes, scales, (1, 128)), device), b, bias, out_dtype)

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


@pytest.mark.gpu
@pytest.mark.parametrize("b_group", [(128, 128), (1, 128)], ids=str)
def test_every_tile_gives_the_same_bits(b_group):
    """These counts of rows take all tiles of the plan of 132 multiprocessors; others take fewer of them.

    Those that are no multiple of 128 take two products.
    """
    n, k = 2176, 1024
    a, b = operand(5642, k, (1, 128), "cuda"), operand(n, k, b_group, "cuda")
    whole = fp8_gemm(a, b, out_dtype=torch.float32)
    for count in (129, 300, 462, 512, 906, 1024, 1313, 1424, 1536, 3001, 3072):
        part = QuantizedTensor(a.codes[:count], a.scales[:count], (1, 128))
        assert torch.equal(fp8_gemm(part, b, out_dtype=torch.float32), whole[:count]), count


def test_columns_do_not_depend_on_their_neighbours(device):
    a, b = operand(37, 528, "cols", device), operand(700, 528, "cols", device)
    whole = fp8_gemm(a, b, out_dtype=torch.float32)
    for start, count in ((0, 1), (4, 17), (128, 130), (656, 44)):
        stop = start + count
        part = QuantizedTensor(b.codes[start:stop], b.scales[start:stop], b.group)
        assert torch.equal(fp8_gemm(a, part, out_dtype=torch.float32), whole[:, start:stop])


@pytest.mark.parametrize("m", [1, 40, 300])
def test_results_do_not_depend_on_threads(m):
    a, b = operand(m, 1552, (1, 128), "cpu"), operand(1040, 1552, (128, 128), "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(fp8_gemm(a, b, out_dtype=torch.float32))
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
    expected = fp8_gemm(a, b, out_dtype=torch.float32)
    assert error(expected, exact(a, b)) < 1e-5
    try:
        torch.set_flush_denormal(True)
        assert torch.equal(fp8_gemm(a, b, out_dtype=torch.float32), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("m", [1, 30, 300])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_reaches_its_row_or_column_only(device, m, code):
    a, b = operand(m, 400, (1, 128), device), operand(272, 400, (128, 128), device)
    clean = fp8_gemm(a, b)
    for row, column in ((m - 1, None), (None, 271), (m // 2, 100)):
        broken_a, broken_b = on_device(a, "cpu"), on_device(b, "cpu")
        expected = torch.zeros(m, 272, dtype=torch.bool)
        if row is not None:
            broken_a.codes.view(torch.uint8)[row, 399] = code
            expected[row] = True
        if column is not None:
            broken_b.codes.view(torch.uint8)[column, 130] = code
            expected[:, column] = True
        out = fp8_gemm(on_device(broken_a, device), on_device(broken_b, device))
        assert torch.equal(out.isnan().cpu(), expected)
        assert torch.equal(out[~expected.to(device)], clean[~expected.to(device)])


def test_nan_scale_reaches_its_group(device):
    a, b = operand(20, 400, (1, 128), device), operand(272, 400, (128, 128), device)
    a.scales[3, 2] = float("nan")
    b.scales[1, 3] = float("nan")
    expected = torch.zeros(20, 272, dtype=torch.bool)
    expected[3] = expected[:, 128:256] = True
    assert torch.equal(fp8_gemm(a, b).isnan().cpu(), expected)
