"""Completions as the packed sequences that the trainer computes, and as the batch of the objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.generate.requests import Completion
from eightfold.models import Decoder
from eightfold.train.rl.objective import PolicyBatch


@dataclass(frozen=True)
class Sample:
    """A completion of a prompt, at a temperature, with its advantage."""

    prompt: Sequence[int]
    completion: Completion
    temperature: float
    advantage: float

    @property
    def tokens(self) -> int:
        """That a forward pass computes: all but the last one drawn, after which nothing is asked."""
        return len(self.prompt) + len(self.completion.tokens) - 1


@dataclass(frozen=True)
class PackedSamples:
    """Samples one behind the other on a device: what `Decoder.token_log_probs` takes, and the objective's batch."""

    ids: Tensor
    starts: Tensor
    longest: int
    rows: Tensor
    labels: Tensor
    temperatures: Tensor
    batch: PolicyBatch

    def log_probs(self, model: Decoder) -> Tensor:
        """The trainer's log-probability of every token drawn, fp32 [tokens drawn]."""
        return model.token_log_probs(self.ids, self.starts, self.longest, self.rows, self.labels, self.temperatures)


def parts(samples: Sequence[Sample], tokens: int) -> Iterator[list[Sample]]:
    """The samples in order, in parts of at most ``tokens`` tokens each, or of one sample."""
    part: list[Sample] = []
    for sample in samples:
        if part and sum(each.tokens for each in part) + sample.tokens > tokens:
            yield part
            part = []
        part.append(sample)
    if part:
        yield part


def pack(samples: Sequence[Sample], device: torch.device, multiple: int | None = None) -> PackedSamples:
    """One part of a step, filled up to a multiple of so many tokens by a sequence of which nothing is asked; default:
    128 on CUDA, whose FP8 products take the rows beyond a multiple of that by themselves, and 1 elsewhere."""
    ids, starts, rows, labels, temperatures, log_probs, drawn = [], [0], [], [], [], [], [0]
    for sample in samples:
        tokens = [*sample.prompt, *sample.completion.tokens]
        count = len(sample.completion.tokens)
        ids += tokens[:-1]
        starts.append(len(ids))
        rows += range(len(ids) - count, len(ids))
        labels += sample.completion.tokens
        temperatures += [sample.temperature] * count
        log_probs += sample.completion.log_probs
        drawn.append(len(labels))

    longest = max(sample.tokens for sample in samples)
    filling = -len(ids) % ((128 if device.type == "cuda" else 1) if multiple is None else multiple)
    if filling:
        ids += [0] * filling
        starts.append(len(ids))
        longest = max(longest, filling)

    def tensor(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    rollout = tensor(log_probs, torch.float32)
    batch = PolicyBatch(
        starts=tensor(drawn, torch.int64),
        mask=torch.ones(len(labels), dtype=torch.bool, device=device),
        advantages=tensor([sample.advantage for sample in samples], torch.float32),
        rollout_logp=rollout,
        # The sampled estimate, of what drew the tokens: over its own draws, -log p has the entropy as its mean.
        entropy=-rollout,
    )
    return PackedSamples(
        tensor(ids, torch.int64),
        tensor(starts, torch.int32),
        longest,
        tensor(rows, torch.int64),
        tensor(labels, torch.int64),
        tensor(temperatures, torch.float32),
        batch,
    )
