"""A row's bits: whole sequence at once, in pieces over pages, token by token, in any batch: always the same."""

import pytest
import torch

from attention_cases import DTYPES, MASKS, Cache, packed, skip_what_cuda_lacks, starts_of, takes_pages_of
from eightfold.ops import attention

ops = torch.ops.eightfold
LENGTHS = [1, 2, 15, 16, 17, 127, 128, 129, 256, 257, 512, 700]
SHAPES = [(7, 1, 64), (6, 2, 128), (4, 4, 96), (2, 1, 24)]


def alone(q, k, v, lengths):
    """Every sequence by itself."""
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attention(*part, starts=starts_of([len(part[0])], q.device)) for part in parts])


def in_pieces(q, k, v, lengths, cuts, page_size, codes=False):
    """All sequences at once, a piece of each at a time, stored and then attended; `cuts` says how long pieces are."""
    starts = starts_of(lengths, q.device)
    cache = Cache(lengths, k.shape[1], q.shape[2], q.dtype, q.device, page_size, codes)
    out, done = torch.full_like(q, torch.nan), [0] * len(lengths)
    for cut in cuts:
        ends = [min(n, at + cut) for n, at in zip(lengths, done, strict=True)]
        pieces = [torch.arange(a + first, b + first) for first, a, b in zip(starts.tolist(), done, ends)]
        index = torch.cat(pieces).to(q.device)
        slots = torch.cat([cache.slots(s, a, b) for s, (a, b) in enumerate(zip(done, ends, strict=True))])
        ops.paged_store_(k[index], v[index], *cache.tensors, slots)
        rows = [b - a for a, b in zip(done, ends, strict=True)]
        out[index] = cache.attend(q[index], starts_of(rows, q.device), ends, max(rows))
        done = ends
    assert done == lengths
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_pieces_tokens(shape, dtype, device):
    skip_what_cuda_lacks(device, dtype, shape[2])
    q, k, v, starts = packed(LENGTHS, *shape, dtype, device)
    whole = attention(q, k, v, starts=starts)
    assert torch.equal(alone(q, k, v, LENGTHS), whole)
    for page_size, cuts in (
        (16, [700]),
        (48, [1] * 20 + [100] * 7),
        (64, [33] * 22),
        (128, [256, 1, 256, 187]),
        (272, [500] * 2),
    ):
        if takes_pages_of(device, page_size):
            assert torch.equal(in_pieces(q, k, v, LENGTHS, cuts, page_size), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [16, 80])
def test_one_token_at_a_time(page_size, dtype, device):
    """As decoding does: keys after a token's own are NaN still."""
    skip_what_cuda_lacks(device, dtype, 64, page_size)
    q, k, v, starts = packed(LENGTHS, 7, 1, 64, dtype, device)
    whole = attention(q, k, v, starts=starts)
    assert torch.equal(in_pieces(q, k, v, LENGTHS, [1] * 700, page_size), whole)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("shape", [(7, 1, 64), (6, 2, 128)], ids=str)
