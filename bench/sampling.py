"""Tokens drawn from fp32 logits. Floor: logits read once. Error: the share of tokens that are not the reference's."""

import torch

from eightfold import reference

from .common import Bench, Case, compiled

ops = torch.ops.eightfold
CUTS = {"all": (0, 1.0), "top-k 50": (50, 1.0), "top-p 0.9": (0, 0.9), "top-k 50, top-p 0.9": (50, 0.9)}


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for rows, vocabulary in ((1, 152064), (128, 152064), (256, 32000)) if cuda else ((4, 49152),):
        logits = torch.randn(rows, vocabulary, device=bench.device) * 3
        seeds = torch.arange(rows, device=bench.device)
        for name, (k, p) in CUTS.items():
            top_k, top_p = torch.full_like(seeds, k, dtype=torch.int32), torch.full_like(seeds, p, dtype=torch.float32)
            arguments = (logits, seeds, seeds, torch.ones_like(top_p), top_k, top_p)
            bench.add(
                Case(
                    f"sample {name}",
                    f"{rows}x{vocabulary}",
                    ours=lambda a=arguments: ops.sample(*a),
                    error=lambda a=arguments: float((ops.sample(*a) != reference.sample(*a)).double().mean()),
                    tolerance=0.01,
                    bytes=4 * logits.numel(),
                    peers={"torch.compile": compiled(_plain, logits, k, p)} if cuda else {},
                )
            )


def _plain(logits, top_k, top_p):
    ranked, order = logits.sort(dim=1, descending=True)
    if top_k:
        ranked, order = ranked[:, :top_k], order[:, :top_k]
    probability = ranked.softmax(1)
    probability = probability.masked_fill(probability.cumsum(1) - probability >= top_p, 0)
    noise = torch.empty_like(probability).exponential_()
    return order.gather(1, (probability / noise).argmax(1, keepdim=True))
