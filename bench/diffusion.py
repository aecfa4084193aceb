"""Decoding by diffusion language models of LLaDA-8B's and Dream-7B's shapes, random weights: a step over a block of 32
with DualCache (arXiv 2505.22618), the refresh of all keys, and whole answers, in bf16 and in FP8.

Prompt 1,024, canvas 256 (whole answers: 1,024). Floor of a step: the bytes of weights, of the head and of all keys and
values; of a refresh its products. Random weights are never sure, so whole answers take a fixed schedule of 11 passes a
block, about three tokens a forward.
"""

from itertools import product

import torch

from eightfold.generate.diffusion_lm import DiffusionGenerator
from eightfold.generate.diffusion_options import DiffusionOptions
from eightfold.generate.diffusion_state import CanvasRow
from eightfold.generate.diffusion_step import DiffusionStep
from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import Decoder
from eightfold.models.precision import KeptWeights

from .common import Bench, Case
from .decode import random_decoder, step_bytes

MODELS = {
    "LLaDA-8B": DecoderConfig(
        "llada", 126464, 4096, 12288, 32, 32, 32, 128, max_position_embeddings=4096, mask_token_id=126336
    ),
    "Dream-7B": DecoderConfig(
        "dream", 152064, 3584, 18944, 28, 28, 4, 128, max_position_embeddings=4096, mask_token_id=151666
    ),
}
CPU_MODELS = {"small": DecoderConfig("llada", 512, 128, 256, 2, 2, 2, 64, mask_token_id=511)}
BLOCK, PASSES = 32, 11


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    prompt, canvas, answer = (1024, 256, 1024) if cuda else (40, 64, 64)
    for name, config in (MODELS if cuda else CPU_MODELS).items():
        torch.manual_seed(0)
        model = random_decoder(config, bench.device).eval()
        modes = {"bf16": model.in_precision("bf16"), "fp8": model, "all fp8": model.in_precision("fp8")}
        modes["all fp8"].compute.fp8_head = modes["all fp8"].compute.fp8_cache = True
        for mode, decoder in modes.items():
            _passes(bench, f"{name}, {prompt} + {canvas}", mode, decoder, prompt, canvas)
        for mode, decoder in modes.items():
            for every, batch in product((1, 4, answer // BLOCK), (1, 8) if cuda else (1,)):
                shape = f"{name} {batch} x ({prompt} + {answer}), refresh every {every}"
                _answers(bench, shape, mode, decoder, batch, prompt, answer, every)
        del model, modes, decoder


@torch.inference_mode()
def _passes(bench: Bench, shape: str, mode: str, decoder: Decoder, prompt: int, canvas: int) -> None:
    """A step and a refresh of one sequence whose first block is under way."""
    options = DiffusionOptions(canvas=canvas, block_length=BLOCK, steps=PASSES)
    engine, kept = DiffusionGenerator(decoder, None, options), KeptWeights(torch.bfloat16)
    ids = torch.randint(decoder.config.mask_token_id, (prompt,)).tolist()
    with decoder.compute.constant_weights(kept):
        step = DiffusionStep(decoder, engine.plan, kept, 1, prompt + canvas, bench.device.type == "cuda")
        step.load([CanvasRow(ids, prompt, prompt + canvas, 0)])
        step.enter(0)
        matrices = sum(p.numel() for p in decoder.model.layers.parameters() if p.ndim == 2)
        tokens, config = prompt + canvas, decoder.config
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens**2
        for op, ours, work in (
            ("refresh", step.refresh, {"flop": 2 * tokens * matrices + attention}),
            ("step", step.step, {"bytes": step_bytes(decoder, 1, tokens)}),
        ):
            for _ in range(3):  # as it is, captured, replayed
                ours()
            case = Case(f"diffusion {op} {mode}", shape, ours, lambda: _sound(step), 0.0, graph=False, **work)
            bench.add(case)


def _sound(step: DiffusionStep) -> float:
    """0 where a pass has uncovered tokens of the vocabulary, and masks are left only where it says so."""
    tokens, _ = step.result(0)
    first = len(step._rows[0].prompt)
    masks = sum(token == step.plan.mask_id for token in tokens[first : first + BLOCK])
    left, _, _ = step.seen(False).read()
    return float(masks == BLOCK or masks != left[0] or not all(token >= 0 for token in tokens))


def _answers(bench, shape: str, mode: str, decoder: Decoder, batch: int, prompt: int, canvas: int, every: int) -> None:
    options = DiffusionOptions(
        canvas=canvas, block_length=BLOCK, refresh_every=every, steps=PASSES, batch=batch, stop_ids=frozenset()
    )
    engine = DiffusionGenerator(decoder, None, options)
    prompts = torch.randint(decoder.config.mask_token_id, (batch, prompt)).tolist()
    for _ in range(2):  # the first call captures
        engine.generate(prompts)
    meters = engine.meters
    run = {"ms": 1e3 * meters.seconds, "tokens_per_second": meters.canvas_tokens_per_second}
    bench.note("step", name=f"diffusion {shape}", runs={mode: run | {"forwards": meters.forwards}})
