"""Attention over pages and storing to them: float64, E4M3 pages, poisoned memory, torch's machinery, errors."""

import pytest
import torch

from attention_cases import DTYPES, LENGTHS, MASKS, Cache, exact, packed, relative, skip_what_cuda_lacks, starts_of
from cast_bytes import assert_same
from eightfold import ops as public
from eightfold import reference

ops = torch.ops.eightfold
SHAPES = [(4, 4, 64), (7, 1, 64), (8, 2, 96), (7, 1, 128), (4, 1, 16), (3, 3, 256)]
PAGES = torch.zeros(6, 2, 16, 64)
CHECKS_OF_CODES = ("test_autograd_registration", "test_faketensor")  # the others compute with the inputs


def last_rows(q, starts, lengths, most):
    """The last `most` rows at most of every sequence, and where each begins."""
    kept = [min(n, most) for n in lengths]
    rows = [q[end - n : end] for end, n in zip(starts.tolist()[1:], kept, strict=True)]
    return torch.cat(rows), starts_of(kept, q.device)


@pytest.mark.parametrize("page_size", [16, 48, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, page_size, device):
    skip_what_cuda_lacks(device, dtype, shape[2], page_size)
    q, k, v, starts = packed(LENGTHS, *shape, dtype, device)
    cache = Cache(LENGTHS, shape[1], shape[2], dtype, device, page_size)
    cache.store(k, v, starts)
    expected = exact(q, k, v, starts)
    for most in (1, 40, 700):
        rows, begins = last_rows(q, starts, LENGTHS, most)
        want, _ = last_rows(expected, starts, LENGTHS, most)
        tolerance = 3e-3 if dtype == torch.bfloat16 else 2e-6
        assert relative(cache.attend(rows, begins, LENGTHS, most), want) < tolerance
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        options = cache.pages, begins, lengths, most, shape[2] ** -0.5
        assert relative(reference.paged_attention(rows, *cache.tensors, *options), want) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 256])
@pytest.mark.parametrize("shape", [(7, 1, 64), (6, 2, 128), (4, 4, 96), (66, 1, 64), (4, 2, 32)], ids=str)
def test_codes_are_their_values(shape, page_size, dtype, device):
    """Over E4M3 pages: the bits of attention over the bfloat16 keys and values that they stand for."""
    skip_what_cuda_lacks(device, dtype, shape[2])
    lengths = [1, 40, 129, 600]
    q, k, v, starts = packed(lengths, *shape, dtype, device)
    cache = Cache(lengths, *shape[1:], dtype, device, page_size, codes=True)
    cache.store(k * 3, v, starts)
    k8, v8 = (x.to(dtype) for x in cache.values(lengths))
    assert relative(k8, k * 3) < 0.04
    expected = public.attention(q, k8, v8, starts=starts)
    wide = Cache(lengths, *shape[1:], dtype, device, page_size)
    wide.store(k8, v8, starts)
    for most in (1, 9, 600):
        rows, begins = last_rows(q, starts, lengths, most)
        want, _ = last_rows(expected, starts, lengths, most)
        assert torch.equal(cache.attend(rows, begins, lengths, most), want), f"codes, {most} rows of a sequence"
        assert torch.equal(wide.attend(rows, begins, lengths, most), want), f"wide pages, {most} rows of a sequence"


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 1, 128), (8, 2, 128), (10, 1, 128)], ids=str)
def test_quantized_result(shape, dtype, codes, device):
    """The bytes of the result's cast, also of rows that are zeros or hold a NaN or an Inf; folded by one block, by the
    second kernel, or (many rows of one sequence) cast apart."""
    skip_what_cuda_lacks(device, dtype, 128)
    lengths = [*LENGTHS, 1537, 2100]
    q, k, v, starts = packed(lengths, *shape, dtype, device)
    q[-1, 0], q[-5, shape[0] - 1] = torch.nan, 200.0
    v[0] = 0.0
    v[-1, 0, 3] = 3e38  # beside the values of other keys an Inf, once it is rounded to bfloat16 or E4M3
    cache = Cache(lengths, *shape[1:], dtype, device, codes=codes)
    cache.store(k, v, starts)
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    for most in (1, 3, 40, 700):
        rows, begins = last_rows(q, starts, lengths, most)
        wide = cache.attend(rows, begins, lengths, most).flatten(1)
        options = cache.pages, begins, sizes, most, 128**-0.5
        made = ops.paged_attention_quantize(rows, *cache.tensors, *options)
        assert_same(tuple(made), tuple(ops.quantize(wide, [1, 128])))
        assert made[1].isnan().any()
    expected = reference.paged_attention_quantize(rows, *cache.tensors, *options)
    values = [codes.float() * scales.repeat_interleave(128, 1) for codes, scales in (made, expected)]
    finite = values[0].isfinite() & values[1].isfinite()
    assert relative(values[0][finite], values[1][finite]) < 0.01


