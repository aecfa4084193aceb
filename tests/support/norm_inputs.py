"""Rows to normalise, some with outliers."""

import torch

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float32]


def data(rows, cols, dtype, device, outliers=True):
    x = torch.randn(rows, cols, device=device)
    if outliers and x.numel():
        x *= torch.rand(rows, 1, device=device) * 4
        x[:, cols // 2] *= 30
    return x.to(dtype), (torch.rand(cols, device=device) + 0.5)
