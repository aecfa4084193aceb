"""Head norms, rotation and writing into pages at once: the bits of the separate ops, torch's machinery, errors."""

import pytest
import torch

from attention_cases import DTYPES, Cache, relative
from cast_bytes import assert_same
from eightfold import ops as public
from eightfold import reference

ops = torch.ops.eightfold
EPS = 1e-6
WEIGHTS = [None, torch.float32, torch.bfloat16]
# tokens, heads, kv_heads, dim
SHAPES = [
    (1, 4, 4, 64),
    (7, 28, 4, 128),
    (33, 7, 1, 96),
    (130, 9, 3, 64),
    (19, 32, 8, 128),
    (5, 3, 2, 18),
    (6, 2, 2, 256),
]
PAGES = torch.zeros(6, 2, 16, 64)


def skip_what_cuda_lacks(device, dtype, dim=64):
    if device.type == "cuda" and (dtype != torch.bfloat16 or dim not in (64, 96, 128)):
        pytest.skip("bfloat16 with heads of 64, 96 or 128 alone on CUDA")


def projected(tokens, heads, kv_heads, dim, dtype, device):
    """q, k and v as slices of one projection's output, some heads of zeros, of tiny and of infinite values."""
    wide = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device)
    wide *= torch.randint(-6, 7, (tokens, heads + 2 * kv_heads, 1), device=device).exp()
    if tokens > 4:
        wide[1], wide[2, :, 3:], wide[3, :, 1], wide[4, :, dim - 1] = 0, 1e-20, torch.nan, torch.inf
    wide = wide.flatten(1).to(dtype)
    parts = wide.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    return [x.unflatten(1, (-1, dim)) for x in parts]


