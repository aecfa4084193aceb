"""The policy objective against a token-by-token computation in Python numbers, its gradients, and its limits."""

import dataclasses
import itertools
import math

import pytest
import torch

from eightfold.train.rl.meters import TokenMeters
from eightfold.train.rl.objective import (
    CorrectionOptions,
    ObjectiveOptions,
    PolicyBatch,
    loss_denominator,
    policy_loss,
)

LENGTHS = (3, 0, 4, 1, 2)


def numbers(seed=0, dtype=torch.float64):
    """Log-probs of 10 tokens in 5 sequences, one of them empty and one wholly masked."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, scale=0.4: (torch.randn(n, generator=generator, dtype=torch.float64) * scale).to(dtype)  # noqa: E731
    tokens = sum(LENGTHS)
    logp = (-draw(tokens, 1.0).abs() - 0.1).to(dtype)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    mask = torch.tensor([True, True, False, True, True, True, True, False, True, True])
    batch = PolicyBatch(
        starts=starts,
        mask=mask,
        advantages=torch.tensor([1.5, 3.0, -0.7, 2.0, -1.1], dtype=dtype),
        old_logp=logp + draw(tokens),
        rollout_logp=logp + draw(tokens),
        reference_logp=logp + draw(tokens),
        entropy=draw(tokens).abs(),
    )
    return logp.requires_grad_(), batch


def by_hand(logp, batch, options):
    """The loss in Python floats, one token at a time."""
    parts = []
    starts = batch.starts.tolist()
    for sequence, (begin, end) in enumerate(itertools.pairwise(starts)):
        advantage = batch.advantages[sequence].item()
        losses = []
        for t in range(begin, end):
            if not batch.mask[t]:
                continue
            ratio = math.exp(logp[t].item() - batch.old_logp[t].item())
            clipped = min(max(ratio, 1 - options.clip_low), 1 + options.clip_high)
            weight = math.exp(batch.old_logp[t].item() - batch.rollout_logp[t].item())
            correction = options.correction
            if correction.kind == "none":
                weight = 1.0
            elif correction.kind == "truncate":
                weight = min(weight, correction.cap)
            elif not correction.floor <= weight <= correction.cap:
                weight = 0.0
            inverse = math.exp(batch.reference_logp[t].item() - logp[t].item())
            kl = inverse - math.log(inverse) - 1
            losses.append(-weight * min(ratio * advantage, clipped * advantage) + options.kl_coefficient * kl)
        if losses:
            parts.append(losses)
    if options.aggregation == "token_mean":
        return sum(map(sum, parts)) / sum(map(len, parts))
    if options.aggregation == "sequence_mean":
        return sum(sum(part) / len(part) for part in parts) / len(parts)
    return sum(sum(part) / options.constant_length for part in parts) / len(parts)


@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
def test_against_numbers_by_hand(aggregation, correction):
    options = ObjectiveOptions(
        clip_low=0.1,
        clip_high=0.25,
        kl_coefficient=0.3,
        aggregation=aggregation,
        constant_length=7 if aggregation == "constant_length" else None,
        correction=CorrectionOptions(correction, cap=1.2, floor=0.8 if correction == "mask" else 0.0),
    )
    for seed in range(5):
        logp, batch = numbers(seed)
        loss, _ = policy_loss(logp, batch, options)
        assert loss.item() == pytest.approx(by_hand(logp, batch, options), rel=1e-12)
        assert torch.autograd.gradcheck(lambda x, batch=batch: policy_loss(x, batch, options)[0], logp)


def test_single_precision_is_close_to_double():
    options = ObjectiveOptions(kl_coefficient=0.1, correction=CorrectionOptions("truncate"))
    logp, batch = numbers(dtype=torch.float32)
    loss, _ = policy_loss(logp, batch, options)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(logp, batch, options), rel=1e-5)


def test_gradient_of_the_first_pass_is_the_policy_gradient():
    """With the log-probs as their own old ones every ratio is 1, and d loss / d logp = -A / tokens."""
    logp, batch = numbers()
    batch = dataclasses.replace(batch, old_logp=None)
    loss, meters = policy_loss(logp, batch)
    loss.backward()
    expected = -batch.spread(batch.advantages) * batch.mask / batch.mask.sum()
    assert torch.allclose(logp.grad, expected, rtol=1e-14, atol=0)
    assert meters.means()["clip_fraction"] == 0


def test_clipped_tokens_have_no_gradient():
    """Of ratios 0.5, 1 and 2 with A > 0 the last is clipped, with A < 0 the first."""
    logp = torch.tensor([0.5, 1.0, 2.0] * 2, dtype=torch.float64).log().requires_grad_()
    batch = PolicyBatch(
        starts=torch.tensor([0, 3, 6]),
        mask=torch.ones(6, dtype=torch.bool),
        advantages=torch.tensor([1.0, -1.0]),
        old_logp=torch.zeros(6, dtype=torch.float64),
    )
    loss, meters = policy_loss(logp, batch, ObjectiveOptions(clip_low=0.2, clip_high=0.3))
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([-0.5 / 6, -1 / 6, 0, 0, 1 / 6, 2 / 6])
    assert loss.item() == pytest.approx((-0.5 - 1 - 1.3 + 0.8 + 1 + 2) / 6)
    means = meters.means()
    assert (means["clip_low"], means["clip_high"]) == (1 / 6, 1 / 6)
    # clip-higher: a higher bound lets the token of ratio 2 move again
    logp.grad = None
    policy_loss(logp, batch, ObjectiveOptions(clip_high=1.5))[0].backward()
    assert logp.grad[2].item() == pytest.approx(-2 / 6)


def test_only_logp_is_differentiated():
    logp, batch = numbers()
    others = {
        name: getattr(batch, name).clone().requires_grad_()
        for name in ("advantages", "old_logp", "rollout_logp", "reference_logp", "entropy")
    }
    options = ObjectiveOptions(kl_coefficient=0.1, correction=CorrectionOptions("truncate"))
    loss, meters = policy_loss(logp, dataclasses.replace(batch, **others), options)
    loss.backward()
    assert logp.grad is not None
    assert all(value.grad is None for value in others.values())
    assert not any(value.requires_grad for value in vars(meters).values() if torch.is_tensor(value))


def test_truncated_weight_is_a_constant_for_the_gradient():
    logp = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    batch = PolicyBatch(
        starts=torch.tensor([0, 2]),
        mask=torch.ones(2, dtype=torch.bool),
        advantages=torch.ones(1),
        rollout_logp=-torch.tensor([5.0, 1.5], dtype=torch.float64).log(),
    )
    loss, meters = policy_loss(logp, batch, ObjectiveOptions(correction=CorrectionOptions("truncate")))
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([-2 / 2, -1.5 / 2])
    assert meters.means()["correction_clipped"] == 0.5
    logp.grad = None
    policy_loss(logp, batch, ObjectiveOptions(correction=CorrectionOptions("mask")))[0].backward()
    assert logp.grad.tolist() == pytest.approx([0, -1.5 / 2])


def test_huge_log_ratios_stay_finite():
    logp = torch.tensor([-1e4, 0.0], requires_grad=True)
    batch = PolicyBatch(
        starts=torch.tensor([0, 2]),
        mask=torch.ones(2, dtype=torch.bool),
        advantages=-torch.ones(1),
        old_logp=torch.tensor([0.0, -1e4]),
        rollout_logp=torch.tensor([-1e4, 0.0]),
        reference_logp=torch.tensor([0.0, -1e4]),
    )
    options = ObjectiveOptions(kl_coefficient=1.0, correction=CorrectionOptions("truncate"))
    loss, _ = policy_loss(logp, batch, options)
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_masked_tokens_are_never_read(rubbish):
    options = ObjectiveOptions(kl_coefficient=0.1, correction=CorrectionOptions("truncate"))
    logp, batch = numbers()
    loss, meters = policy_loss(logp, batch, options)
    loss.backward()
    fill = lambda values: values.detach().masked_fill(~batch.mask, rubbish)  # noqa: E731
    names = ("old_logp", "rollout_logp", "reference_logp", "entropy")
    advantages = batch.advantages.clone()
    advantages[[1, 3]] = rubbish  # of the empty and of the wholly masked sequence
    other = dataclasses.replace(batch, advantages=advantages, **{name: fill(getattr(batch, name)) for name in names})
    again = fill(logp).requires_grad_()
    repeated, same_meters = policy_loss(again, other, options)
    repeated.backward()
    assert repeated == loss
    assert torch.equal(again.grad, logp.grad)
    assert (logp.grad[~batch.mask] == 0).all()
    assert same_meters.means() == meters.means()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_nothing_that_counts(aggregation):
    logp, batch = numbers()
    batch = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    loss, meters = policy_loss(logp, batch, ObjectiveOptions(aggregation=aggregation))
    loss.backward()
    assert loss.item() == 0
    assert (logp.grad == 0).all()
    assert meters.means() == {}


def test_no_tokens_at_all():
    logp = torch.empty(0, requires_grad=True)
    batch = PolicyBatch(
        torch.tensor([0]), torch.empty(0, dtype=torch.bool), torch.empty(0), rollout_logp=torch.empty(0)
    )
    loss, meters = policy_loss(logp, batch)
    loss.backward()
    assert loss.item() == 0
    assert meters.means() == {}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
def test_parts_add_up_to_the_whole(aggregation):
    """Two micro-batches under the step's denominator: the loss, the gradient and the meters of the whole."""
    length = 7 if aggregation == "constant_length" else None
    options = ObjectiveOptions(kl_coefficient=0.2, aggregation=aggregation, constant_length=length)
    logp, batch = numbers()
    whole, meters = policy_loss(logp, batch, options)
    whole.backward()
    logp_again = logp.detach().clone().requires_grad_()
    parts = []
    for sequences, tokens in ((slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 10))):
        starts = batch.starts[sequences.start : sequences.stop + 1]
        names = ("mask", "old_logp", "rollout_logp", "reference_logp", "entropy")
        cut = {name: getattr(batch, name)[tokens] for name in names}
        part = PolicyBatch(starts=starts - starts[0], advantages=batch.advantages[sequences], **cut)
        parts.append((tokens, part))
    denominator = sum(loss_denominator(part, options) for _, part in parts)
    assert denominator == loss_denominator(batch, options)
    total, merged = 0.0, TokenMeters()
    for tokens, part in parts:
        loss, found = policy_loss(logp_again[tokens], part, options, denominator)
        loss.backward()
        total += loss.item()
        merged = merged + found
    assert total == pytest.approx(whole.item(), rel=1e-14)
    assert torch.allclose(logp_again.grad, logp.grad, rtol=1e-13, atol=0)
    assert merged.means() == pytest.approx(meters.means(), rel=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": torch.tensor([0, 4, 3, 10])}, r"starts: expected 0 to 10 .*not falling, got \[0, 4, 3, 10\]"),
        ({"starts": torch.tensor([0, 9])}, r"starts: expected 0 to 10"),
        ({"starts": torch.tensor([0.0, 10.0])}, r"starts: expected int64 \[sequences \+ 1\], got torch.float32"),
        ({"mask": torch.ones(10)}, r"mask: expected bool \[tokens\], got torch.float32 \(10,\)"),
        ({"advantages": torch.ones(4)}, r"advantages: expected floating point \[5\], got torch.float32 \(4,\)"),
        ({"old_logp": torch.ones(9)}, r"old_logp: expected float32 or float64 \[10\], got torch.float32 \(9,\)"),
        ({"entropy": torch.ones(10).bfloat16()}, r"entropy: expected float32 or float64 .* got torch.bfloat16"),
    ],
)
def test_bad_batch(changes, message):
    _, batch = numbers()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(batch, **changes)


