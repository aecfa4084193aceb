"""The head of a masked diffusion model's step: token and probability of each row, and what is uncovered.

Floor: the weight's bytes; it is larger than the L2 cache. Peers make logits first: the library's own product and
torch's softmax, torch's product, all of it compiled, and the softmax in float64 as Fast-dLLM has it.
"""

import torch

from eightfold import reference

from .common import Bench, Case, compiled

ops = torch.ops.eightfold
HEADS = ((126464, 4096), (152064, 3584))  # LLaDA-8B, Dream-7B
ROWS = (1, 32, 64, 128, 256)
CPU_HEADS, CPU_ROWS = ((49152, 576),), (8, 32)
BLOCK, MASK = 32, 3


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for vocabulary, size in HEADS if cuda else CPU_HEADS:
        weight = torch.randn(vocabulary, size, device=bench.device, dtype=torch.bfloat16) * size**-0.5
        codes = ops.quantize(weight, (128, 128))
        for rows in ROWS if cuda else CPU_ROWS:
            hidden = torch.randn(rows, size, device=bench.device, dtype=torch.bfloat16) * 3
            for kind, operands in (("bf16", (hidden, None, weight, None)), ("FP8", _codes(hidden, codes))):
                bench.add(_head(kind, operands, _peers(kind, hidden, weight, operands, cuda)))
            if rows % BLOCK == 0:
                bench.add(_selection((hidden, None, weight, None)))
                bench.add(_drawn((hidden, None, weight, None)))


def _codes(hidden, codes):
    return (*ops.quantize(hidden, (1, 128)), *codes)


def _bytes(operands) -> int:
    return operands[2].numel() * operands[2].element_size()


def _shape(operands) -> str:
    return f"{operands[0].shape[0]}x{operands[2].shape[0]}x{operands[2].shape[1]}"


def _error(operands) -> float:
    """The share of other tokens, or the largest relative error of a confidence."""
    some = (operands[0][:4], None if operands[1] is None else operands[1][:4], *operands[2:])
    ids, confidence = ops.lm_head_confidence(*operands)
    expected, exact = reference.lm_head_confidence(*some)
    wrong = float((ids[:4] != expected).double().mean())
    return max(wrong, float(((confidence[:4] - exact) / exact).abs().max()))


def _case(op, operands, ours, **peers) -> Case:
    return Case(op, _shape(operands), ours, lambda: _error(operands), 2e-3, bytes=_bytes(operands), **peers)


def _head(kind, operands, peers) -> Case:
    return _case(f"lm_head_confidence {kind}", operands, lambda: ops.lm_head_confidence(*operands), peers=peers)


def _peers(kind, hidden, weight, operands, cuda):
    def softmax(logits, dtype=torch.float32):
        return logits.to(dtype).softmax(-1).max(-1)

    if kind == "FP8":
        return {"fp8_gemm, softmax": lambda: softmax(ops.fp8_gemm(*operands, 128, None, torch.float32))}
    peers = {
        "gemm, softmax": lambda: softmax(ops.gemm(hidden, weight)),
        "torch": lambda: softmax(hidden @ weight.t()),
        "torch in float64": lambda: softmax(hidden @ weight.t(), torch.float64),
    }
    if cuda:
        peers["torch.compile"] = compiled(lambda h, w: softmax(h @ w.t()), hidden, weight)
    return peers


def _selection(operands) -> Case:
    """What a step does after its last layer: the head, and the tokens it uncovers."""
    rows, device = operands[0].shape[0], operands[0].device
    batch = rows // BLOCK
    tokens = torch.full((batch, 1024), MASK, device=device)
    at, left = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2))
    forbidden = torch.tensor([MASK], device=device)

    def ours():
        ids, confidence = ops.lm_head_confidence(*operands, None, forbidden)
        ids, confidence = ids.view(batch, BLOCK), confidence.view(batch, BLOCK)
        ops.uncover_(tokens, at, ids, confidence, left, MASK, 0.9)

    return _case("head and uncover", operands, ours)


def _drawn(operands) -> Case:
    seeds = torch.arange(operands[0].shape[0], device=operands[0].device)
    temperatures = torch.ones_like(seeds, dtype=torch.float32)
    ours = lambda: ops.lm_head_confidence(*operands, None, None, temperatures, seeds, seeds)  # noqa: E731
    return _case("lm_head_confidence drawn", operands, ours)
