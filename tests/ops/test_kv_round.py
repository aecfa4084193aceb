"""Keys and values rounded as E4M3 pages give them back: the reference's bytes, and attention's bits over such pages."""

import pytest
import torch

from attention_cases import DTYPES, Cache, packed, skip_what_cuda_lacks
from eightfold import reference
from eightfold.ops import attention, kv_round, paged_attention

op = torch.ops.eightfold.kv_round


@pytest.mark.parametrize("dim", [16, 64, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_the_bytes_of_the_reference(dtype, dim, device):
    skip_what_cuda_lacks(device, dtype, dim)
    wide = (torch.randn(37, 6, dim, device=device) * 10).to(dtype)
    wide[3], wide[5, 1], wide[9, 4, 1] = 0, 1e-20, torch.inf
    wide[7, 2, 5] = torch.nan
    for x in (wide, wide[:, 1:4], wide.transpose(0, 1).contiguous().transpose(0, 1), wide[:0]):
        out = op(x)
        assert out.is_contiguous()
        expected = reference.kv_round(x.cpu())
        assert torch.equal(out.cpu().nan_to_num(777.0), expected.nan_to_num(777.0))
        assert out.dtype == dtype
    assert 0.01 < (op(wide[10:]).float() - wide[10:].float()).norm() / wide[10:].float().norm() < 0.04


@pytest.mark.parametrize("dim", [64, 128])
def test_attention_has_the_bits_of_pages(dim, device):
    lengths = [1, 40, 513]
    q, k, v, starts = packed(lengths, 4, 2, dim, torch.bfloat16, device)
    cache = Cache(lengths, 2, dim, torch.bfloat16, device, codes=True)
    cache.store(k, v, starts)
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    scales = {"k_scales": cache.k_scales, "v_scales": cache.v_scales}
    expected = paged_attention(q, cache.k_pages, cache.v_pages, cache.pages, starts, sizes, **scales)
    assert torch.equal(attention(q, kv_round(k), kv_round(v), starts=starts), expected)


def test_the_gradient_is_passed_on(device):
    x = torch.randn(5, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    kv_round(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_torch_citizen(device):
    x = torch.randn(5, 2, 64, device=device, dtype=torch.bfloat16)
    torch.library.opcheck(op, (x,))
    compiled = torch.compile(lambda x: op(x * 2), fullgraph=True)
    assert torch.equal(compiled(x), op(x * 2))


@pytest.mark.gpu
def test_cuda_graph():
    x = torch.randn(300, 8, 128, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    op(x)
    with torch.cuda.graph(graph):
        out = op(x)
    x.normal_()
    graph.replay()
    assert torch.equal(out, op(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 64), r"kv_round: x must have 3 dimensions, got shape \[4, 64\]"),
        (torch.zeros(4, 2, 64).half(), "kv_round: x must be bfloat16 or float32, got float16"),
        (torch.zeros(64, 2, 4).transpose(0, 2), "kv_round: x must have stride 1 in its last dimension"),
    ],
)
def test_errors(x, message):
    with pytest.raises(RuntimeError, match=message):
        op(x)
