"""Max |delta log p| of rollout and training, unified (FP8 both) beside mixed (trained in bf16), on the same tokens.

    python examples/rl/mismatch.py                    # SmolLM2-135M-Instruct, questions of a reasoning-gym task
    python examples/rl/mismatch.py --shape qwen2-1.5b # random weights, random prompts: a GPU's work

All completions are drawn together over pages whose numbers are shuffled, then packed in another order for training.
"""

import argparse
import random
import time

import torch

from eightfold.generate.console import stop_ids
from eightfold.generate.pages import PagePool
from eightfold.generate.requests import Request, RolloutOptions
from eightfold.generate.rollout import Rollout
from eightfold.generate.text import SamplingOptions
from eightfold.models import Decoder, DecoderConfig, load_decoder
from eightfold.train.rl.batches import Sample, pack, parts
from eightfold.train.rl.tasks import PromptOptions, Prompts, TaskOptions, load_task

SHAPES = {
    "qwen2-1.5b": DecoderConfig(
        "qwen2", 151936, 1536, 8960, 28, 12, 2, 128, max_position_embeddings=4096, tie_word_embeddings=True
    ),
    "llama-1.1b": DecoderConfig("llama", 32000, 2048, 5632, 22, 32, 4, 64, max_position_embeddings=4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="default: the model")
    parser.add_argument("--model", default="smollm2", help="Hugging Face folder, .gguf file or smollm2")
    parser.add_argument("--task", default="chain_sum", help="of reasoning-gym")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="longest completion")
    parser.add_argument("--fp8-head", action="store_true", help="the head's product in FP8 too")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, asked = (_of_shape if options.shape else _of_model)(options, device)
    model.compute.fp8_head = options.fp8_head
    name = options.shape or options.model

    pages = min(sum(-(-(len(r.prompt) + r.max_tokens) // 64) * r.samples for r in asked), 12000)
    engine = Rollout(model, RolloutOptions(pages, page_size=64, sequences=options.prompts * options.samples))
    # Neighbours in a sequence are no neighbours in memory.
    engine.pool = PagePool(pages, random.Random(0).sample(range(pages), pages))
    begin = time.perf_counter()
    groups = engine.generate(asked)
    drawn = sum(len(completion.tokens) for group in groups for completion in group)
    print(f"{name}: {drawn} tokens drawn, {drawn / (time.perf_counter() - begin):,.0f} a second", flush=True)
    samples = [Sample(r.prompt, c, 1.0, 0.0) for r, group in zip(asked, groups, strict=True) for c in group]
    random.Random(1).shuffle(samples)
    for mode, trained in (("unified", model), ("mixed", model.in_precision("bf16"))):
        worst, total = 0.0, 0.0
        for part in parts(samples, 32768 if device.type == "cuda" else 4096):
            packed = pack(part, device)
            with torch.no_grad():
                delta = (packed.log_probs(trained) - packed.batch.rollout_logp).abs()
            worst, total = max(worst, delta.max().item()), total + delta.double().sum().item()
        print(f"{name} {mode}: max |delta log p| {worst:.6g}, mean {total / drawn:.3g} over {drawn} tokens", flush=True)


def _of_shape(options: argparse.Namespace, device: torch.device) -> tuple[Decoder, list[Request]]:
    config, generator = SHAPES[options.shape], torch.Generator().manual_seed(1)
    with device:
        model = Decoder(config, "fp8").to(torch.bfloat16)
    lengths = torch.randint(1, 300, (options.prompts,), generator=generator).tolist()
    prompts = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return model, _requests(prompts, options, frozenset())


def _of_model(options: argparse.Namespace, device: torch.device) -> tuple[Decoder, list[Request]]:
    model, tokenizer = load_decoder(options.model, "fp8", torch.float32, device)
    prompts = Prompts(load_task(TaskOptions(options.task), 0, True), tokenizer, PromptOptions(), 0)
    items = prompts.take(options.prompts)
    stop = frozenset(stop_ids(model.config.eos_token_id, tokenizer.eos_token_id))
    return model, _requests([item.ids for item in items], options, stop)


def _requests(prompts: list[list[int]], options: argparse.Namespace, stop: frozenset[int]) -> list[Request]:
    return [
        Request(ids, options.tokens, SamplingOptions(1.0), seed=i, samples=options.samples, stop_ids=stop)
        for i, ids in enumerate(prompts)
    ]


if __name__ == "__main__":
    main()
