"""AdamW with 8-bit states, multi-tensor. Floor: 10.2 (bf16 parameters and gradients) or 16.2 bytes a parameter.

Read: parameter, gradient, two codes and their metadata; written: parameter, two codes, metadata.
"""

import torch

import eightfold.optim

from .common import Bench, Case, relative_error

LLAMA_1B = [(2048, 2048)] * 88 + [(5632, 2048)] * 66 + [(32000, 2048)] * 2
CPU_SET = [(576, 576)] * 8 + [(1536, 576)] * 6


def run(bench: Bench) -> None:
    shapes = LLAMA_1B if bench.device.type == "cuda" else CPU_SET
    for dtype in (torch.bfloat16, torch.float32):
        size = 2 if dtype == torch.bfloat16 else 4
        numel = sum(rows * cols for rows, cols in shapes)
        parameters = _parameters(shapes, dtype, bench.device)
        ours = eightfold.optim.AdamW(parameters, lr=1e-4)
        ours.step()
        peers = {"torch AdamW fused": _torch_step(parameters, fused=True)}
        peers |= _library_peers(parameters) if bench.device.type == "cuda" else {}
        bench.add(
            Case(
                "adamw_dre",
                f"{len(shapes)} tensors {numel / 1e9:.2f} G {str(dtype)[6:]}",
                ours=ours.step,
                error=lambda dtype=dtype: _error(dtype, bench.device),
                tolerance=0.05,
                bytes=numel * (3 * size + 4 + 2 * 2 * 5 / 128),
                peers=peers,
                queue_cycles=20_000_000,  # 11 ms: more than these optimizers' host time
            )
        )


def _parameters(shapes, dtype, device):
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-3
        parameters.append(parameter)
    return parameters


def _torch_step(parameters, **options):
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, **options)
    return optimizer.step


def _library_peers(parameters) -> dict:
    peers = {}
    try:
        import bitsandbytes

        peers["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4).step
    except ImportError:
        pass
    return peers


def _error(dtype, device) -> float:
    """Distance of 20 steps' total update from torch's fp32 AdamW, relative to that update."""
    updates = []
    for optimizer_class in (eightfold.optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(256, 512, device=device))
        start = parameter.detach().clone()
        optimizer = optimizer_class([parameter], lr=1e-3)
        for _ in range(20):
            parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        updates.append(parameter.detach() - start)
    return relative_error(*updates)