def test_newest_row_of_a_settled_cache(shape, codes, device):
    """A token at a time, its row made by the kernel right ahead, while all before it may be read meanwhile."""
    lengths, tokens = [300, 1100, 513, 127], 24
    q, k, v, starts = packed(lengths, *shape, torch.bfloat16, device)
    cache = Cache(lengths, *shape[1:], torch.bfloat16, device, 64, codes)
    cache.store(k, v, starts)
    whole = attention(q, *(cache.values(lengths) if codes else (k, v)), starts=starts)
    held = cache.tensors
    for t in held:
        if t is not None:
            t.copy_(torch.full(t.shape, torch.nan))
    kept = [torch.arange(a, b - tokens) for a, b in zip(starts.tolist(), starts.tolist()[1:])]
    index = torch.cat(kept).to(device)
    slots = torch.cat([cache.slots(s, 0, n - tokens) for s, n in enumerate(lengths)])
    ops.paged_store_(k[index], v[index], *held, slots)
    ends = torch.tensor(lengths, device=device)
    turn = [torch.full((sum(lengths), shape[2] // 2), value, device=device) for value in (1.0, 0.0)]
    begins = starts_of([1] * len(lengths), device)
    for left in range(tokens, 0, -1):
        newest = (starts[1:] - left).long()
        sizes = (ends - left + 1).int()
        slots = torch.stack([cache.slots(s, n - left, n - left + 1)[0] for s, n in enumerate(lengths)])
        rows = [x[newest] for x in (q, k, v, *turn)]
        turned = ops.rope_cache_write(*rows, *held, slots, None, None, 0.0)
        out = cache.attend(turned, begins, sizes, 1, settled=True)
        assert torch.equal(out, whole[newest]), f"{left} tokens from the end"


def last_rows_alone_and_together(lengths, heads, kv_heads, dim, most, device, codes=False):
    """The last rows of sequences, all at once and one after the other, and as the whole sequences give them."""
    q, k, v, starts = packed(lengths, heads, kv_heads, dim, torch.bfloat16, device)
    cache = Cache(lengths, kv_heads, dim, torch.bfloat16, device, 64, codes)
    cache.store(k, v, starts)
    whole = attention(q, *(cache.values(lengths) if codes else (k, v)), starts=starts)
    rows, first = [min(n, most) for n in lengths], starts.tolist()
    index = [torch.arange(end - n, end, device=device) for end, n in zip(first[1:], rows, strict=True)]
    together = cache.attend(q[torch.cat(index)], starts_of(rows, device), lengths, most)
    assert torch.equal(together, whole[torch.cat(index)])
    pages = cache.pages
    for s in {0, min(1, len(lengths) - 1), len(lengths) // 2, len(lengths) - 1}:
        cache.pages = pages[s : s + 1]
        one = cache.attend(q[index[s]], starts_of(rows[s : s + 1], device), lengths[s : s + 1], most)
        assert torch.equal(one, whole[index[s]]), f"sequence {s} of {lengths[s]} keys"


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "most"), [(32, 16, 64, 1), (16, 16, 96, 40), (63, 9, 128, 9)])
@pytest.mark.parametrize("codes", [False, True])
def test_unequal_sequences(codes, heads, kv_heads, dim, most, device):
    """Spans of one chunk, of several and of all: chunks are folded by one block, by a second kernel, or by both."""
    lengths = [3, 511, 512, 513, 1030, 1537]
    if device.type == "cuda":
        lengths += [5000, 20000, 1024, 33 * 512 + 1]
    else:
        heads, kv_heads = heads // kv_heads, 1
    last_rows_alone_and_together(lengths, heads, kv_heads, dim, most, device, codes)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (28, 4, 128), (8, 4, 64), (12, 4, 96)])