@pytest.mark.parametrize(("causal", "block"), MASKS[1:])
@pytest.mark.parametrize("shape", [(4, 4, 64), (7, 1, 128)], ids=str)
def test_masks_against_float64(shape, causal, block, device):
    """The last rows under other masks than the causal one, over bfloat16 and E4M3 pages."""
    q, k, v, starts = packed(LENGTHS, *shape, torch.bfloat16, device)
    for codes in (False, True):
        cache = Cache(LENGTHS, *shape[1:], torch.bfloat16, device, 16, codes)
        cache.store(k, v, starts)
        expected = exact(q, *(cache.values(LENGTHS) if codes else (k, v)), starts, causal=causal, block=block)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        for most in (8, 40, 700):
            rows, begins = last_rows(q, starts, LENGTHS, most)
            want, _ = last_rows(expected, starts, LENGTHS, most)
            mask = {"causal": causal, "block": block}
            assert relative(cache.attend(rows, begins, LENGTHS, most, **mask), want) < 3e-3
            options = cache.pages, begins, lengths, most, shape[2] ** -0.5
            assert relative(reference.paged_attention(rows, *cache.tensors, *options, **mask), want) < 3e-3


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_writes_the_bytes_of_the_reference(dtype, codes, device):
    skip_what_cuda_lacks(device, dtype, 64)
    wide = torch.randn(90, 6, 64, device=device).to(dtype)
    wide[3], wide[5, 1], wide[7, 2, 5], wide[9, 4, 1] = 0, 1e-20, torch.nan, torch.inf
    ours = Cache([90], 3, 64, dtype, device, codes=codes)
    slots = ours.slots(0, 0, 90)
    slots[[0, 41]] = -1
    slots[88] = -(2**40)
    expected = [t if t is None else t.clone().cpu() for t in ours.tensors]
    spread = wide.transpose(0, 1).contiguous().transpose(0, 1)
    for k, v in ((wide[:, :3], wide[:, 3:]), (spread[:, ::2], spread[:, 1::2])):
        assert ops.paged_store_(k, v, *ours.tensors, slots) is None
        reference.paged_store_(k.cpu(), v.cpu(), *expected, slots.cpu())
        assert_same(*(tuple(t.cpu() for t in made if t is not None) for made in (ours.tensors, expected)))
    untouched = torch.ones(ours.k_pages.shape[0] * 16, dtype=torch.bool, device=device)
    untouched[slots[slots >= 0]] = False
    assert ours.k_pages.transpose(1, 2).flatten(0, 1)[untouched].isnan().all()


def test_last_of_a_slot_stays():
    k = torch.randn(3, 2, 64)
    pages = [torch.zeros(2, 2, 16, 64) for _ in range(2)]
    public.paged_store_(k, k, *pages, torch.tensor([5, 5, 5]))
    assert torch.equal(pages[0][0, :, 5], k[2])


@pytest.mark.parametrize("codes", [False, True])
def test_what_is_not_a_key_does_not_matter(codes, device):
    """Pages beyond a length, unused pages, places after the last key, page numbers that stand for nothing."""
    lengths = [5, 16, 130, 513]
    q, k, v, starts = packed(lengths, 4, 2, 64, torch.bfloat16, device)
    cache = Cache(lengths, 2, 64, torch.bfloat16, device, codes=codes)
    cache.store(k, v, starts)
    poisoned = cache.attend(q, starts, lengths)
    assert poisoned.isfinite().all()
    for t in cache.tensors:
        if t is not None:
            t.copy_(t.float().nan_to_num(1.0))
    assert torch.equal(cache.attend(q, starts, lengths), poisoned)
    cache.pages[:, -1] = 2**31 - 1
    assert torch.equal(cache.attend(q, starts, lengths), poisoned)


def test_sequences_without_rows(device):
    """Their lengths and pages are not looked at."""
    lengths = [40, 70]
    q, k, v, starts = packed(lengths, 4, 2, 64, torch.bfloat16, device)
    cache = Cache(lengths, 2, 64, torch.bfloat16, device)
    cache.store(k, v, starts)
    expected = cache.attend(q, starts, lengths)[40:]
    cache.pages[0] = -7
    assert torch.equal(cache.attend(q[40:], starts_of([0, 70], device), [-3, 70]), expected)
    assert cache.attend(q[:0], starts_of([0, 0], device), lengths).shape == (0, 4, 64)


