"""Completions packed for a pass of training."""

import torch

from eightfold.generate.requests import Completion
from eightfold.models import Decoder, DecoderConfig
from eightfold.train.rl.batches import Sample, pack, parts


def samples(counts):
    made = []
    for prompt, drawn in counts:
        tokens = torch.randint(320, (prompt + drawn,)).tolist()
        completion = Completion(tokens[prompt:], [-1.0] * drawn, "length")
        made.append(Sample(tokens[:prompt], completion, 0.7, 1.0))
    return made


def test_filling_changes_no_bit(device):
    """Of log-probabilities; of gradients only what the scale of the last group of 128 tokens changes."""
    torch.manual_seed(4)
    model = Decoder(DecoderConfig("llama", 320, 128, 256, 2, 2, 1, 64, initializer_range=0.2), precision="fp8")
    model.to(device)
    asked = samples([(5, 40), (17, 3), (1, 90)])
    found, grads = [], []
    for multiple in (1, 128):
        model.zero_grad()
        packed = pack(asked, device, multiple)
        assert packed.ids.numel() == packed.starts[-1]
        assert packed.ids.numel() == (153 if multiple == 1 else 256)
        out = packed.log_probs(model)
        out.sum().backward()
        found.append(out.detach())
        grads.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(*found)
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()
    assert pack(asked[:1], device, 44).starts.tolist() == [0, 44]
    assert pack(asked[:1], device, 43).longest == 44


def test_parts_hold_what_fits():
    asked = samples([(5, 6), (5, 6), (50, 6), (1, 2)])
    assert [len(part) for part in parts(asked, 20)] == [2, 1, 1]
    assert [len(part) for part in parts(asked, 1000)] == [4]