@pytest.mark.parametrize("codes", [False, True])
def test_few_sequences(codes, heads, kv_heads, dim, device):
    """One to nine chunks each, with far fewer units than multiprocessors, or more."""
    heads, kv_heads = (heads, kv_heads) if device.type == "cuda" else (heads // kv_heads, 1)
    for lengths in ([513], [1030], [3, 3500, 512], [4000, 1, 700], [4096], [4500], [600] * 40):
        last_rows_alone_and_together(lengths, heads, kv_heads, dim, 1, device, codes)


def test_many_sequences(device):
    """More than a block of the decoding kernel has threads: a thread counts the units of several."""
    lengths = [1 + i * 7 % 45 for i in range(1100)]
    lengths[500], lengths[1099] = 3000 if device.type == "cuda" else 600, 700
    last_rows_alone_and_together(lengths, 4, 2, 64, 1, device)


@pytest.mark.parametrize("codes", [False, True])
def test_many_short_sequences(codes, device):
    """Of four chunks at most, as many as the decoding kernel has blocks and more: a block has a whole one, or two."""
    count = 300 if device.type == "cuda" else 20
    for most, tokens in ((1900, count // 2), (1000, count)):
        lengths = [1 + i * 97 % most for i in range(tokens - 1)] + [most]
        last_rows_alone_and_together(lengths, 4, 2, 64, 1, device, codes)


def test_codes_in_pieces(device):
    q, k, v, _ = packed(LENGTHS, 7, 1, 64, torch.bfloat16, device)
    whole = in_pieces(q, k, v, LENGTHS, [700], 16, codes=True)
    assert whole.isfinite().all()
    for page_size, cuts in ((64, [1] * 10 + [69] * 10), (128, [513, 187])):
        assert torch.equal(in_pieces(q, k, v, LENGTHS, cuts, page_size, codes=True), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours(dtype, device):
    """Order, number and content of the other sequences."""
    skip_what_cuda_lacks(device, dtype, 64)
    q, k, v, starts = packed([300, 40, 300], 6, 2, 64, dtype, device)
    first = [x[:300].clone() for x in (q, k, v)]
    expected = attention(*first, starts=starts_of([300], device))
    whole = attention(q, k, v, starts=starts)
    assert torch.equal(whole[:300], expected)
    turned = [torch.cat((x[300:], x[:300])) for x in (q, k, v)]
    assert torch.equal(attention(*turned, starts=starts_of([40, 300, 300], device))[-300:], expected)
    batch = [x[None].expand(5, -1, -1, -1) for x in first]
    assert all(torch.equal(out, expected) for out in attention(*batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads(dtype, device):
    """A query head's bits are its own: with others that share its keys or without."""
    skip_what_cuda_lacks(device, dtype, 64)
    q, k, v, starts = packed([700, 33], 8, 2, 64, dtype, device)
    whole = attention(q, k, v, starts=starts)
    for head in (0, 3, 4, 7):
        shared = head // 4
        one = attention(q[:, head : head + 1], k[:, shared : shared + 1], v[:, shared : shared + 1], starts=starts)
        assert torch.equal(one[:, 0], whole[:, head])


@pytest.mark.parametrize(("causal", "block"), MASKS)
def test_masks(causal, block, device):
    """With every mask sequences are computed alike wherever they stand, and over pages: their last rows or all."""
    lengths, options = [129, 513, 31], {"causal": causal, "block": block}
    q, k, v, starts = packed(lengths, 7, 1, 64, torch.bfloat16, device)
    out, lse = attention(q, k, v, starts=starts, **options, return_lse=True)
    middle = [x[129:642] for x in (q, k, v)]
    one, one_lse = attention(*middle, starts=starts_of([513], device), **options, return_lse=True)
    assert torch.equal(out[129:642], one)
    assert torch.equal(lse[:, 129:642], one_lse)
    cache = Cache(lengths, 1, 64, torch.bfloat16, device, 64)
    cache.store(k, v, starts)
    for most in (1, 9, 31, 513):
        rows = [min(n, most) for n in lengths]
        index = [torch.arange(end - n, end, device=device) for end, n in zip(starts.tolist()[1:], rows, strict=True)]
        over = cache.attend(q[torch.cat(index)], starts_of(rows, device), lengths, most, **options)
        assert torch.equal(over, out[torch.cat(index)]), f"{most} rows of a sequence"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_block_is_no_mask(dtype, device):
    """Bits of a mask that hides nothing, and of a block that is the whole of a sequence."""
    skip_what_cuda_lacks(device, dtype)
    q, k, v, starts = packed([300, 5, 129], 4, 2, 64, dtype, device)
    whole = attention(q, k, v, starts=starts, causal=False)
    for block in (300, 512, 2**30):
        assert torch.equal(attention(q, k, v, starts=starts, block=block), whole)
    assert torch.equal(attention(q, k, v, starts=starts, block=1), attention(q, k, v, starts=starts))
