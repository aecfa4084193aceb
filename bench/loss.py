"""Cross-entropy of fp32 logits with its bf16 gradient: plain, and at temperatures times what reaches each row's loss.
Floor: logits read once, gradient written once."""

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

    rows, classes = (1024, 151936) if cuda else (64, 49152)  # as the log-probabilities of a chunk of tokens go back
    logits, upstream = torch.randn(rows, classes, device=bench.device) * 5, torch.randn(rows, device=bench.device)
    labels = torch.randint(classes, (rows,), device=bench.device)
    given = (logits, labels, True, torch.bfloat16, torch.rand(rows, device=bench.device) + 0.5, upstream)
    bench.add(
        Case(
            "cross_entropy backward",
            f"{rows}x{classes}",
            ours=lambda: ops.cross_entropy(*given),
            error=lambda: relative_error(ops.cross_entropy(*given)[1], reference.cross_entropy(*given)[1]),
            tolerance=5e-3,
            bytes=6 * rows * classes,
            peers={"torch.compile": compiled(_plain_backward, logits, labels, *given[4:])} if cuda else {},
        )
    )


def _plain(logits, labels):
    lse = logits.logsumexp(1, keepdim=True)
    chosen = torch.nn.functional.one_hot(labels, logits.shape[1])
    return lse[:, 0] - logits.gather(1, labels[:, None])[:, 0], ((logits - lse).exp() - chosen).to(torch.bfloat16)


def _plain_backward(logits, labels, temperatures, upstream):
    chosen = torch.nn.functional.one_hot(labels, logits.shape[1])
    error = (logits / temperatures[:, None]).softmax(1) - chosen
    return (error * (upstream / temperatures)[:, None]).to(torch.bfloat16)