def angles(tokens, dim, device):
    angle = torch.rand(tokens, dim // 2, device=device) * 100
    return angle.cos(), angle.sin()


def weights_of(dim, dtype, device):
    return [None if dtype is None else (torch.randn(dim, device=device) + 1).to(dtype) for _ in range(2)]


def slots_in(cache, tokens):
    """Places in shuffled pages, of some rows nowhere."""
    slots = cache.slots(0, 0, tokens)
    slots[1::5] = -1
    slots[3::7] = -(2**40)
    return slots


def copies(tensors, device=None):
    return [t if t is None else t.clone().to(device or t.device) for t in tensors]


def composition(q, k, v, cos, sin, k_pages, v_pages, k_scales, v_scales, slots, q_weight, k_weight, eps):
    """The separate ops."""
    tables = cos[None, :, None], sin[None, :, None]

    def turned(x, weight):
        if weight is not None:
            x = ops.rms_norm(x.contiguous().flatten(0, 1), weight, eps, False)[0].view(x.shape)
        return ops.rotary(x[None], *tables)[0]

    ops.paged_store_(turned(k, k_weight), v, k_pages, v_pages, k_scales, v_scales, slots)
    return turned(q, q_weight)


def rows_of(pages, slots):
    """What lies in slots: rows of pages, or their scales."""
    words = pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages
    return words.transpose(1, 2).flatten(0, 1)[slots].view(pages.dtype)


def same_pages(ours, theirs):
    for name, a, b in zip(("k_pages", "v_pages", "k_scales", "v_scales"), ours, theirs, strict=True):
        if a is not None:
            try:
                assert_same(a, b)
            except AssertionError as reason:
                raise AssertionError(f"{name}: {reason}") from None


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_separate_ops(shape, dtype, weight, codes, device):
    tokens, _, kv_heads, dim = shape
    skip_what_cuda_lacks(device, dtype, dim)
    parts, tables = projected(*shape, dtype, device), angles(tokens, dim, device)
    norm = *weights_of(dim, weight, device), EPS
    cache = Cache([tokens], kv_heads, dim, dtype, device, page_size=48, codes=codes)
    slots, expected = slots_in(cache, tokens), copies(cache.tensors)
    y = ops.rope_cache_write(*parts, *tables, *cache.tensors, slots, *norm)
    assert y.is_contiguous()
    assert_same(y, composition(*parts, *tables, *expected, slots, *norm))
    same_pages(cache.tensors, expected)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(dtype, weight, codes, device):
    """The same bits without a norm; with one, whose sum the reference takes in another order, close to it."""
    skip_what_cuda_lacks(device, dtype)
    q, k, v = (torch.randn(40, h, 64, device=device).to(dtype) for h in (6, 2, 2))
    tables, norm = angles(40, 64, device), (*weights_of(64, weight, device), EPS)
    cache = Cache([40], 2, 64, dtype, device, codes=codes)
    slots, expected = slots_in(cache, 40), copies(cache.tensors, "cpu")
    inputs = [q, k, v, *tables]
    y = ops.rope_cache_write(*inputs, *cache.tensors, slots, *norm)
    cpu = [x.cpu() for x in inputs]
    z = reference.rope_cache_write(*cpu, *expected, slots.cpu(), *copies(norm[:2], "cpu"), EPS)
    ours = [x.cpu() for x in (y, *cache.tensors) if x is not None]
    theirs = [x for x in (z, *expected) if x is not None]
    for a, b in zip(ours, theirs, strict=True):
        if weight is None:
            assert_same(a, b)
            continue
        assert torch.equal(a.isnan(), b.isnan())
        tolerance = 2e-3 if dtype == torch.bfloat16 or codes else 1e-6
        assert relative(a.float().nan_to_num(), b.float().nan_to_num()) < tolerance


def test_untouched_places_stay(device):
    q, k, v = projected(4, 4, 2, 64, torch.bfloat16, device)
    cache = Cache([4], 2, 64, torch.bfloat16, device)
    slots = cache.slots(0, 0, 4)
    slots[2] = -1
    y = ops.rope_cache_write(q, k, v, *angles(4, 64, device), *cache.tensors, slots, None, None, EPS)
    assert y.isfinite().all()
    for pages in (cache.k_pages, cache.v_pages):
        rows = pages.transpose(1, 2).flatten(0, 1)
        written = torch.zeros(len(rows), dtype=torch.bool, device=device)
        written[slots[slots >= 0]] = True
        assert rows[written].isfinite().all()
        assert rows[~written].isnan().all()


def test_strides(device):
    """Heads before tokens, every other head, dense tensors: the same bits."""
    q, k, v = (torch.randn(21, h, 64, device=device).bfloat16() for h in (4, 2, 2))
    tables, norm = angles(21, 64, device), (*weights_of(64, torch.float32, device), EPS)
    cache = Cache([21], 2, 64, torch.bfloat16, device)
    slots, first = slots_in(cache, 21), copies(cache.tensors)
    expected = ops.rope_cache_write(q, k, v, *tables, *first, slots, *norm)
    for spread in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
    ):
        second = copies(cache.tensors)
        assert_same(ops.rope_cache_write(*map(spread, (q, k, v)), *tables, *second, slots, *norm), expected)
        same_pages(second, first)


def test_no_tokens(device):
    q, k, v = (torch.zeros(0, h, 64, device=device, dtype=torch.bfloat16) for h in (4, 2, 2))
    cache = Cache([5], 2, 64, torch.bfloat16, device)
    slots = torch.zeros(0, dtype=torch.int64, device=device)
    for weight in WEIGHTS[:2]:
        norm = *weights_of(64, weight, device), EPS
        y = ops.rope_cache_write(q, k, v, *angles(0, 64, device), *cache.tensors, slots, *norm)
        assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert cache.k_pages.isnan().all()


def test_last_of_a_slot_stays():
    q, k, v = (torch.randn(3, 2, 64) for _ in range(3))
    pages = [torch.zeros(2, 2, 16, 64) for _ in range(2)]
    public.rope_cache_write(q, k, v, *angles(3, 64, "cpu"), *pages, torch.tensor([5, 5, 5]))
    assert torch.equal(pages[1][0, :, 5], v[2])


