"""Masked diffusion and block diffusion: noise for the tokens of a step, and their loss.

Masked diffusion (LLaDA, arXiv 2502.09992, sections 2.1 to 2.3 and algorithms 1 and 2): a sequence draws t uniform in
(0, 1]; each of its tokens is masked with probability p = (1 - eps) t + eps by itself; the loss of a masked token is its
negative log likelihood / p. Pre-training divides the sum by the number of tokens. Fine-tuning masks answers only and
divides each answer's sum by the answer's length, then by the number of answers. Here every document of a packed
sequence that attention keeps apart counts as a sequence, with a t of its own. (LLaDA also cuts 1 % of its sequences to
a random length: packed documents have random lengths already.)

Block diffusion (Fast-dLLM v2, arXiv 2509.26328, section 3; arXiv 2503.09573): each block of a document draws its t; a
model sees [noisy ; clean] and learns the masked tokens of the noisy half from their block and the clean blocks before
it. Each sequence is there twice, with a mask and with its complement, so that every token is learned once, each with
the weight 1.

Shifted logits (Dream, arXiv 2508.15487; Fast-dLLM v2): the row before a token predicts it, so that the weights of a
next-token model go on doing what they did. A document's first token has no such row and is never masked. The row
before a block's first token is read from the clean half: when the block is decoded, the one before it is known.

Noise is a function of seed, step and place in the step's batch, from a counter-based generator: a resumed run draws
what the whole one would have, for any number of processes; an evaluation draws the same each time. Stratified t
(``diffusion.stratified``; the low-discrepancy sampler of Kingma et al., arXiv 2107.00630) are (u + k / n) mod 1, k = 0
to n - 1, dealt out at random: each is uniform, so the expected loss is unchanged, and the mean of their losses varies
less than that of independent ones.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eightfold.train.config import DiffusionConfig
from eightfold.train.data import Sequences, moved
from eightfold.train.order import step_generator

_TRAINING, _EVALUATION = 0, 1


@dataclass(frozen=True)
class Noisy:
    """A step's sequences [count, length] and which of their tokens are masked."""

    ids: Tensor  # int64
    document_ids: Tensor | None
    masked: Tensor  # bool
    maskable: Tensor  # bool
    weights: Tensor  # fp32, of a token's loss
    begins: Tensor  # bool: the row before the token is not of its block (a block's first token)
    targets: int
    mask_id: int
    shifted: bool

    def loss(self, model: nn.Module, places: list[int], device: torch.device) -> Tensor:
        """Summed loss of the sequences at ``places`` by masked diffusion."""
        ids, masked = self.ids[places], self.masked[places]
        rows = masked.flatten().nonzero()[:, 0] - int(self.shifted)
        return model.denoising_loss(
            *(moved(x, device) for x in (ids.masked_fill(masked, self.mask_id), rows, ids[masked])),
            moved(self.weights[places][masked], device),
            self._documents(places, device),
        )

    def _documents(self, places: list[int], device: torch.device) -> Tensor | None:
        return None if self.document_ids is None else moved(self.document_ids[places], device)


class NoisyBlocks(Noisy):
    def loss(self, model: nn.Module, places: list[int], device: torch.device) -> Tensor:
        """Summed loss of the sequences at ``places``, each masked and masked the other way round."""
        twice = [*places, *places]
        first, maskable = self.masked[places], self.maskable[places]
        masked = torch.cat([first, maskable & ~first])
        ids, length = self.ids[twice], self.ids.shape[1]
        row, token = masked.nonzero(as_tuple=True)
        rows = row * 2 * length + token
        if self.shifted:
            rows += torch.where(self.begins[twice][masked], length - 1, -1)
        return model.denoising_loss(
            *(moved(x, device) for x in (ids.masked_fill(masked, self.mask_id), rows, ids[masked])),
            moved(self.weights[twice][masked], device),
            self._documents(twice, device),
            moved(ids, device),
        )


class MaskedDiffusion:
    """LLaDA's loss. ``mask_id``: the token that a masked one becomes; ``shifted``: see above."""

    kind = Noisy

    def __init__(self, options: DiffusionConfig, mask_id: int, shifted: bool, seed: int) -> None:
        self.options, self.mask_id, self.shifted, self.seed = options, mask_id, shifted, seed

    def batch(self, sequences: Sequences, indices: list[int], step: int | None) -> Noisy:
        """``sequences[indices]`` with the noise of a step, or (None) of evaluations."""
        rows = torch.tensor(indices)
        documents = None if sequences.document_ids is None else sequences.document_ids[rows]
        maskable = sequences.counts[rows].numpy()
        starts = document_starts(maskable.shape, documents)
        if self.shifted:
            maskable = maskable & ~starts
        document = numbered(starts)
        begins = self.noise_begins(starts)
        unit = numbered(begins)
        generator = self.generator(step)
        t = noise_levels(generator, unit.max() + 1, self.options.stratified)
        eps = self.options.least_probability
        p = ((1 - eps) * t + eps)[unit]
        masked = maskable & (generator.random(maskable.shape) < p)
        weights, targets = self.token_weights(p), int(maskable.sum())
        if self.options.average == "answers":
            lengths = np.bincount(document[maskable], minlength=document.max() + 1)
            weights, targets = weights / np.maximum(lengths, 1)[document], int((lengths > 0).sum())
        return self.kind(
            sequences.ids[rows].to(torch.int64),
            None if documents is None else documents.to(torch.int64),
            torch.from_numpy(masked),
            torch.from_numpy(maskable),
            torch.from_numpy(weights.astype(np.float32)),
            torch.from_numpy(begins),
            max(1, targets),
            self.mask_id,
            self.shifted,
        )

    def generator(self, step: int | None) -> np.random.Generator:
        return step_generator(self.seed, _EVALUATION if step is None else _TRAINING, step or 0)

    def noise_begins(self, starts: np.ndarray) -> np.ndarray:
        """bool [count, length]: where the tokens of another t begin, given where documents do."""
        return starts

    def token_weights(self, p: np.ndarray) -> np.ndarray:
        """Of masked tokens, given the probability of being so."""
        return 1 / p


class BlockDiffusion(MaskedDiffusion):
    """Fast-dLLM v2's loss, of blocks of ``options.block`` tokens."""

    kind = NoisyBlocks

    def noise_begins(self, starts: np.ndarray) -> np.ndarray:
        index = np.broadcast_to(np.arange(starts.shape[1]), starts.shape)
        place = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        return place % self.options.block == 0

    def token_weights(self, p: np.ndarray) -> np.ndarray:
        return np.ones_like(p)


def document_starts(shape: tuple[int, ...], documents: Tensor | None) -> np.ndarray:
    """bool [count, length]: the first token of each sequence and, in it, of each document."""
    starts = np.zeros(shape, dtype=bool)
    starts[:, 0] = True
    if documents is not None:
        starts[:, 1:] = (documents[:, 1:] != documents[:, :-1]).numpy()
    return starts


def numbered(begins: np.ndarray) -> np.ndarray:
    """The number of each token's run, from 0, through all sequences; ``begins`` is true where one does."""
    return begins.cumsum().reshape(begins.shape) - 1


def noise_levels(generator: np.random.Generator, count: int, stratified: bool) -> np.ndarray:
    """``count`` values of t, each uniform in (0, 1]."""
    if not stratified:
        return 1 - generator.random(count)
    return 1 - (generator.random() + generator.permutation(count) / count) % 1