@pytest.mark.parametrize("codes", [False, True])
def test_public_functions(codes, device):
    q, k, v, starts = packed([40], 4, 2, 64, torch.bfloat16, device)
    cache = Cache([40], 2, 64, torch.bfloat16, device, codes=codes)
    scales = {"k_scales": cache.k_scales, "v_scales": cache.v_scales}
    lengths = torch.tensor([40], dtype=torch.int32, device=device)
    public.paged_store_(k, v, cache.k_pages, cache.v_pages, cache.slots(0, 0, 40), **scales)
    out = public.paged_attention(q, cache.k_pages, cache.v_pages, cache.pages, starts, lengths, **scales)
    assert torch.equal(out, cache.attend(q, starts, [40]))
    assert relative(out, exact(q, k, v, starts)) < (0.05 if codes else 3e-3)


@pytest.mark.gpu
def test_what_cuda_refuses():
    q, *_, starts = packed([40], 4, 2, 64, torch.bfloat16, "cuda")
    with pytest.raises(RuntimeError, match="multiple of 128 keys on CUDA"):
        Cache([40], 2, 64, torch.bfloat16, "cuda", 48).attend(q, starts, [40])
    cache = Cache([40], 2, 64, torch.bfloat16, "cuda", codes=True)
    cache.pages = cache.pages[:, :0]
    with pytest.raises(RuntimeError, match=r"must not be empty, got shapes \[1, 0\] and"):
        cache.attend(q, starts, [40])


@pytest.mark.parametrize("codes", [False, True])
def test_torch_citizen(codes, device):
    q, k, v, starts = packed([9, 40], 4, 2, 64, torch.bfloat16, device)
    cache = Cache([9, 40], 2, 64, torch.bfloat16, device, codes=codes)
    cache.store(k, v, starts)
    lengths = torch.tensor([9, 40], dtype=torch.int32, device=device)
    tensors, slots = cache.tensors, torch.cat([cache.slots(0, 0, 9), cache.slots(1, 0, 40)])
    checks = {"test_utils": CHECKS_OF_CODES} if codes else {}
    torch.library.opcheck(ops.paged_attention.default, (q, *tensors, cache.pages, starts, lengths, 40, 0.125), **checks)
    torch.library.opcheck(ops.paged_store_.default, (k, v, *tensors, slots), **checks)

    def step(q, k, v):
        ops.paged_store_(k * 2, v, *tensors, slots)
        return ops.paged_attention(q, *tensors, cache.pages, starts, lengths, 40, 0.125)

    expected = step(q, k, v)
    cache.store(k, v, starts)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v), expected)


def test_quantized_result_as_a_torch_citizen(device):
    q, k, v, starts = packed([9, 40], 4, 2, 128, torch.bfloat16, device)
    cache = Cache([9, 40], 2, 128, torch.bfloat16, device)
    cache.store(k, v, starts)
    lengths = torch.tensor([9, 40], dtype=torch.int32, device=device)
    arguments = q, *cache.tensors, cache.pages, starts, lengths, 40, 0.125
    torch.library.opcheck(ops.paged_attention_quantize.default, arguments, test_utils=CHECKS_OF_CODES)
    expected = ops.paged_attention_quantize(*arguments)
    torch._dynamo.reset()
    whole = torch.compile(ops.paged_attention_quantize, fullgraph=True, backend="aot_eager")(*arguments)
    assert_same(tuple(whole), tuple(expected))
    named = {"k_pages": cache.k_pages, "v_pages": cache.v_pages, "pages": cache.pages, "scale": 0.125}
    public_one = public.paged_attention_quantize(q, **named, starts=starts, lengths=lengths, longest=40)
    assert_same((public_one.codes, public_one.scales), tuple(expected))