@pytest.mark.parametrize("codes", [False, True])
def test_public_function(codes, device):
    q, k, v = projected(9, 4, 2, 64, torch.bfloat16, device)
    tables, (q_weight, k_weight) = angles(9, 64, device), weights_of(64, torch.float32, device)
    cache = Cache([9], 2, 64, torch.bfloat16, device, codes=codes)
    slots, expected = slots_in(cache, 9), copies(cache.tensors)
    out = public.rope_cache_write(
        *(q, k, v, *tables, cache.k_pages, cache.v_pages, slots),
        q_weight=q_weight,
        k_weight=k_weight,
        eps=1e-5,
        k_scales=cache.k_scales,
        v_scales=cache.v_scales,
    )
    assert_same(out, composition(q, k, v, *tables, *expected, slots, q_weight, k_weight, 1e-5))
    same_pages(cache.tensors, expected)


@pytest.mark.parametrize("weight", WEIGHTS[:2], ids=str)
@pytest.mark.parametrize("codes", [False, True])
def test_torch_citizen(codes, weight, device):
    q, k, v = (x.nan_to_num(1, 1, 1) for x in projected(9, 4, 2, 64, torch.bfloat16, device))
    tables, norm = angles(9, 64, device), (*weights_of(64, weight, device), EPS)
    cache = Cache([9], 2, 64, torch.bfloat16, device, codes=codes)
    slots = cache.slots(0, 0, 9)
    checks = {"test_utils": ("test_autograd_registration", "test_faketensor")} if codes else {}
    torch.library.opcheck(ops.rope_cache_write.default, (q, k, v, *tables, *cache.tensors, slots, *norm), **checks)

    def step(q, k, v):
        return ops.rope_cache_write(q * 2, k, v, *tables, *cache.tensors, slots, *norm) + 1

    expected, first = step(q, k, v), copies(cache.tensors)
    for t in cache.tensors:
        if t is not None:
            t.zero_()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v), expected)
    same_pages(*([t if t is None else rows_of(t, slots) for t in made] for made in (cache.tensors, first)))


@pytest.mark.gpu
def test_cuda_graph():
    """Between a kernel that makes its input and one that reads what it wrote, many times over."""
    wide = torch.randn(3, 8 * 64, device="cuda", dtype=torch.bfloat16)
    tables, norm = angles(3, 64, "cuda"), (*weights_of(64, torch.float32, "cuda"), EPS)
    cache = Cache([3], 2, 64, torch.bfloat16, "cuda")
    slots = cache.slots(0, 0, 3)

    def step(write, tensors):
        read = []
        for i in range(20):
            parts = (wide * (i + 1)).unflatten(1, (8, 64)).split([4, 2, 2], 1)
            y = write(*parts, *tables, *tensors, slots, *norm)
            read += [y + 1, *(rows_of(pages, slots) for pages in tensors[:2])]
        return read

    step(ops.rope_cache_write, cache.tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(ops.rope_cache_write, cache.tensors)
    for _ in range(5):
        wide.normal_()
        graph.replay()
        for a, b in zip(out, step(composition, copies(cache.tensors)), strict=True):
            assert_same(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, ": q must be bfloat16 on CUDA, got float32"),
        ({"dim": 32}, r": q must have a last dimension of 64, 96 or 128 on CUDA, got shape \[5, 4, 32\]"),
    ],
)
def test_what_cuda_refuses(change, message):
    options = {"dtype": torch.bfloat16, "dim": 64, **change}
    dim, dtype = options["dim"], options["dtype"]
    q, k, v = projected(5, 4, 2, dim, dtype, "cuda")
    cache = Cache([5], 2, dim, dtype, "cuda")
    slots = cache.slots(0, 0, 5)
    with pytest.raises(RuntimeError, match="rope_cache_write" + message):
        ops.rope_cache_write(q, k, v, *angles(5, dim, "cuda"), *cache.tensors, slots, None, None, EPS)


