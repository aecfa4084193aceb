"""AdamW with 8-bit states, multi-tensor. Floor: 10.2 (bf16 parameters and gradients) or 16.2 bytes a parameter.

Read: parameter, gradient, two codes and their metadata; written: parameter, two codes, metadata. Vectors have float32
states. Each set is timed on the device alone and, "wall", from the host's call to the end of the work.
"""

import importlib
import math

import torch

import eightfold.optim

from .common import Bench, Case, relative_error

LLAMA_1B = [(2048, 2048)] * 88 + [(5632, 2048)] * 66 + [(32000, 2048)] * 2
LAYER_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
LLAMA_7B = [(32000, 4096)] * 2 + LAYER_7B * 32 + [(4096,)]
CPU_SET = [(576, 576)] * 8 + [(1536, 576)] * 6
QUEUE_CYCLES = 20_000_000  # 11 ms: more than any of these optimizers' host time
LIBRARIES = {
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit"),
    "torchao AdamWFp8": ("torchao.optim", "AdamWFp8"),
}


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for dtype in (torch.bfloat16, torch.float32):
        _add(bench, LLAMA_1B if cuda else CPU_SET, dtype, everyone=True)
    if cuda:  # the peers' states would not fit beside these, torch's bf16 ones excepted
        _add(bench, LLAMA_7B, torch.bfloat16, everyone=False)


def _add(bench: Bench, shapes: list[tuple[int, ...]], dtype: torch.dtype, everyone: bool) -> None:
    size = dtype.itemsize
    eight_bit = sum(math.prod(s) for s in shapes if len(s) > 1)
    plain = sum(math.prod(s) for s in shapes if len(s) == 1)
    parameters = _parameters(shapes, dtype, bench.device)
    runs = {"ours": eightfold.optim.AdamW(parameters, lr=1e-4).step}
    name = f"torch AdamW fused {_short(dtype)}"
    runs[name] = torch.optim.AdamW(parameters, lr=1e-4, fused=True).step
    if everyone and dtype == torch.bfloat16:
        others = _parameters(shapes, torch.float32, bench.device)
        runs["torch AdamW fused float32"] = torch.optim.AdamW(others, lr=1e-4, fused=True).step
    if everyone and bench.device.type == "cuda":
        runs |= _library_peers(parameters)
    for op, wrap in (("adamw_dre", lambda step: step), ("adamw_dre wall", _wall)):
        timed = {peer: wrap(step) for peer, step in runs.items()}
        bench.add(
            Case(
                op,
                f"{len(shapes)} tensors {(eight_bit + plain) / 1e9:.2f} G {_short(dtype)}",
                ours=timed.pop("ours"),
                error=lambda: _error(bench.device),
                tolerance=0.05,
                bytes=eight_bit * (3 * size + 4 + 2 * 2 * 5 / 128) + plain * (3 * size + 16 + (8 if size == 2 else 0)),
                peers=timed,
                queue_cycles=QUEUE_CYCLES,
            )
        )
        if bench.device.type == "cpu":
            return


def _wall(step):
    """With an idle device the time between events is that from the call to the end of its work."""

    def run():
        torch.cuda.synchronize()
        step()

    return run


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(shapes, dtype, device):
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(0, 0.02))
        parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3)
        parameters.append(parameter)
    return parameters


def _library_peers(parameters) -> dict:
    peers = {}
    for name, (module, optimizer) in LIBRARIES.items():
        try:
            peers[name] = getattr(importlib.import_module(module), optimizer)(parameters, lr=1e-4).step
        except (ImportError, AttributeError):
            print(f"  peer {name} is not installed")
    return peers


def _error(device) -> float:
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
