"""The training part of a step of reinforcement learning by itself: a micro-batch's forward and backward pass of a
Qwen3-8B-shaped model, as large as fits beside weights, gradients and optimizer states; FP8 beside bf16 under
torch.compile. Gradients are there already, as from the second micro-batch of a step on."""

import gc
import time

import torch

import eightfold.optim
from eightfold.generate.requests import Completion
from eightfold.models.decoder import Decoder
from eightfold.models.precision import KeptWeights
from eightfold.train.rl.batches import PackedSamples, Sample, pack

from .common import Bench
from .decode import QWEN3_8B, SMALL, random_decoder
from .kernel_times import KernelTimes
from .rl import CPU_SIZES, SIZES, _fitting

ROUNDS = 8


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    config, (_, *sizes) = (QWEN3_8B, SIZES) if cuda else (SMALL, CPU_SIZES)
    runs = {}
    for name, precision in (("ours", "fp8"), ("bf16", "bf16")):
        torch.manual_seed(0)
        model = random_decoder(config, bench.device, fp8_head=True, fp8_cache=True)
        runs[name] = _measured(bench, model, precision, *sizes)
        del model
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    prompt, completion = sizes
    size = "8B" if cuda else "small"
    bench.note("step", name=f"RL training, a sequence of a micro-batch, {size} {prompt} + {completion}", runs=runs)
    print(f"  bf16 / ours: {runs['bf16']['ms'] / runs['ours']['ms']:.3f}")


def _measured(bench: Bench, model: Decoder, precision: str, prompt: int, completion: int) -> dict[str, float]:
    trained, device = model, bench.device
    if precision == "bf16":
        trained = model.in_precision("bf16")
        for layer in trained.model.layers:
            layer.compile()
    else:
        trained.compute.codes, trained.compute.add_to_grad = KeptWeights(torch.bfloat16).codes, True
    generator = torch.Generator().manual_seed(1)

    def packed(count: int) -> PackedSamples:
        def ids(length: int) -> list[int]:
            return torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()

        drawn = Completion(ids(completion), [0.0] * completion, "length")
        return pack([Sample(ids(prompt), drawn, 1.0, 0.0) for _ in range(count)], device)

    def step(samples: PackedSamples) -> None:
        samples.log_probs(trained).sum().backward()

    optimizer = eightfold.optim.AdamW(model.parameters(), lr=1e-6)
    step(packed(1))
    optimizer.step()  # its states are there from now on
    optimizer.zero_grad(set_to_none=True)
    count = _fitting(trained, prompt, completion, device)
    batches = [packed(count) for _ in range(ROUNDS)]  # all of a step's, before the first is computed
    for samples in batches[:2]:
        step(samples)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # it knows of micro-batches that did not fit
    begin = _synchronized(device)
    for samples in batches:
        step(samples)
    ms = 1e3 * (_synchronized(device) - begin) / ROUNDS
    if bench.kernels and device.type == "cuda":
        print(f"  {precision}, {count} sequences:")
        print(KernelTimes(lambda: step(batches[0]), ms, 1).table(bench.kernels))
    return {
        "ms": ms / count,
        "sequences": count,
        "ms_a_micro_batch": ms,
        "recomputes_layers": float(trained.checkpoint_layers),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


def _synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