@pytest.mark.gpu
def test_cuda_graph():
    q, k, v, starts = packed([9, 700], 4, 2, 64, torch.bfloat16, "cuda")
    cache = Cache([9, 700], 2, 64, torch.bfloat16, "cuda")
    lengths = torch.tensor([9, 700], dtype=torch.int32, device="cuda")
    slots = torch.cat([cache.slots(0, 0, 9), cache.slots(1, 0, 700)])

    def step():
        ops.paged_store_(k, v, *cache.tensors, slots)
        return ops.paged_attention(q, *cache.tensors, cache.pages, starts, lengths, 700, 0.125)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert torch.equal(out, public.attention(q, k, v, starts=starts, scale=0.125))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 256)}, r": q must have 3 dimensions, got shape \[5, 256\]"),
        ({"q": torch.zeros(5, 4, 64).half()}, ": q must be bfloat16 or float32, got float16"),
        ({"q": torch.zeros(5, 3, 64)}, ": heads of q must be a multiple of heads of k_pages, got 3 and 2"),
        ({"k_pages": PAGES[0]}, r": k_pages must have 4 dimensions, got shape \[2, 16, 64\]"),
        ({"k_pages": PAGES.bfloat16()}, ": k_pages must be float32 or float8_e4m3fn, got bfloat16"),
        (
            {"k_pages": PAGES[:, :, :8].contiguous()},
            r": k_pages must have pages of a multiple of 16 keys, got shape \[6, 2, 8, 64\]",
        ),
        ({"k_pages": torch.zeros(6, 2, 16, 32)}, r": k_pages must have shape \[6, 2, 16, 64\], got \[6, 2, 16, 32\]"),
        ({"k_pages": torch.zeros(6, 16, 2, 64).transpose(1, 2)}, ": k_pages must be contiguous"),
        ({"v_pages": PAGES[:5]}, r": v_pages must have shape \[6, 2, 16, 64\], got \[5, 2, 16, 64\]"),
        ({"v_pages": PAGES.to(torch.float8_e4m3fn)}, ": v_pages must be float32, got float8_e4m3fn"),
        ({"k_scales": torch.zeros(6, 2, 16)}, ": k_scales must be None where pages are float32"),
        (
            {"k_pages": PAGES.to(torch.float8_e4m3fn), "v_pages": PAGES.to(torch.float8_e4m3fn)},
            ": k_scales must be given where",
        ),
        ({"pages": torch.zeros(2, 3).int()}, r": pages must have shape \[1, 3\], got \[2, 3\]"),
        ({"pages": torch.zeros(1, 3).long()}, ": pages must be int32, got int64"),
        ({"lengths": torch.tensor([5, 5]).int()}, r": lengths must have shape \[1\], got \[2\]"),
        (
            {"lengths": torch.tensor([4]).int()},
            r": lengths must be between the rows .* \(5\) and its room in pages \(48\), got 4",
        ),
        ({"lengths": torch.tensor([49]).int()}, r": lengths must be between .* \(5\) .* \(48\), got 49 for sequence 0"),
        ({"pages": torch.tensor([[0, 6, 1]]).int()}, r": pages must be from 0 to 5, got 6 at \[0, 1\]"),
        ({"pages": torch.tensor([[-1, 2, 1]]).int()}, r": pages must be from 0 to 5, got -1 at \[0, 0\]"),
        ({"starts": torch.tensor([0, 4]).int()}, ": starts must end with the 5 rows of q, got 4"),
        ({"longest": 4}, ": longest must be at least the 5 rows of sequence 0, got 4"),
        ({"block": -1}, ": block must be from 1 to 1073741824, got -1"),
    ],
)
def test_errors(change, message):
    arguments = {
        "q": torch.zeros(5, 4, 64),
        "k_pages": PAGES,
        "v_pages": PAGES,
        "k_scales": None,
        "v_scales": None,
        "pages": torch.tensor([[0, 5, 7]]).int(),
        "starts": torch.tensor([0, 5]).int(),
        "lengths": torch.tensor([20]).int(),
        "longest": 5,
        "scale": 1.0,
    }
    with pytest.raises(RuntimeError, match="paged_attention" + message):
        ops.paged_attention(**{**arguments, **change})


def test_heads_that_are_no_group_are_not_quantized():
    arguments = [PAGES, PAGES, None, None, torch.tensor([[0, 5]]).int(), torch.tensor([0, 5]).int()]
    with pytest.raises(RuntimeError, match=r"_quantize: q must have a last dimension of 128, .* \[5, 4, 64\]"):
        ops.paged_attention_quantize(torch.zeros(5, 4, 64), *arguments, torch.tensor([20]).int(), 5, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5, 2, 64, dtype=torch.int32)}, ": k must be bfloat16 or float32, got int32"),
        ({"v": torch.zeros(5, 2, 32)}, r": v must have shape \[5, 2, 64\], got \[5, 2, 32\]"),
        (
            {"k": torch.zeros(5, 1, 64), "v": torch.zeros(5, 1, 64)},
            r": k_pages must have shape \[6, 1, 16, 64\], got \[6, 2, 16, 64\]",
        ),
        ({"v_scales": torch.zeros(6, 2, 16)}, ": v_scales must be None where pages are float32"),
        ({"slots": torch.zeros(5).int()}, ": slots must be int64, got int32"),
        ({"slots": torch.zeros(4).long()}, r": slots must have shape \[5\], got \[4\]"),
        ({"slots": torch.tensor([0, 1, 96, 2, 3])}, ": slots must be below 96, got 96 at 2"),
    ],
)
def test_errors_of_the_store(change, message):
    rows = torch.zeros(5, 2, 64)
    arguments = {
        "k": rows,
        "v": rows,
        "k_pages": PAGES.clone(),
        "v_pages": PAGES.clone(),
        "k_scales": None,
        "v_scales": None,
    }
    with pytest.raises(RuntimeError, match="paged_store_" + message):
        ops.paged_store_(**{**arguments, "slots": torch.arange(5), **change})
