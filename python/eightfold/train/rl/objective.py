"""The clipped policy objective over packed completions, with a KL term and a correction for foreign rollouts.

A token of advantage A and ratio r = p / p_old contributes ``-w min(r A, clip(r, 1 - low, 1 + high) A) + c KL``:
- low and high are apart, so that unlikely tokens can grow (clip-higher, DAPO, arXiv 2503.14476, section 3.1);
- w = min(p_old / p_rollout, cap) where another engine did the rollout (truncated importance sampling), a constant
  for the gradient; p_old is the trainer's own probability before the step;
- KL = q/p - log(q/p) - 1 with q the reference's probability (k3; GRPO, arXiv 2402.03300, equation 4).
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from eightfold.train.rl.meters import TokenMeters
from eightfold.train.rl.options import require, require_choice, require_finite

# Log ratios beyond this are no information, and their exponential would overflow what it is multiplied into.
LARGEST_LOG_RATIO = 20.0

Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]
CorrectionKind = Literal["none", "truncate", "mask"]


@dataclass(frozen=True)
class CorrectionOptions:
    """What is done about a rollout whose probabilities differ from the trainer's, per token.

    kind: "none"; "truncate", the ratio p_old / p_rollout as weight, at most ``cap`` (TIS); "mask", the ratio as weight
    inside [floor, cap] and 0 outside (IcePop's band with floor > 0).
    """

    kind: CorrectionKind = "none"
    cap: float = 2.0
    floor: float = 0.0

    def __post_init__(self):
        require_choice("kind", self.kind, get_args(CorrectionKind))
        require_finite("cap", self.cap)
        require(self.cap > 0, "cap", "more than 0", self.cap)
        require(0 <= self.floor <= self.cap, "floor", f"0 to cap={self.cap}", self.floor)
        require(self.kind == "mask" or self.floor == 0, "floor", "0 unless kind is mask", self.floor)


@dataclass(frozen=True)
class ObjectiveOptions:
    """clip_low, clip_high: how far the ratio may fall and rise before a token's gradient ends. kl_coefficient: weight
    of the KL to a reference, 0: none.

    aggregation: how tokens become one number: "token_mean" over all tokens of the step (DAPO); "sequence_mean" of each
    sequence's mean (GRPO); "constant_length", each sequence's sum over ``constant_length``, mean over sequences
    (Dr. GRPO). Sequences without a token that counts are left out.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    aggregation: Aggregation = "token_mean"
    constant_length: int | None = None
    correction: CorrectionOptions = field(default_factory=CorrectionOptions)

    def __post_init__(self):
        require(0 <= self.clip_low <= 1, "clip_low", "0 to 1", self.clip_low)
        require(self.clip_high >= 0, "clip_high", "0 or more", self.clip_high)
        require_finite("kl_coefficient", self.kl_coefficient)
        require(self.kl_coefficient >= 0, "kl_coefficient", "0 or more", self.kl_coefficient)
        require_choice("aggregation", self.aggregation, get_args(Aggregation))
        if self.aggregation == "constant_length":
            length = self.constant_length
            require(
                length is not None and length > 0,
                "constant_length",
                "a number of tokens, as aggregation is constant_length",
                length,
            )
        else:
            require(
                self.constant_length is None,
                "constant_length",
                "none unless aggregation is constant_length",
                self.constant_length,
            )


@dataclass(frozen=True)
class PolicyBatch:
    """Completions of ``sequences`` samples laid end to end in [tokens], all on one device.

    starts: int64 [sequences + 1], from 0 to tokens, not falling. mask: bool [tokens], the tokens that count.
    advantages: float [sequences]. The rest float32 or float64 [tokens] or None:
    old_logp: the trainer's log-probs before the step (None: this pass is the first since, so they are its own);
    rollout_logp: those the sampler saw; reference_logp: a frozen model's; entropy: estimates of it.
    """

    starts: Tensor
    mask: Tensor
    advantages: Tensor
    old_logp: Tensor | None = None
    rollout_logp: Tensor | None = None
    reference_logp: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self):
        if self.mask.dtype != torch.bool or self.mask.dim() != 1:
            raise ValueError(f"mask: expected bool [tokens], got {self.mask.dtype} {tuple(self.mask.shape)}")
        tokens = len(self.mask)
        if self.starts.dtype != torch.int64 or self.starts.dim() != 1 or len(self.starts) == 0:
            raise ValueError(
                f"starts: expected int64 [sequences + 1], got {self.starts.dtype} {tuple(self.starts.shape)}"
            )
        found = self.starts.tolist()
        if found[0] != 0 or found[-1] != tokens or found != sorted(found):
            raise ValueError(f"starts: expected 0 to {tokens} (the tokens of mask), not falling, got {found}")
        count = len(found) - 1
        if not self.advantages.is_floating_point() or self.advantages.shape != (count,):
            raise ValueError(
                f"advantages: expected floating point [{count}], got {self.advantages.dtype} "
                f"{tuple(self.advantages.shape)}"
            )
        for name in ("old_logp", "rollout_logp", "reference_logp", "entropy"):
            if (value := getattr(self, name)) is not None:
                _check_tokens(value, name, tokens)

    def counts(self) -> Tensor:
        """How many tokens of each sequence count, int64 [sequences]."""
        before = torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))
        return before[self.starts[1:]] - before[self.starts[:-1]]

    def spread(self, values: Tensor) -> Tensor:
        """Of [sequences] the value of each token's sequence, [tokens]."""
        return values.repeat_interleave(self.starts.diff(), output_size=len(self.mask))


