"""FP8 GEMM with few rows, as decoding has it: one CUDA graph of calls whose weights take turns, so that none is in L2.

Floor: the weights' bytes at copy bandwidth.
"""

import torch

from .common import Bench, Case, Run, relative_error, replayed
from .gemm import bind, exact, forward_peers

ops = torch.ops.eightfold
SHAPES = (  # outputs x inputs
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (4608, 3584),
    (37888, 3584),
    (7168, 16384),
    (24576, 1536),
)
ROWS = (1, 8, 16, 32, 64, 128)
BYTES_BETWEEN = 300 << 20  # of weights before the same come again: six times the L2 cache
LEAST_CALLS = 100  # in a graph, whose own start is a few microseconds
CPU_SHAPES = ((576, 576), (1536, 576))


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for n, k in SHAPES if cuda else CPU_SHAPES:
        copies = max(2, -(-BYTES_BETWEEN // (n * k))) if cuda else 2
        weights = [torch.randn(n, k, device=bench.device, dtype=torch.bfloat16) for _ in range(copies)]
        quantized = [ops.quantize(w, (128, 128)) for w in weights]
        for m in ROWS:
            x = torch.randn(m, k, device=bench.device, dtype=torch.bfloat16)
            bench.add(_case(x, weights, quantized))


def _case(x: torch.Tensor, weights: list[torch.Tensor], quantized: list) -> Case:
    (m, k), n = x.shape, weights[0].shape[0]
    a = ops.quantize(x, (1, 128))
    calls = max(LEAST_CALLS, len(weights)) if x.is_cuda else len(weights)

    def in_turn(runs: list[Run]) -> Run:
        return replayed([runs[i % len(runs)] for i in range(calls)])

    ours = [bind(ops.fp8_gemm, *a, *b, 128, None, torch.bfloat16) for b in quantized]
    if x.is_cuda:
        everyone = [forward_peers(x, w, a, b) for w, b in zip(weights, quantized, strict=True)]
        peers = {name: [one[name] for one in everyone] for name in everyone[0]}
    else:
        peers = {"torch fp32": [bind(torch.mm, x.float(), w.float().t()) for w in weights]}
    return Case(
        "fp8_gemm few rows",
        f"{m}x{n}x{k}",
        ours=in_turn(ours),
        error=lambda: relative_error(ours[0](), exact(a, quantized[0], (128, 128))),
        tolerance=1.75e-3,
        bytes=n * k + m * k + 2 * m * n,
        peers={name: in_turn(runs) for name, runs in peers.items() if _runs(runs[0], name)},
        calls=calls,
        graph=False,
    )


def _runs(call: Run, name: str) -> bool:
    """A peer that fails here would spoil the capture."""
    try:
        call()
    except Exception as reason:
        print(f"  peer {name} left out: {str(reason).splitlines()[0][:90]}")
        return False
    return True
