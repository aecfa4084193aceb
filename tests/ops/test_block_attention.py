"""Attention of a block over a cache that its own keys are written to: float64, E4M3, places, neighbours, errors."""

import pytest
import torch
import torch.nn.functional as F

from attention_cases import relative, skip_what_cuda_lacks
from cast_bytes import assert_same
from eightfold import ops as public
from eightfold import reference

ops = torch.ops.eightfold
SHAPES = [(32, 32, 128), (28, 4, 128), (7, 1, 64), (8, 8, 64), (6, 2, 96), (66, 1, 128), (4, 1, 24)]
CHECKS_OF_CODES = ("test_autograd_registration", "test_faketensor")  # the others compute with the inputs


class Blocks:
    """Sequences of some length with a block of rows somewhere in each; caches NaN wherever no key is."""

    def __init__(self, places, rows, shape, dtype=torch.bfloat16, device="cpu", codes=False, room=None):
        heads, kv_heads, dim = shape
        self.lengths = torch.tensor([n for _, n in places], dtype=torch.int32, device=device)
        self.at = torch.tensor([a for a, _ in places], dtype=torch.int32, device=device)
        self.rows, room = rows, room or -(-max(n for _, n in places) // 16) * 16 + 16

        def normal(*size):
            return torch.randn(*size, device=device).to(dtype)

        wide = normal(len(places) * rows, heads + 2 * kv_heads, dim).view(len(places), rows, -1, dim)
        self.q, self.k, self.v = wide.split([heads, kv_heads, kv_heads], 2)  # slices, as a projection gives them
        made = [normal(len(places), kv_heads, room, dim) for _ in range(2)]
        if codes:
            scales = [x.float().abs().amax(-1).clamp_min(1e-10) / 448 for x in made]
            made = [(x / s[..., None]).to(torch.float8_e4m3fn) for x, s in zip(made, scales, strict=True)]
            self.caches = *made, *scales
        else:
            self.caches = *made, None, None
        for s, (_, length) in enumerate(places):
            self.poison(s, length, room)

    def poison(self, sequence, begin, end):
        for x in self.caches:
            if x is not None:
                raw = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
                raw[sequence, :, begin:end] = 0x7F if raw is not x else torch.nan

    def run(self, own=True, op=ops.block_attention):
        """out and the caches after it; the caches here stay as they are."""
        caches = [x if x is None else x.clone() for x in self.caches]
        rows = (self.k, self.v) if own else (None, None)
        return op(self.q, *rows, *caches, self.at, self.lengths, self.q.shape[-1] ** -0.5), caches

    def alone(self, s):
        """Sequence s as a batch of one."""
        one = object.__new__(Blocks)
        one.rows = self.rows
        for name in ("q", "k", "v", "at", "lengths"):
            setattr(one, name, getattr(self, name)[s : s + 1])
        one.caches = part_of(self.caches, s)
        return one


def part_of(caches, s):
    return [x if x is None else x[s : s + 1].contiguous() for x in caches]


def same_caches(ours, expected):
    assert_same(*(tuple(x for x in caches if x is not None) for caches in (ours, expected)))


def exact(q, caches, lengths):
    """torch's own attention over what caches hold, in float64; zeros where there are no keys."""
    k, v, *scales = caches
    if scales[0] is not None:
        k, v = ((x.float() * s[..., None]).bfloat16() for x, s in zip((k, v), scales, strict=True))
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for s, n in enumerate(lengths.tolist()):
        if n:
            own, *seen = q[s].transpose(0, 1).double(), *(x[s, :, :n].double() for x in (k, v))
            seen = (x.repeat_interleave(q.shape[2] // x.shape[0], 0) for x in seen)
            out[s] = F.scaled_dot_product_attention(own, *seen).transpose(0, 1)
    return out


def places_of(rows):
    """Blocks at the start, in the middle and at the end (appended) of short and long sequences, and one that rests."""
    return [(0, rows), (0, 200), (37, 37 + rows), (130, 131 + rows), (0, 0), (500, 700), (333, 1312)]


@pytest.mark.parametrize("rows", [1, 8, 31, 32, 64])
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, codes, rows, device):
    skip_what_cuda_lacks(device, dim=shape[2])
    if device.type == "cpu":  # heads share nothing but their number with each other
        shape = (4, 4, shape[2]) if shape[0] == shape[1] else shape
    blocks = Blocks(places_of(rows), rows, shape, device=device, codes=codes)
    out, after = blocks.run()
    assert out.is_contiguous()
    expected = exact(blocks.q, after, blocks.lengths)
    for s, n in enumerate(blocks.lengths.tolist()):
        assert n == 0 or relative(out[s], expected[s]) < 4e-3, f"sequence {s} of {n} keys, block at {blocks.at[s]}"
        assert n > 0 or not out[s].any()
    plain, plain_after = blocks.run(op=reference.block_attention)
    assert relative(plain, expected) < 4e-3
    same_caches(after, plain_after)


@pytest.mark.parametrize("shape", [(4, 4, 64), (7, 1, 128), (6, 2, 24)], ids=str)
def test_float32_on_the_cpu(shape):
    blocks = Blocks(places_of(32), 32, shape, torch.float32)
    out, after = blocks.run()
    expected = exact(blocks.q, after, blocks.lengths)
    assert relative(out, expected) < 2e-6
    assert relative(blocks.run(op=reference.block_attention)[0], expected) < 2e-6


@pytest.mark.parametrize("rows", [1, 32, 64])
def test_every_row(rows, device):
    """Each row by itself, so that a wrong one cannot hide among hundreds."""
    for shape in ((8, 8, 128), (28, 4, 128), (9, 3, 64)):
        blocks = Blocks([(64, 1312), (100, 400), (0, 64)], rows, shape, device=device)
        out, after = blocks.run()
        expected = exact(blocks.q, after, blocks.lengths)
        error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = error.argmax().item()
        assert error.max() < 1.5e-2, f"{shape}: row {worst // shape[0]} of all, head {worst % shape[0]}"


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("shape", [(4, 4, 64), (28, 4, 128), (6, 2, 96)], ids=str)
def test_written_in_the_call_or_before(shape, codes, device):
    """The same bits, and the cache's bytes those of paged_store_; what is not the block's stays as it was."""
    blocks = Blocks(places_of(31), 31, shape, device=device, codes=codes)
    out, after = blocks.run()
    stored = [x if x is None else x.clone() for x in blocks.caches]
    room, used = stored[0].shape[2], blocks.lengths > 0
    first = torch.arange(len(used), device=device) * room + blocks.at
    slots = torch.where(used[:, None], first[:, None] + torch.arange(31, device=device), -1).flatten()
    ops.paged_store_(blocks.k.flatten(0, 1), blocks.v.flatten(0, 1), *stored, slots)
    same_caches(after, stored)
    blocks.caches = stored
    again, untouched = blocks.run(own=False)
    assert torch.equal(again, out)
    same_caches(untouched, stored)


@pytest.mark.parametrize("codes", [False, True])
def test_what_the_cache_held_does_not_matter(codes, device):
    """The block's own places before the call, and all behind a length."""
    blocks = Blocks(places_of(32), 32, (8, 2, 64), device=device, codes=codes)
    expected = blocks.run()[0]
    for s, at in enumerate(blocks.at.tolist()):
        blocks.poison(s, at, at + 32 if blocks.lengths[s] else at)
    assert torch.equal(blocks.run()[0], expected)
    for x in blocks.caches:
        if x is not None:
            x.copy_(x.float().nan_to_num(3.0))
    assert torch.equal(blocks.run()[0], expected)


def test_codes_are_their_values(device):
    blocks = Blocks(places_of(32), 32, (8, 2, 128), device=device, codes=True)
    out, after = blocks.run()
    wide = [(x.float() * s[..., None]).bfloat16() for x, s in zip(after[:2], after[2:], strict=True)]
    blocks.caches = *wide, None, None
    assert relative(out, blocks.run(own=False)[0]) < 3e-3


@pytest.mark.parametrize("codes", [False, True])
def test_neighbours_and_room(codes, device):
    """A sequence's bits are those it has alone, and in a cache with more room; twice the same."""
    blocks = Blocks(places_of(32), 32, (8, 2, 64), device=device, codes=codes)
    out, after = blocks.run()
    for _ in range(3):
        assert torch.equal(blocks.run()[0], out)
    for s in range(len(blocks.lengths)):
        one, one_after = blocks.alone(s).run()
        assert torch.equal(one[0], out[s]), f"sequence {s} alone"
        same_caches(one_after, part_of(after, s))
    room = blocks.caches[0].shape[2]
    wider = [x if x is None else torch.cat((x.view(torch.uint8), x.view(torch.uint8)), 2) for x in blocks.caches[:2]]
    wider = [x.view(old.dtype) for x, old in zip(wider, blocks.caches[:2], strict=True)]
    blocks.caches = *wider, *(x if x is None else torch.cat((x, x), 2) for x in blocks.caches[2:])
    assert blocks.caches[0].shape[2] == 2 * room
    assert torch.equal(blocks.run()[0], out)


def test_is_attention_over_pages_on_the_cpu():
    """There the bits are those of paged_attention without a mask, each sequence a page."""
    blocks = Blocks([(96, 224), (0, 128)], 32, (6, 2, 64))
    out, after = blocks.run()
    pages, starts = torch.arange(2, dtype=torch.int32)[:, None], torch.tensor([0, 32, 64], dtype=torch.int32)
    options = pages, starts, blocks.lengths, 32, 64**-0.5, False
    assert torch.equal(ops.paged_attention(blocks.q.flatten(0, 1), *after, *options), out.flatten(0, 1))


def test_extreme_scores(device):
    """Scores of thousands, and all alike: one key holds the weight, or all do."""
    blocks = Blocks([(100, 1300), (0, 64)], 32, (4, 4, 64), device=device)
    blocks.q, blocks.k = blocks.q * 100, blocks.k * 100
    out, after = blocks.run()
    assert relative(out, exact(blocks.q, after, blocks.lengths)) < 4e-3
    blocks.q = blocks.q * 0
    out, after = blocks.run()
    assert relative(out, exact(blocks.q, after, blocks.lengths)) < 4e-3


def test_nan_is_not_hidden(device):
    """A NaN among keys or values reaches all rows of its head and sequence, and no others."""
    for which, at in ((0, 3), (1, 640), (0, 1299)):
        blocks = Blocks([(100, 1300), (100, 1300)], 32, (4, 4, 64), device=device)
        clean = blocks.run()[0]
        blocks.caches[which][0, 2, at] = torch.nan
        out = blocks.run()[0]
        assert out[0, :, 2].isnan().all()
        assert torch.equal(out[1], clean[1])
        assert torch.equal(out[0, :, [0, 1, 3]], clean[0, :, [0, 1, 3]])


def test_empty_batch(device):
    q = torch.zeros(0, 8, 4, 64, dtype=torch.bfloat16, device=device)
    cache = torch.zeros(0, 2, 32, 64, dtype=torch.bfloat16, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    assert public.block_attention(q, q[:, :, :2], q[:, :, :2], cache, cache.clone(), none, none).shape == q.shape


def test_public_function(device):
    """The default scale, and rows that make no one dimension with their batch."""
    blocks = Blocks([(0, 90), (20, 100)], 16, (4, 2, 64), device=device)
    expected, after = blocks.run()
    caches = [x.clone() for x in blocks.caches[:2]]
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (blocks.q, blocks.k, blocks.v))
    assert torch.equal(public.block_attention(q, k, v, *caches, blocks.at, blocks.lengths), expected)
    assert torch.equal(public.block_attention(q, None, None, *caches, blocks.at, blocks.lengths, scale=0.125), expected)
    same_caches(caches, after[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [False, True])
def test_places_out_of_range_on_cuda(codes):
    """Nobody reads them before the launch: no memory but the cache's is touched, and the other sequences are right."""
    places = [(16, 80), (0, 48), (40, 72)]
    blocks = Blocks(places, 32, (8, 2, 64), device="cuda", codes=codes, room=96)
    expected, _ = blocks.run()
    for at, length in ((-5, 80), (80, 112), (2**31 - 1, 2**31 - 1), (-(2**31), 40), (90, 96), (10, -1)):
        blocks.at[1], blocks.lengths[1] = at, length
        out, after = blocks.run()
        for s in (0, 2):
            assert torch.equal(out[s], expected[s]), f"sequence {s} beside one at {at} of {length} keys"
            same_caches(blocks.alone(s).run()[1], part_of(after, s))


@pytest.mark.parametrize("codes", [False, True])
def test_torch_citizen(codes, device):
    blocks = Blocks([(0, 90), (20, 100)], 16, (4, 2, 64), device=device, codes=codes)
    expected, after = blocks.run()
    caches = [x if x is None else x.clone() for x in blocks.caches]
    checks = {"test_utils": CHECKS_OF_CODES} if codes else {}
    for rows in ((blocks.k, blocks.v), (None, None)):
        arguments = blocks.q, *rows, *caches, blocks.at, blocks.lengths, 0.125
        torch.library.opcheck(ops.block_attention.default, arguments, **checks)
    caches = [x if x is None else x.clone() for x in blocks.caches]

    def step(q, k, v):
        return ops.block_attention(q * 1, k * 1, v * 1, *caches, blocks.at, blocks.lengths, 0.125)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(blocks.q, blocks.k, blocks.v), expected)
    same_caches(caches, after)


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [False, True])
def test_cuda_graph(codes):
    """One graph serves all blocks: places, lengths, rows and caches change between replays."""
    blocks = Blocks([(64, 700), (0, 320), (600, 632)], 32, (8, 2, 128), device="cuda", codes=codes, room=1024)
    caches = [x if x is None else x.clone() for x in blocks.caches]

    def step():
        return ops.block_attention(blocks.q, blocks.k, blocks.v, *caches, blocks.at, blocks.lengths, 128**-0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for places in ([(96, 700), (32, 320), (0, 0)], [(0, 1024), (700, 732), (32, 96)]):
        other = Blocks(places, 32, (8, 2, 128), device="cuda", codes=codes, room=1024)
        for name in ("q", "k", "v", "at", "lengths"):
            getattr(blocks, name).copy_(getattr(other, name))
        for ours, new in zip(caches, other.caches, strict=True):
            if ours is not None:
                ours.copy_(new)
        graph.replay()
        expected, after = other.run()
        assert torch.equal(out, expected), f"blocks at {places}"
        same_caches(caches, after)


Q, ROWS, CACHE = torch.zeros(2, 5, 4, 64), torch.zeros(2, 5, 2, 64), torch.zeros(2, 2, 32, 64)
CODES = CACHE.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r": q must have 4 dimensions, got shape \[5, 4, 64\]"),
        ({"q": Q.half()}, ": q must be bfloat16 or float32, got float16"),
        ({"q": Q.transpose(2, 3)}, ": q must have stride 1 in its last dimension"),
        ({"q": torch.zeros(2, 65, 4, 64)}, r": q must have 1 to 64 rows, got shape \[2, 65, 4, 64\]"),
        ({"q": torch.zeros(2, 0, 4, 64)}, r": q must have 1 to 64 rows, got shape \[2, 0, 4, 64\]"),
        ({"q": torch.zeros(2, 5, 3, 64)}, ": heads of q must be a multiple of heads of k_cache, got 3 and 2"),
        ({"q": torch.zeros(2, 7, 4, 64)[:, ::2][:, :3]}, ": q must have sequences and rows that lie as one dimension"),
        ({"k": None}, ": v must be None where k is"),
        ({"v": None}, ": v must be given where k is"),
        ({"k": ROWS.bfloat16()}, ": k must be float32, got bfloat16"),
        ({"k": ROWS[:, :4]}, r": k must have shape \[2, 5, 2, 64\], got \[2, 4, 2, 64\]"),
        ({"v": ROWS[:, :, :1]}, r": v must have shape \[2, 5, 2, 64\], got \[2, 5, 1, 64\]"),
        ({"k_cache": CACHE[0]}, r": k_cache must have 4 dimensions, got shape \[2, 32, 64\]"),
        (
            {"k_cache": CACHE[:1], "v_cache": CACHE[:1]},
            r": k_cache must have shape \[2, 2, 32, 64\], got \[1, 2, 32, 64\]",
        ),
        ({"k_cache": CACHE.bfloat16()}, ": k_cache must be float32 or float8_e4m3fn, got bfloat16"),
        ({"k_cache": CACHE[:, :, ::2]}, ": k_cache must be contiguous"),
        (
            {"k_cache": CACHE[:, :, :20].contiguous()},
            r": k_cache must have room for a multiple of 16 keys, got shape \[2, 2, 20, 64\]",
        ),
        ({"v_cache": CODES}, ": v_cache must be float32, got float8_e4m3fn"),
        ({"k_cache": CODES, "v_cache": CODES}, ": k_scales must be given where caches are float8_e4m3fn"),
        ({"v_scales": torch.zeros(2, 2, 32)}, ": v_scales must be None where caches are float32"),
        ({"at": torch.zeros(2)}, ": at must be int32, got float32"),
        ({"at": torch.zeros(1).int()}, r": at must have shape \[2\], got \[1\]"),
        ({"at": torch.tensor([0, -1]).int()}, ": at must not be negative, got -1 for sequence 1"),
        ({"lengths": torch.tensor([5]).int()}, r": lengths must have shape \[2\], got \[1\]"),
        (
            {"lengths": torch.tensor([32, 6]).int()},
            r": lengths must be 0 or between the end of the block \(7\) and the room of k_cache \(32\), got 6 for .* 1",
        ),
        ({"lengths": torch.tensor([33, 7]).int()}, r": lengths must be 0 or .* \(5\) .* \(32\), got 33 for sequence 0"),
        ({"lengths": torch.tensor([32, -1]).int()}, ": lengths must be 0 or .*, got -1 for sequence 1"),
        ({"scale": 0.0}, ": scale must be more than 0, got 0"),
    ],
)
def test_errors(change, message):
    arguments = {
        "q": Q,
        "k": ROWS,
        "v": ROWS,
        "k_cache": CACHE,
        "v_cache": CACHE,
        "k_scales": None,
        "v_scales": None,
        "at": torch.tensor([0, 2]).int(),
        "lengths": torch.tensor([32, 7]).int(),
        "scale": 1.0,
    }
    with pytest.raises(RuntimeError, match="block_attention" + message):
        ops.block_attention(**{**arguments, **change})
