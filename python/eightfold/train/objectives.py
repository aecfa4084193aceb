"""What a step of training minimises: the next token's negative log likelihood, or that of masked tokens.

An objective makes a batch of a step's sequences; the batch gives the loss of any of them, summed, and what the sum over
all is divided by, so that losses do not depend on how processes and passes share the batch.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eightfold.train.config import TrainConfig
from eightfold.train.data import Sequences
from eightfold.train.diffusion import BlockDiffusion, MaskedDiffusion


class Batch(Protocol):
    """The sequences of one step of all processes."""

    targets: int  # what the sum of all losses is divided by, at least 1

    def loss(self, model: nn.Module, places: list[int], device: torch.device) -> Tensor:
        """Summed loss (fp32 scalar, nats) of the sequences at ``places`` in the batch."""
        ...


class Objective(Protocol):
    def batch(self, sequences: Sequences, indices: list[int], step: int | None) -> Batch:
        """The batch of ``sequences[indices]`` at a step; None: of an evaluation, which is the same at every step."""
        ...


class NextToken:
    """Negative log likelihood of the next token."""

    def batch(self, sequences: Sequences, indices: list[int], step: int | None) -> "NextTokenBatch":
        return NextTokenBatch(sequences, indices, max(1, sequences.targets(indices)))


@dataclass(frozen=True)
class NextTokenBatch:
    sequences: Sequences
    indices: list[int]
    targets: int

    def loss(self, model: nn.Module, places: list[int], device: torch.device) -> Tensor:
        part = [self.indices[place] for place in places]
        return model.loss(*self.sequences.batch(part, device), reduction="sum")


def make_objective(config: TrainConfig, model: nn.Module, tokenizer: Any) -> Objective:
    """The objective that ``config`` names. One of diffusion makes of ``model`` a diffusion model: its ``config`` gets
    the mask token, the attention and the shift, which a saved folder then holds.

    ValueError naming the key when no mask token is known, or the model does not fit the objective.
    """
    if config.objective == "next-token":
        if model.config.attention_block != 1:
            raise ValueError(
                "objective=next-token: the model's attention is not causal "
                f"(attention_block {model.config.attention_block}): it would see what it is to predict"
            )
        return NextToken()
    options = config.diffusion
    mask = mask_token_id(options.mask_token, model.config, tokenizer)
    shifted = options.shifted
    if shifted is None:
        was_diffusion = model.config.mask_token_id is not None
        shifted = model.config.shifted_logits if was_diffusion else config.model.init == "pretrained"
    block = options.block if config.objective == "block-diffusion" else 0
    model.config = dataclasses.replace(model.config, mask_token_id=mask, shifted_logits=shifted, attention_block=block)
    kind = BlockDiffusion if block else MaskedDiffusion
    return kind(options, mask, shifted, config.seed)


def mask_token_id(name: str | int | None, config: Any, tokenizer: Any) -> int:
    """The id of the token that ``name`` is (an id, or a token of the tokenizer); None: what the DecoderConfig
    ``config``, else the tokenizer, says."""
    found = name
    if isinstance(name, str):
        found = tokenizer.get_vocab().get(name) if tokenizer is not None else None
        if found is None:
            raise ValueError(f"diffusion.mask_token: {name!r} is no token of the model's tokenizer")
    if found is None:
        found = config.mask_token_id
    if found is None:
        found = getattr(tokenizer, "mask_token_id", None)
    if found is None:
        raise ValueError(
            "diffusion.mask_token: the model has no mask token; name a token that its text never holds, "
            "for example a reserved one"
        )
    if not 0 <= found < config.vocab_size:
        raise ValueError(f"diffusion.mask_token: expected an id from 0 to {config.vocab_size - 1}, got {found}")
    return found
