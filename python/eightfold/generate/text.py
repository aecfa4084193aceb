"""Autoregressive sampling with a KV cache: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eightfold.models.decoder import Decoder
from eightfold.ops import sample


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn.

    temperature: 0 takes the most likely token; else logits are divided by it. top_k: keep the k most likely (0: all).
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p (1: all), after top_k.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")


def next_token(
    logits: torch.Tensor, options: SamplingOptions, seeds: torch.Tensor, positions: torch.Tensor | int
) -> torch.Tensor:
    """Token ids int64 [B] drawn from logits [B, V] with the random numbers of each row's seed at its position."""
    return sample(logits.float(), seeds, positions, options.temperature, options.top_k, options.top_p)


def check_causal(model: Decoder) -> None:
    """ValueError for a diffusion language model, which does not write one token after the other."""
    block = model.config.attention_block
    if block != 1:
        raise ValueError(
            f"model: expected a causal one, got a diffusion language model (attention_block {block}): use "
            "DiffusionGenerator, or --diffusion on the command line"
        )


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: torch.Tensor,
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
    on_token: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Continues prompts of one length: int64 [B, T + n], n <= max_new_tokens, the prompt included.

    A row ends at its first token in `stop_ids` (which is kept) and is filled with that token while other rows go on;
    `on_token` is called with each step's ids [B], on the CPU. Row i draws with the seed `seed` + i (None: a random one
    instead of `seed`), each token by its place in the row: repeatable, whatever rows stand beside it (`ops.sample`).
    Raises ValueError naming the argument, RuntimeError if the model gives NaN.
    """
    check_causal(model)
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt: expected ids [B, T] with T > 0, got {tuple(prompt.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
    options = options or SamplingOptions()
    first_seed = int(torch.randint(2**62, ())) if seed is None else seed
    seeds = first_seed + torch.arange(prompt.shape[0], device=prompt.device)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=prompt.device)
    ids = prompt.long()
    cache = model.new_cache(ids.shape[0], ids.shape[1] + max_new_tokens)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    step = ids
    with model.compute.constant_weights():
        for _ in range(max_new_tokens):
            token = next_token(model(step, cache=cache, last_only=True)[:, 0], options, seeds, ids.shape[1])
            if bool((token < 0).any()):
                raise RuntimeError("generate: the model gave NaN logits")
            step = torch.where(ended, ids[:, -1], token)[:, None]
            ids = torch.cat((ids, step), dim=1)
            if on_token is not None:
                on_token(step[:, 0].cpu())
            ended = ended | torch.isin(step[:, 0], stops)
            if len(stops) and bool(ended.all()):
                break
    return ids
