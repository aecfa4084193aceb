"""A step of reinforcement learning of a Qwen3-8B-shaped model: rollout, training, handing the weights over; our unified
FP8 flow beside our bf16, on the same prompts, one after the other.

64 completions of 2,048 tokens after 512, each sequence once. Training in bf16 has its layers under torch.compile. Each
mode takes micro-batches as large as fit without computing layers again, or computes them again where one sequence does
not fit.
"""

import gc
import time

import torch

import eightfold.optim
from eightfold.generate.requests import Completion, Request, RolloutOptions
from eightfold.generate.rollout import Rollout
from eightfold.generate.text import SamplingOptions
from eightfold.models.decoder import Decoder
from eightfold.train.rl.batches import Sample, pack

from .common import Bench
from .decode import QWEN3_8B, SMALL, random_decoder

SIZES, CPU_SIZES = (64, 512, 2048), (2, 8, 8)  # sequences, tokens of a prompt and of a completion
# Sequences, and whether layers are computed again.
MICRO_BATCHES = ((4, False), (3, False), (2, False), (1, False), (4, True))
PAGE = 64
SPARE = 1 << 30  # bytes that a micro-batch must leave: one that fits by a hair does not fit again


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    config, sizes = (QWEN3_8B, SIZES) if cuda else (SMALL, CPU_SIZES)
    found = {}
    for name, precision, narrow in (
        ("ours", "fp8", True),
        ("ours, head and cache bf16", "fp8", False),
        ("bf16", "bf16", False),
    ):
        torch.manual_seed(0)
        model = random_decoder(config, bench.device, fp8_head=narrow, fp8_cache=narrow)
        found[name] = _times(model, precision, *sizes, bench.device)
        del model
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    sequences, prompt, completion = sizes
    shape = f"8B {sequences} x ({prompt} + {completion})" if cuda else "small"
    for part in ("rollout", "training", "whole step"):
        runs = {
            name: {"ms": times[part], "tokens_per_second": times["tokens"][part] / times[part] * 1e3}
            for name, times in found.items()
        }
        for name, times in found.items():
            runs[name]["peak_bytes"] = times["peak_bytes"]
        bench.note("step", name=f"RL {part}, {shape}", runs=runs)
    for name, times in found.items():
        print(f"  {name}: weights handed over in {times['hand_over']:.1f} ms; max |delta log p| {times['mismatch']}")


def _times(model: Decoder, precision: str, sequences: int, prompt: int, completion: int, device) -> dict:
    """Milliseconds of each part, of the second of two steps; the first captures and compiles."""
    trained = policy = model
    if precision == "bf16":
        trained, policy = model.in_precision("bf16"), model.in_precision("bf16")
        for layer in trained.model.layers:
            layer.compile()
    optimizer = eightfold.optim.AdamW(model.parameters(), lr=1e-6)
    pages = sequences * -(-(prompt + completion) // PAGE)
    engine = Rollout(policy, RolloutOptions(pages, PAGE, sequences, keep_cache=False))
    if precision == "fp8":
        trained.compute.codes, trained.compute.add_to_grad = engine.kept.codes, True
    generator, micro_batch = torch.Generator().manual_seed(1), 1
    for drawn in (min(64, completion), completion):
        ids = torch.randint(model.config.vocab_size, (sequences, prompt), generator=generator).tolist()
        asked = [Request(row, drawn, SamplingOptions(1.0), seed=i) for i, row in enumerate(ids)]
        begin = _clock(device)
        groups = engine.generate(asked)
        rolled = _clock(device)
        mismatch = _train(trained, optimizer, asked, groups, micro_batch, device)
        updated = _clock(device)
        engine.kept.refresh()
        ended = _clock(device)
        if drawn < completion or device.type == "cpu":  # now the optimizer's states are there
            micro_batch = _fitting(trained, prompt, completion, device)
    whole = sequences * (prompt + completion)
    return {
        "rollout": 1e3 * (rolled - begin),
        "training": 1e3 * (updated - rolled),
        "whole step": 1e3 * (ended - begin),
        "tokens": {"rollout": sequences * completion, "training": whole, "whole step": sequences * completion},
        "hand_over": 1e3 * (ended - updated),
        "mismatch": mismatch,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


def _fitting(model: Decoder, prompt: int, completion: int, device) -> int:
    """Sequences of the largest micro-batch that fits; tells the model whether to compute layers again."""
    spare = torch.empty(SPARE if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for count, model.checkpoint_layers in MICRO_BATCHES:
        problem = _problem_of(model, count, prompt, completion, device)
        if problem is None:
            break
    else:
        raise problem
    del spare
    return count


def _problem_of(model: Decoder, count: int, prompt: int, completion: int, device) -> RuntimeError | None:
    drawn = Completion([1] * completion, [0.0] * completion, "length")
    try:
        for _ in range(2):  # the second adds to gradients that are there
            pack([Sample([1] * prompt, drawn, 1.0, 0.0)] * count, device).log_probs(model).sum().backward()
        return None
    except RuntimeError as error:  # where memory ends in an op it is no OutOfMemoryError
        return error.with_traceback(None)  # whose frames hold tensors
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _train(model: Decoder, optimizer, asked, groups, micro_batch: int, device) -> float:
    """One update; max |delta log p| of rollout and training."""
    samples = [
        Sample(request.prompt, completion, 1.0, (-1.0) ** i)
        for i, (request, group) in enumerate(zip(asked, groups, strict=True))
        for completion in group
    ]
    drawn = sum(len(sample.completion.tokens) for sample in samples)
    worst = torch.zeros((), device=device)
    for packed in [pack(samples[at : at + micro_batch], device) for at in range(0, len(samples), micro_batch)]:
        found = packed.log_probs(model)
        worst = torch.maximum(worst, (found.detach() - packed.batch.rollout_logp).abs().max())
        (-(found * packed.batch.spread(packed.batch.advantages)).sum() / drawn).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return worst.item()


def _clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
