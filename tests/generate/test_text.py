import pytest
import torch

from eightfold.generate import SamplingOptions, generate
from eightfold.generate.requests import RolloutOptions
from eightfold.generate.rollout import Rollout
from eightfold.generate.text import next_token
from eightfold.models import Decoder, DecoderConfig


@pytest.fixture
def model(device):
    torch.manual_seed(3)
    config = DecoderConfig("llama", 64, 32, 64, 2, 4, 2, 16, initializer_range=0.3)
    return Decoder(config, precision="fp32").to(device)


@pytest.fixture
def prompt(device):
    return torch.randint(0, 64, (3, 5)).to(device)


@torch.no_grad()
def test_greedy_equals_recomputing_everything(model, prompt):
    expected = prompt
    for _ in range(12):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, prompt, 12), expected)
    assert torch.equal(generate(model, prompt, 12, SamplingOptions(temperature=1.0, top_k=1)), expected)
    assert torch.equal(generate(model, prompt, 12, SamplingOptions(temperature=1.0, top_p=1e-6)), expected)
    assert torch.equal(generate(model, prompt, 0), prompt)


def test_seed_repeats_the_draw(model, prompt):
    options = SamplingOptions(temperature=1.5)
    first = generate(model, prompt, 16, options, seed=1)
    assert torch.equal(generate(model, prompt, 16, options, seed=1), first)
    assert not torch.equal(generate(model, prompt, 16, options, seed=2), first)


def test_a_row_draws_by_its_own_seed(model, prompt):
    """Rows of one prompt differ; each is what its seed draws alone."""
    options = SamplingOptions(temperature=1.5, top_k=40, top_p=0.95)
    together = generate(model, prompt[:1].expand(4, 5), 8, options, seed=11)
    assert len(together.unique(dim=0)) == 4
    for i in range(4):
        assert torch.equal(generate(model, prompt[:1], 8, options, seed=11 + i), together[i : i + 1])


def test_nan_logits_are_an_error(model, prompt):
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(RuntimeError, match="generate: the model gave NaN logits"):
        generate(model, prompt, 2)


def test_stop_ids_end_rows_one_by_one(model, prompt):
    free = generate(model, prompt, 12)
    stop = free[0, 8].item()
    seen = []
    out = generate(model, prompt, 12, stop_ids=[stop], on_token=lambda ids: seen.append(ids))
    for row, unstopped in zip(out, free, strict=True):
        new = unstopped[5:].tolist()
        end = 5 + (new.index(stop) + 1 if stop in new else len(new))
        assert row[:end].tolist() == unstopped[:end].tolist()
        assert row[end:].tolist() == [stop] * (out.shape[1] - end)
    assert torch.equal(torch.stack(seen, dim=1), out[:, 5:].cpu())
    assert generate(model, prompt[:1], 12, stop_ids=[stop]).shape[1] <= 9


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SamplingOptions(temperature=1.0), [0.1, 0.4, 0.2, 0.3]),
        (SamplingOptions(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (SamplingOptions(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (SamplingOptions(temperature=1.0, top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (SamplingOptions(temperature=1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (SamplingOptions(temperature=1.0, top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
        (SamplingOptions(temperature=0.0), [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_draws_follow_the_truncated_distribution(options, expected, device):
    n = 20000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().to(device).expand(n, 4)
    draws = next_token(logits, options, torch.arange(n, device=device), 0)
    share = torch.bincount(draws.cpu(), minlength=4) / n
    torch.testing.assert_close(share, torch.tensor(expected, dtype=share.dtype), rtol=0, atol=0.015)
    assert all(share[i] == 0 for i, p in enumerate(expected) if p == 0)


def test_errors_name_the_argument(model, prompt):
    with pytest.raises(ValueError, match=r"prompt: expected ids \[B, T\] with T > 0, got \(5,\)"):
        generate(model, prompt[0], 1)
    with pytest.raises(ValueError, match="max_new_tokens: expected 0 or more, got -1"):
        generate(model, prompt, -1)
    with pytest.raises(ValueError, match="temperature: expected 0 or more, got -1"):
        SamplingOptions(temperature=-1)
    with pytest.raises(ValueError, match="temperature: expected 0 or more, got nan"):
        SamplingOptions(temperature=float("nan"))
    with pytest.raises(ValueError, match="top_k: expected 0 or more, got -2"):
        SamplingOptions(top_k=-2)
    with pytest.raises(ValueError, match="top_p: expected 0 < top_p <= 1, got 0"):
        SamplingOptions(top_p=0)


def test_a_diffusion_model_is_refused():
    config = DecoderConfig("llada", 64, 32, 64, 1, 2, 2, 16, mask_token_id=63)
    diffusion = Decoder(config, precision="fp32")
    with pytest.raises(ValueError, match=r"model: expected a causal one, got a diffusion .* \(attention_block 0\)"):
        generate(diffusion, torch.ones(1, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="model: expected a causal one"):
        Rollout(diffusion, RolloutOptions(pages=4, page_size=16))
