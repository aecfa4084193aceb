"""fp8_gemm of at most 128 rows, a kernel of its own on Hopper: the bits of many rows, no race with its neighbours."""

import pytest
import torch

from eightfold.ops import fp8_gemm, fp8_gemm_accumulate_, quant
from eightfold.ops.quant import QuantizedTensor
from eightfold.reference import quant as reference_quant
from products import on_device, operand


@pytest.mark.parametrize("n", [16, 4608, 6144, 7168, 8448, 28672, 24576])  # a tile width each, on 132 multiprocessors
@pytest.mark.parametrize("k", [272, 512])  # three groups, the last ragged; four
def test_few_rows_give_the_bits_of_many(device, n, k):
    b = operand(n, k, (128, 128), device)
    x = torch.randn(300, k) * 10 ** torch.empty(300, 1).uniform_(-3, 3)
    bias = torch.randn(n, device=device)

    def product(rows, settled=False):
        a = QuantizedTensor(*reference_quant.quantize(rows.contiguous(), [1, 128]), (1, 128))
        return fp8_gemm(on_device(a, device), b, bias, settled=settled)

    whole = product(x)
    for m in (1, 8, 17, 64, 65, 100, 127, 128):
        for settled in (False, True):
            assert torch.equal(product(x[m : 2 * m], settled), whole[m : 2 * m]), (m, settled)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 31, 32, 33, 65, 128])
def test_every_count_of_groups(device, steps):
    """Groups of K go through a ring of stages and up to four sets of registers, b's scales through registers by 32."""
    b = operand(144, 128 * steps, (128, 128), device)
    x = torch.randn(130, 128 * steps)

    def product(rows, settled=False):
        a = QuantizedTensor(*reference_quant.quantize(rows.contiguous(), [1, 128]), (1, 128))
        return fp8_gemm(on_device(a, device), b, out_dtype=torch.float32, settled=settled)

    whole = product(x)
    for m in (3, 40, 128):
        for settled in (False, True):
            assert torch.equal(product(x[:m], settled), whole[:m]), (m, settled)


@pytest.mark.gpu
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("m", [1, 24, 64, 128])
def test_kernels_that_start_early_wait_for_what_they_read(m, settled, bare_memory):
    """Each product reads what the kernel before it wrote, in a graph and out of it."""
    n = k = 2048
    weights = [quant.quantize(torch.randn(n, k, device="cuda") / k**0.5, (128, 128)) for _ in range(4)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    a = quant.quantize(x, (1, 128))
    total = torch.zeros(m, n, device="cuda")

    def chain(pause):
        total.zero_()  # a kernel of torch's own, behind which the weights are settled
        y = x
        for i in range(24):
            fp8_gemm_accumulate_(total, a, weights[i % 4])
            pause()
            y = fp8_gemm(quant.quantize(y, (1, 128)), weights[i % 4], settled=settled)
            pause()
        return total, y

    expected = [t.clone() for t in chain(torch.cuda.synchronize)]
    assert all(torch.equal(t, e) for t, e in zip(chain(lambda: None), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(lambda: None)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(t, e) for t, e in zip(results, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "n", [208, 2112, 4112, 8464]
)  # parts of b's rows that differ in length and meet inside groups of 128
@pytest.mark.parametrize("k", [400, 1552])
def test_rows_inside_a_large_product(n, k):
    x = torch.randn(4096, k, device="cuda") * 10 ** torch.empty(4096, 1, device="cuda").uniform_(-3, 3)
    b = quant.quantize(torch.randn(n, k, device="cuda").bfloat16(), (128, 128))

    def product(rows):
        return fp8_gemm(quant.quantize(rows.bfloat16().contiguous(), (1, 128)), b)

    whole = product(x)
    for m in (1, 64, 65, 128):
        for start in (0, 1111, 4096 - m):
            assert torch.equal(product(x[start : start + m]), whole[start : start + m]), (m, start)


@pytest.mark.gpu
def test_three_streams_at_once():
    """Blocks of several kernels share a multiprocessor; each waits for its own stream's only."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    weights = [quant.quantize(torch.randn(4096, 2048, device="cuda").bfloat16(), (128, 128)) for _ in streams]
    rows = [quant.quantize(torch.randn(m, 2048, device="cuda").bfloat16(), (1, 128)) for m in (1, 64, 128)]
    expected = [fp8_gemm(a, b) for a, b in zip(rows, weights, strict=True)]
    torch.cuda.synchronize()
    results = [[] for _ in streams]
    for _ in range(20):
        for stream, a, b, many in zip(streams, rows, weights, results, strict=True):
            with torch.cuda.stream(stream):
                many.append(fp8_gemm(a, b))
    torch.cuda.synchronize()
    assert all(torch.equal(r, e) for many, e in zip(results, expected, strict=True) for r in many)
