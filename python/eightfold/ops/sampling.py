"""Tokens drawn from logits: temperature, top-k and top-p a row, with random numbers that belong to the row.

Gumbel-max over the kept tokens: a token depends on its own logits, seed, position and options, never on the batch it is
drawn in. CPU and CUDA draw the same tokens of the same logits.
"""

import torch
from torch import Tensor

from eightfold.ops import _library

_sample = _library.direct("sample")


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor | int,
    temperatures: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
) -> Tensor:
    """One token id a row, int64 [rows]. A number stands for a tensor that holds it in every row.

    Args:
        logits: float32 [rows, vocabulary], last dimension contiguous, any row stride, up to 2^22 columns.
        seeds: int64 [rows], the row's own.
        positions: int64 [rows] or a number: which of a seed's random numbers are taken, e.g. the token's place in its
            text. The same seed and position twice give the same noise.
        temperatures: float32 [rows] or a number, from 0 on; 0 takes the most likely token, the lowest index of several.
        top_k: int32 [rows] or a number: keep the k most likely tokens, at equal logits the lowest indices (0: all).
        top_p: float32 [rows] or a number, 0 < top_p <= 1: after top_k, keep the fewest most likely tokens whose
            probability reaches top_p (1: all).

    A row that holds a NaN, or whose options are out of range, gives -1. Infinite logits are the most likely tokens.
    Raises RuntimeError for other dtypes, shapes, layouts or devices.
    """

    def of_rows(value, dtype):
        return value if isinstance(value, Tensor) else logits.new_full(logits.shape[:1], value, dtype=dtype)

    options = of_rows(temperatures, torch.float32), of_rows(top_k, torch.int32), of_rows(top_p, torch.float32)
    return _sample(logits, seeds, of_rows(positions, torch.int64), *options)


@torch.library.register_fake("eightfold::sample")
def _(logits, seeds, positions, temperatures, top_k, top_p):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