def test_bad_arguments():
    logp, batch = numbers()
    with pytest.raises(ValueError, match=r"logp: expected float32 or float64 \[10\], got torch.bfloat16 \(10,\)"):
        policy_loss(logp.bfloat16(), batch)
    without = dataclasses.replace(batch, rollout_logp=None, reference_logp=None)
    with pytest.raises(ValueError, match=r"rollout_logp: needed, as correction\.kind is truncate"):
        policy_loss(logp, without, ObjectiveOptions(correction=CorrectionOptions("truncate")))
    with pytest.raises(ValueError, match=r"reference_logp: needed, as kl_coefficient is 0\.1"):
        policy_loss(logp, without, ObjectiveOptions(kl_coefficient=0.1))
    with pytest.raises(ValueError, match="denominator: expected 0 or more, got -1"):
        policy_loss(logp, batch, denominator=-1)


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (ObjectiveOptions, {"clip_low": 1.5}, "clip_low: expected 0 to 1, got 1.5"),
        (ObjectiveOptions, {"clip_high": math.nan}, "clip_high: expected 0 or more, got nan"),
        (ObjectiveOptions, {"kl_coefficient": -1}, "kl_coefficient: expected 0 or more, got -1"),
        (ObjectiveOptions, {"aggregation": "mean"}, "aggregation: expected one of token_mean, .* got 'mean'"),
        (ObjectiveOptions, {"aggregation": "constant_length"}, "constant_length: expected a number of tokens"),
        (ObjectiveOptions, {"constant_length": 3}, "constant_length: expected none unless aggregation"),
        (CorrectionOptions, {"kind": "clip"}, "kind: expected one of none, truncate, mask, got 'clip'"),
        (CorrectionOptions, {"cap": 0}, "cap: expected more than 0, got 0"),
        (CorrectionOptions, {"kind": "mask", "floor": 3}, r"floor: expected 0 to cap=2.0, got 3"),
        (CorrectionOptions, {"kind": "truncate", "floor": 0.5}, "floor: expected 0 unless kind is mask, got 0.5"),
    ],
)
def test_bad_options(options, values, message):
    with pytest.raises(ValueError, match=message):
        options(**values)
