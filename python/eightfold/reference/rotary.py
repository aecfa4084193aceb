"""Rotary position embedding in plain torch (RoFormer, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotates the halves of each head of ``x`` [batch, tokens, heads, dim] by the angles of ``cos`` and ``sin``.

    These are float32 [batch or 1, tokens, 1, dim / 2]. In float32, each operation rounded, the result rounded once to
    x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    sin = -sin if inverse else sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