@pytest.mark.gpu
def test_cuda_refuses_what_does_not_begin_at_16_bytes():
    q, k, v = projected(5, 4, 2, 64, torch.bfloat16, "cuda")
    cache = Cache([5], 2, 64, torch.bfloat16, "cuda")
    slots, (cos, sin) = cache.slots(0, 0, 5), angles(5, 64, "cuda")
    odd = torch.zeros(5 * 32 + 1, device="cuda")[1:].view(5, 32)
    weight = torch.ones(65, device="cuda")[1:]
    for tables, norm, name in (((odd, sin), (None, None), "cos"), ((cos, sin), (weight, weight), "q_weight")):
        with pytest.raises(RuntimeError, match=f"rope_cache_write: {name} must"):
            ops.rope_cache_write(q, k, v, *tables, *cache.tensors, slots, *norm, EPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 256)}, r": q must have 3 dimensions, got shape \[5, 256\]"),
        ({"q": torch.zeros(5, 4, 64).half()}, ": q must be bfloat16 or float32, got float16"),
        ({"q": torch.zeros(5, 4, 63)}, r": q must have an even last dimension, got shape \[5, 4, 63\]"),
        ({"q": torch.zeros(5, 4, 128)[..., ::2]}, ": q must "),
        ({"k": torch.zeros(5, 128)}, r": k must have 3 dimensions, got shape \[5, 128\]"),
        ({"k": torch.zeros(4, 2, 64)}, r": k must have shape \[5, 2, 64\], got \[4, 2, 64\]"),
        ({"k": torch.zeros(5, 2, 64).bfloat16()}, ": k must be float32, got bfloat16"),
        ({"v": torch.zeros(5, 2, 32)}, r": v must have shape \[5, 2, 64\], got \[5, 2, 32\]"),
        (
            {"k": torch.zeros(5, 1, 64), "v": torch.zeros(5, 1, 64)},
            r": k_pages must have shape \[6, 1, 16, 64\], got \[6, 2, 16, 64\]",
        ),
        ({"cos": torch.zeros(1, 5, 1, 32)}, r": cos must have shape \[5, 32\], got \[1, 5, 1, 32\]"),
        ({"cos": torch.zeros(5, 32).bfloat16()}, ": cos must be float32, got bfloat16"),
        ({"sin": torch.zeros(5, 64)}, r": sin must have shape \[5, 32\], got \[5, 64\]"),
        ({"sin": torch.zeros(5, 64)[:, ::2]}, ": sin must be contiguous"),
        ({"k_scales": torch.zeros(6, 2, 16)}, ": k_scales must be None where pages are float32"),
        ({"slots": torch.zeros(5).int()}, ": slots must be int64, got int32"),
        ({"slots": torch.zeros(4).long()}, r": slots must have shape \[5\], got \[4\]"),
        ({"slots": torch.tensor([0, 1, 96, 2, 3])}, ": slots must be below 96, got 96 at 2"),
        ({"q_weight": torch.ones(64)}, ": k_weight must be given where q_weight is"),
        ({"k_weight": torch.ones(64)}, ": k_weight must be None where q_weight is"),
        ({"q_weight": torch.ones(32), "k_weight": torch.ones(64)}, r": q_weight must have shape \[64\], got \[32\]"),
        (
            {"q_weight": torch.ones(64), "k_weight": torch.ones(64).bfloat16()},
            ": k_weight must be float32, got bfloat16",
        ),
        ({"eps": -1.0}, ": eps must not be negative, got -1"),
    ],
)
def test_errors(change, message):
    arguments = {
        "q": torch.zeros(5, 4, 64),
        "k": torch.zeros(5, 2, 64),
        "v": torch.zeros(5, 2, 64),
        "cos": torch.zeros(5, 32),
        "sin": torch.zeros(5, 32),
        "k_pages": PAGES.clone(),
        "v_pages": PAGES.clone(),
        "k_scales": None,
        "v_scales": None,
        "slots": torch.arange(5),
        "q_weight": None,
        "k_weight": None,
        "eps": EPS,
    }
    with pytest.raises(RuntimeError, match="rope_cache_write" + message):
        ops.rope_cache_write(**{**arguments, **change})
