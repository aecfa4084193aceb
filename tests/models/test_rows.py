"""A token's bits in FP8: the same packed with others, token by token over pages, and in pieces of any size."""

import pytest
import torch

from eightfold.models import Decoder, DecoderConfig
from eightfold.models.attention import Paged, PagedCache
from eightfold.models.head import row_logits, token_log_probs, token_loss

LENGTHS = [5, 150, 17, 1, 64]
PAGE = 16


MODELS = [("llama", 64), ("qwen2", 64), ("qwen3", 64)]  # with the size of a head


@pytest.fixture(params=MODELS, ids=str)
def model(request, device):
    torch.manual_seed(2)
    kind, head_dim = request.param
    config = DecoderConfig(kind, 320, 192, 384, 2, 3, 1, head_dim, initializer_range=0.2)
    return Decoder(config, precision="fp8").to(device)


@pytest.fixture
def packed(model):
    starts = torch.tensor([0, *LENGTHS], dtype=torch.int32, device=model.device).cumsum(0, dtype=torch.int32)
    return torch.randint(0, 320, (sum(LENGTHS),), device=model.device), starts


@pytest.mark.parametrize("model", [*MODELS, ("qwen3", 128)], ids=str, indirect=True)  # of 128: codes from attention
def test_over_pages_in_pieces_of_any_size(model, packed):
    ids, starts = packed
    expected = model.packed_hidden(ids, starts, max(LENGTHS))
    assert expected.requires_grad
    most = -(-max(LENGTHS) // PAGE)
    pages = torch.randperm(len(LENGTHS) * most, device=model.device, dtype=torch.int32).view(-1, most)
    begins = starts.tolist()
    for piece in (1, 7, 200):
        cache = PagedCache(model.config, pages.numel(), PAGE, torch.bfloat16, model.device)
        found = torch.full_like(expected, float("nan"))
        for at in range(0, max(LENGTHS), piece):
            parts = [(s, at, min(at + piece, n)) for s, n in enumerate(LENGTHS) if n > at]
            rows = torch.tensor([begins[s] + i for s, a, b in parts for i in range(a, b)], device=model.device)
            places = torch.tensor([i for _, a, b in parts for i in range(a, b)], device=model.device)
            owners = torch.tensor([s for s, a, b in parts for _ in range(a, b)], device=model.device)
            slots = pages[owners, places // PAGE].long() * PAGE + places % PAGE
            counts = torch.tensor([0] + [b - a for _, a, b in parts], device=model.device)
            attend = Paged(
                cache,
                pages[[s for s, _, _ in parts]].contiguous(),
                counts.cumsum(0).int(),
                torch.tensor([b for *_, b in parts], dtype=torch.int32, device=model.device),
                slots,
                piece,
            )
            with torch.no_grad():
                found[rows] = model.rows_hidden(ids[rows], places, attend)
        assert torch.equal(found, expected.detach()), piece


def test_in_any_packing_and_batch(model, packed):
    ids, starts = packed
    with torch.no_grad():
        expected = model.packed_hidden(ids, starts, max(LENGTHS))
        for s, count in enumerate(LENGTHS):
            part = slice(int(starts[s]), int(starts[s]) + count)
            alone = torch.tensor([0, count], dtype=torch.int32, device=model.device)
            assert torch.equal(model.packed_hidden(ids[part], alone, count), expected[part])
        assert model.packed_hidden(ids[:0], alone * 0, 0).shape == (0, 192)


def test_log_probs_and_their_gradients(model, packed):
    """Against log_softmax of all logits in fp32; chunks change no bit."""
    ids, starts = packed
    rows = torch.arange(0, len(ids), 3, device=model.device)
    labels, temperatures = ids.roll(-1)[rows], torch.rand(len(rows), device=model.device) + 0.5
    upstream = torch.randn(len(rows), device=model.device)
    found, grads = [], []
    for chunk in (10, 10_000):
        model.zero_grad()
        out = model.token_log_probs(ids, starts, max(LENGTHS), rows, labels, temperatures, chunk)
        (out * upstream).sum().backward()
        found.append(out.detach())
        grads.append(model.lm_head.weight.grad.clone())
    assert torch.equal(*found)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    hidden = model.packed_hidden(ids, starts, max(LENGTHS))[rows].detach().float().requires_grad_()
    weight = model.lm_head.weight.detach().bfloat16().float().requires_grad_()
    logits = hidden @ weight.t() / temperatures[:, None]
    exact = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(found[0], exact.detach(), rtol=1e-4, atol=1e-4)
    (exact * upstream).sum().backward()
    assert (grads[0] - weight.grad).norm() < 6e-3 * weight.grad.norm()
    model.compute.fp8_head = True
    model.zero_grad()
    out = model.token_log_probs(ids, starts, max(LENGTHS), rows, labels, temperatures, 10)
    (out * upstream).sum().backward()
    assert 1e-3 < (out.detach() - exact.detach()).abs().max() < 0.5
    assert (model.lm_head.weight.grad - weight.grad).norm() < 0.1 * weight.grad.norm()
    with pytest.raises(ValueError, match="rows, labels, temperatures: expected one shape"):
        model.token_log_probs(ids, starts, max(LENGTHS), rows, labels[1:], temperatures)


def test_gradients_of_a_head_in_fp8(device):
    """As far from those of the exact products as two roundings to E4M3 take them, whatever a chunk holds."""
    count, width, vocabulary = 700, 144, 336
    hidden = torch.randn(count, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / 12).bfloat16().requires_grad_()
    codes = torch.ops.eightfold.quantize(weight.detach(), [128, 128])
    labels = torch.randint(vocabulary, (count,), device=device)
    upstream = torch.randn(count, device=device)
    logits = row_logits(hidden.detach(), codes).double()
    error = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0) - logits.softmax(-1)
    error *= upstream[:, None]
    wanted = error @ weight.double(), error.t() @ hidden.double()

    def log_probs(chunk):
        out = token_log_probs(hidden, weight, labels, torch.ones_like(upstream), chunk, codes)
        return (out * upstream).sum()

    def loss(chunk):
        return -token_loss(hidden, weight, labels, chunk, upstream, codes)[0]

    for function in (log_probs, loss):
        for chunk in (50, 128, 256, 300, 700):
            grads = torch.autograd.grad(function(chunk), (hidden, weight))
            for grad, want in zip(grads, wanted, strict=True):
                assert 0.01 < (grad.double() - want).norm() / want.norm() < 0.05
            assert torch.equal(*torch.autograd.grad(function(chunk), hidden), grads[0])


@pytest.mark.parametrize("chunk", [100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_a_head_in_fp8_are_added(dtype, chunk, device):
    """To a sum so far, by the product itself: of up to 384 tokens, where a chunk ends where groups of columns do."""
    count, width, vocabulary = 700, 96, 336
    hidden = torch.randn(count, width, device=device).bfloat16()
    weight = torch.nn.Parameter((torch.randn(vocabulary, width, device=device) / 12).to(dtype))
    codes = torch.ops.eightfold.quantize(weight.detach(), [128, 128])
    labels = torch.randint(vocabulary, (count,), device=device)
    options = labels, torch.ones(count, device=device), chunk, codes

    def backward(add_to_grad):
        token_log_probs(hidden, weight, *options, add_to_grad).sum().backward()
        return weight.grad.clone()

    alone = backward(False)
    sums = [backward(add) for add in (False, True, True)]
    for times, found in zip((2, 3, 4), sums, strict=True):
        off = (found.float() - times * alone.float()).norm() / (times * alone.float()).norm()
        assert off < (1e-2 if dtype == torch.bfloat16 else 1e-6)
