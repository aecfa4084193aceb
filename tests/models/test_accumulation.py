"""add_to_grad in a decoder: embedding, head and layers add to the sums of the micro-batches before."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eightfold.models import Decoder, DecoderConfig
from eightfold.models.embedding import embedding
from eightfold.models.head import token_log_probs, token_loss

DTYPES = [torch.bfloat16, torch.float32]


class Made(TorchDispatchMode):
    """How many tensors of a shape were made."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.shape == self.shape and out.data_ptr() not in given:
            self.count += 1
        return out


def batches_of_ids(device, sizes, vocabulary):
    """Some tokens often, some never."""
    return [torch.randint(vocabulary, size, device=device) // 3 for size in sizes]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 264])
def test_embedding_has_the_bits_of_autograd(device, width, dtype, ids_dtype):
    rows = 300
    ours, theirs = (torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(2))
    for number, ids in enumerate(batches_of_ids(device, [(2, 9), (1, 1), (3, 60), (1, 299), (3, 120)], rows)):
        ids = ids.to(ids_dtype)
        dy = torch.randn(*ids.shape, width, device=device).to(dtype)
        F.embedding(ids, theirs).backward(dy)
        out = embedding(ids, ours, add_to_grad=True)
        assert torch.equal(out, ours[ids.long()])
        with Made(ours.shape) as made:
            out.backward(dy)
        assert torch.equal(ours.grad, theirs.grad)
        # The first gradient is the sum; and as many tokens as rows are no few rows.
        assert made.count == 0 or number in (0, 4)
    before = ours.grad.clone()
    (whole,) = torch.autograd.grad(embedding(ids, ours, add_to_grad=True), ours, dy)
    (wanted,) = torch.autograd.grad(F.embedding(ids, theirs), theirs, dy)
    assert torch.equal(whole, wanted)
    assert torch.equal(ours.grad, before)


def loss_of(hidden, weight, labels, scale, **options):
    """Times a power of two: its product with a gradient is exact."""
    return token_loss(hidden, weight, labels, 16, **options)[0] * scale


def log_probs_of(hidden, weight, labels, scale, **options):
    temperatures = torch.full(labels.shape, 0.5, device=labels.device)
    return token_log_probs(hidden, weight, labels, temperatures, 16, **options).sum() * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [loss_of, log_probs_of])
def test_head_adds_to_the_sum(device, function, dtype):
    weight, wide = torch.randn(320, 64, device=device).bfloat16(), None
    ours, wide = weight.to(dtype).requires_grad_(), weight.float().requires_grad_()
    total = None
    for count in (40, 16, 0, 33):
        hidden = torch.randn(count, 64, device=device).bfloat16().requires_grad_()
        labels = torch.randint(320, (count,), device=device)
        (once,) = torch.autograd.grad(function(hidden, wide, labels, 0.25, add_to_grad=True), wide)
        total = once.to(dtype) if total is None else (total.float() + once).to(dtype)
        function(hidden, ours, labels, 0.25, add_to_grad=True).backward()
        if dtype == torch.bfloat16 and function is loss_of:
            assert torch.equal(ours.grad, total)
        else:  # by the chunk, or all chunks in one product: another order of sums in float32, which few roundings see
            off = float((ours.grad.float() - total.float()).norm() / total.float().norm())
            rounded = 2e-4 if device.type == "cpu" else 4e-3  # by cuBLAS before it is added, too
            assert off < (rounded if dtype == torch.bfloat16 else 1e-6)
    before = ours.grad.clone()
    hidden = torch.randn(20, 64, device=device).bfloat16().requires_grad_()
    loss = function(hidden, ours, labels[:20], 0.25, add_to_grad=True)
    loss.backward(inputs=[hidden])
    assert torch.equal(ours.grad, before)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoder(device, dtype, tied, again):
    """Three micro-batches with and without: float32 sums differ by the order in which the head adds its chunks."""
    config = DecoderConfig("llama", 320, 128, 160, 2, 2, 1, 64, tie_word_embeddings=tied)
    torch.manual_seed(3)
    plain = Decoder(config, "fp8", again).to(device, dtype)
    ours = Decoder(config, "fp8", again).to(device, dtype)
    ours.load_state_dict(plain.state_dict())
    ours.compute.add_to_grad = True
    starts = torch.tensor([0, 20, 45], dtype=torch.int32, device=device)
    rows, temperatures = torch.arange(5, 40, device=device), torch.ones(35, device=device)
    for step in range(3):
        ids, labels = (torch.randint(320, (1, 45), device=device) for _ in range(2))
        for model in (plain, ours):
            if step == 1:
                model.token_log_probs(ids[0], starts, 25, rows, labels[0, :35], temperatures).sum().backward()
            else:
                model.loss(ids, labels, reduction="sum").backward()
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert float((a.grad - b.grad).float().norm() / a.grad.float().norm()) < limit, name
        assert dtype == torch.float32 or a.ndim == 1 or not torch.equal(a.grad, b.grad) or "embed" in name, name
