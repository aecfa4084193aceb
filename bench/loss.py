"""Cross-entropy of fp32 logits with its bf16 gradient. Floor: logits read once, gradient written once."""

import torch

from eightfold import reference

from .common import Bench, Case, compiled, relative_error

ops = torch.ops.eightfold


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for rows, classes in ((2048, 32000), (1024, 152064)) if cuda else ((64, 49152),):
        logits = torch.randn(rows, classes, device=bench.device) * 5
        labels = torch.randint(classes, (rows,), device=bench.device)
        bench.add(
            Case(
                "cross_entropy training",
                f"{rows}x{classes}",
                ours=lambda x=logits, y=labels: ops.cross_entropy(x, y, True),
                error=lambda x=logits, y=labels: relative_error(
                    ops.cross_entropy(x, y, True)[1], reference.cross_entropy(x, y, True)[1]
                ),
                tolerance=5e-3,
                bytes=6 * rows * classes,
                peers={"torch.compile": compiled(_plain, logits, labels)} if cuda else {},
            )
        )


def _plain(logits, labels):
    lse = logits.logsumexp(1, keepdim=True)
    chosen = torch.nn.functional.one_hot(labels, logits.shape[1])
    return lse[:, 0] - logits.gather(1, labels[:, None])[:, 0], ((logits - lse).exp() - chosen).to(torch.bfloat16)