def loss_denominator(batch: PolicyBatch, options: ObjectiveOptions) -> float:
    """What the sum over ``batch`` is divided by. For a step in several parts (micro-batches, processes) the sum of
    theirs is the denominator of each part's ``policy_loss``: the parts' losses then add up to that of the whole."""
    counts = batch.counts()
    if options.aggregation == "token_mean":
        return float(counts.sum())
    return float((counts > 0).sum() * (options.constant_length or 1))


def policy_loss(
    logp: Tensor, batch: PolicyBatch, options: ObjectiveOptions | None = None, denominator: float | None = None
) -> tuple[Tensor, TokenMeters]:
    """The loss (0-d, of ``logp``'s dtype) of log-probs ``logp`` float32 or float64 [tokens], and its meters.

    Only ``logp`` is differentiated. What stands at tokens that do not count is never read: their gradient is 0 even
    where a log-prob is infinite or NaN. With no token that counts the loss is 0. ``denominator``: see
    ``loss_denominator``; that of ``batch`` alone where it is left out.
    """
    options = options or ObjectiveOptions()
    _check_tokens(logp, "logp", len(batch.mask))
    if options.correction.kind != "none" and batch.rollout_logp is None:
        raise ValueError(f"rollout_logp: needed, as correction.kind is {options.correction.kind}")
    if options.kl_coefficient and batch.reference_logp is None:
        raise ValueError(f"reference_logp: needed, as kl_coefficient is {options.kl_coefficient}")
    if denominator is None:
        denominator = loss_denominator(batch, options)
    elif not denominator >= 0:
        raise ValueError(f"denominator: expected 0 or more, got {denominator}")

    def counted(values: Tensor) -> Tensor:
        return torch.where(batch.mask, values, torch.zeros_like(values))

    logp = counted(logp)
    old = logp.detach() if batch.old_logp is None else counted(batch.old_logp.detach()).to(logp.dtype)
    advantages = counted(batch.spread(batch.advantages.detach().to(logp.dtype)))
    ratio = _exp(logp - old)
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    sums = {
        "tokens": batch.mask,
        "clipped_low": batch.mask & (ratio < 1 - options.clip_low) & (advantages < 0),
        "clipped_high": batch.mask & (ratio > 1 + options.clip_high) & (advantages > 0),
    }
    if batch.rollout_logp is not None:
        delta = old - counted(batch.rollout_logp.detach()).to(logp.dtype)
        weights, outside = _correction(_exp(delta), options.correction)
        losses = losses * weights
        far = delta.double().abs()
        sums |= {
            "rollout_tokens": batch.mask,
            "delta": far,
            "rollout_kl": torch.expm1(delta.double()) - delta.double(),
            "probability_error": counted(far.exp()),
            "corrected": batch.mask & outside,
        }
    if batch.reference_logp is not None:
        log_ratio = (counted(batch.reference_logp.detach()).to(logp.dtype) - logp).clamp(
            -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO
        )
        divergence = torch.expm1(log_ratio) - log_ratio
        if options.kl_coefficient:
            losses = losses + options.kl_coefficient * divergence
        sums |= {"reference_tokens": batch.mask, "reference_kl": divergence.detach()}
    if batch.entropy is not None:
        sums |= {"entropy_tokens": batch.mask, "entropy": counted(batch.entropy.detach())}
    loss = (counted(losses) * _token_weights(batch, options, logp.dtype)).sum() / max(denominator, 1.0)
    found = {name: values.sum(dtype=torch.float64) for name, values in sums.items()}
    if batch.rollout_logp is not None and len(batch.mask):
        found["delta_max"] = far.max()
    return loss, TokenMeters(**found)


def _token_weights(batch: PolicyBatch, options: ObjectiveOptions, dtype: torch.dtype) -> Tensor:
    """Weight of each token before the division by the denominator, [tokens]."""
    if options.aggregation == "sequence_mean":
        return batch.spread(1 / batch.counts().clamp(min=1).to(dtype))
    return torch.ones_like(batch.mask, dtype=dtype)


def _correction(ratio: Tensor, options: CorrectionOptions) -> tuple[Tensor, Tensor]:
    """Weights [tokens], and which ratios were cut off or masked, bool [tokens]."""
    if options.kind == "truncate":
        return ratio.clamp(max=options.cap), ratio > options.cap
    if options.kind == "mask":
        outside = (ratio < options.floor) | (ratio > options.cap)
        return torch.where(outside, torch.zeros_like(ratio), ratio), outside
    return torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def _check_tokens(values: Tensor, name: str, tokens: int) -> None:
    if values.dtype not in (torch.float32, torch.float64) or values.shape != (tokens,):
        raise ValueError(f"{name}: expected float32 or float64 [{tokens}], got {values.dtype} {tuple(values.shape)}")
