"""AdamW with 8-bit states and CAME with an 8-bit first moment, multi-tensor.

AdamW reads parameter, gradient, two codes and their metadata, and writes parameter, two codes, metadata: 10.2 bytes a
parameter with bf16 parameters and gradients, 16.2 with fp32. CAME's means and its clipping need the gradient three
times and the moment twice: 13 and 23 bytes. Vectors have float32 states. Each set is timed on the device alone and,
"wall", from the host's call to the end of the work.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import eightfold.optim

from .common import Bench, Case, Run, relative_error

Shapes = Sequence[tuple[int, ...]]
LLAMA_1B = [(2048, 2048)] * 88 + [(5632, 2048)] * 66 + [(32000, 2048)] * 2
LAYER_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
LLAMA_7B = [(32000, 4096)] * 2 + LAYER_7B * 32 + [(4096,)]
CPU_SET = [(576, 576)] * 8 + [(1536, 576)] * 6
QUEUE_CYCLES = 20_000_000  # 11 ms: more than these optimizers' host time
LIBRARIES = {
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit"),
    "torchao AdamWFp8": ("torchao.optim", "AdamWFp8"),
    "came_pytorch CAME": ("came_pytorch", "CAME"),
}


Peer = Callable[[list[torch.nn.Parameter]], dict[str, Run]]


@dataclass
class Ours:
    """An optimizer of this package; bytes of a step a parameter of a matrix and of a vector, by the dtype's size."""

    op: str
    make: Callable[..., torch.optim.Optimizer]
    matrix_bytes: Callable[[int], float]
    vector_bytes: Callable[[int], float]
    exact: Callable[..., torch.optim.Optimizer]  # the same with float32 states


ADAMW = Ours(
    "adamw_dre",
    eightfold.optim.AdamW,
    lambda size: 3 * size + 4 + 2 * 2 * 5 / 128,
    lambda size: 3 * size + 16 + (8 if size == 2 else 0),
    torch.optim.AdamW,
)
CAME = Ours(
    "came8bit",
    eightfold.optim.CAME8bit,
    lambda size: 5 * size + 3,
    lambda size: 4 * size + 20,
    partial(eightfold.optim.CAME8bit, quantize_above=1 << 40),
)


def run(bench: Bench) -> None:
    if bench.device.type == "cpu":
        for ours in (ADAMW, CAME):
            for dtype in (torch.bfloat16, torch.float32):
                _add(bench, ours, CPU_SET, dtype, [_torch_fused(dtype)])
        return
    libraries = [_library(name) for name in LIBRARIES if "Adam" in name]
    _add(
        bench, ADAMW, LLAMA_1B, torch.bfloat16, [_torch_fused(torch.bfloat16), _torch_fused(torch.float32), *libraries]
    )
    _add(bench, ADAMW, LLAMA_1B, torch.float32, [_torch_fused(torch.float32), *libraries])
    for dtype in (torch.bfloat16, torch.float32):
        _add(bench, CAME, LLAMA_1B, dtype, [_torch_fused(dtype), _library("came_pytorch CAME")])
    # All peers' states at once would not fit beside 7B parameters and gradients.
    for peer in (_torch_fused(torch.bfloat16), _library("bitsandbytes AdamW8bit")):
        _add(bench, ADAMW, LLAMA_7B, torch.bfloat16, [peer])
    _add(bench, CAME, LLAMA_7B, torch.bfloat16, [_torch_fused(torch.bfloat16)])


def _add(bench: Bench, ours: Ours, shapes: Shapes, dtype: torch.dtype, peers: list[Peer]) -> None:
    matrices = sum(math.prod(s) for s in shapes if len(s) > 1)
    vectors = sum(math.prod(s) for s in shapes if len(s) == 1)
    parameters = _parameters(shapes, dtype, bench.device)
    step = ours.make(parameters, lr=1e-4).step
    runs = {name: step for peer in peers for name, step in peer(parameters).items()}
    ops: dict[str, Callable[[Run], Run]] = {ours.op: lambda step: step}
    if bench.device.type == "cuda":
        ops[f"{ours.op} wall"] = _from_idle
    for op, wrap in ops.items():
        bench.add(
            Case(
                op,
                f"{len(shapes)} tensors {(matrices + vectors) / 1e9:.2f} G {_short(dtype)}",
                ours=wrap(step),
                error=lambda: _error(ours, bench.device),
                tolerance=0.05,
                bytes=matrices * ours.matrix_bytes(dtype.itemsize) + vectors * ours.vector_bytes(dtype.itemsize),
                peers={name: wrap(step) for name, step in runs.items()},
                graph=False,
                queue_cycles=QUEUE_CYCLES,
            )
        )


def _from_idle(step: Run) -> Run:
    """With an idle device the time between events is that from the call to the end of its work."""

    def run():
        torch.cuda.synchronize()
        step()

    return run


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(0, 0.02))
        parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3)
        parameters.append(parameter)
    return parameters


def _torch_fused(dtype: torch.dtype) -> Peer:
    """torch's fused AdamW, whose states have the parameters' dtype: on these parameters or on copies of ``dtype``."""

    def make(parameters):
        if parameters[0].dtype != dtype:
            parameters = _parameters([p.shape for p in parameters], dtype, parameters[0].device)
        return {f"torch AdamW fused {_short(dtype)}": torch.optim.AdamW(parameters, lr=1e-4, fused=True).step}

    return make


def _library(name: str) -> Peer:
    def make(parameters):
        module, optimizer = LIBRARIES[name]
        try:
            return {name: getattr(importlib.import_module(module), optimizer)(parameters, lr=1e-4).step}
        except (ImportError, AttributeError):
            print(f"  peer {name} is not installed")
            return {}

    return make


def _error(ours: Ours, device: torch.device) -> float:
    """Distance of 20 steps' total update from that with float32 states, relative to that update."""
    updates = []
    for make in (ours.make, ours.exact):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(256, 512, device=device))
        start = parameter.detach().clone()
        optimizer = make([parameter], lr=1e-3)
        for _ in range(20):
            parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        updates.append(parameter.detach() - start)
    return relative_error(*updates)
