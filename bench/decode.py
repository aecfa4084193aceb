"""The decoding step of a rollout: a token of each sequence of a Qwen3-8B-shaped model, drawn with its log-probability.

Ours is generate.decoding.DecodeStep, a CUDA graph, in FP8 (head and cache in bf16, or all in FP8) and in bf16; the peer
is the same step in plain torch, its layers under torch.compile, captured in a CUDA graph too. Timed are a few steps in
a row. Floor: the bytes of weights, of the head and of keys and values, once. Checked first: log-probabilities of a
rollout against the training pass's.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from eightfold.generate.decoding import DecodeRow, DecodeStep
from eightfold.generate.requests import Request, RolloutOptions
from eightfold.generate.rollout import Rollout
from eightfold.generate.text import SamplingOptions
from eightfold.models.attention import PagedCache
from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import Decoder
from eightfold.models.precision import KeptWeights
from eightfold.models.rotary import inverse_frequencies
from eightfold.ops import rotary_tables
from eightfold.train.rl.batches import Sample, pack

from .common import Bench, Case, replayed
from .kernel_times import KernelTimes
from .plain import rotate

QWEN3_8B = DecoderConfig("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, max_position_embeddings=40960)
SMALL = DecoderConfig("qwen3", 512, 128, 256, 2, 2, 1, 64)
SHAPES, CPU_SHAPES = ((1, 1024), (32, 1024), (64, 1024), (64, 2048)), ((2, 40),)
QUEUE_CYCLES = 2_000_000  # 1 ms: more than the host takes to ask for STEPS, which it does while those before run
PAGE, ROOM = 64, 400  # tokens of a page; tokens that a sequence has room for beyond its first
STEPS = 4  # timed at once, as generation takes them: one on the heels of another


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    config = QWEN3_8B if cuda else SMALL
    torch.manual_seed(0)
    model = random_decoder(config, bench.device)
    models = {"fp8": model, "all fp8": model.in_precision("fp8"), "bf16": model.in_precision("bf16")}
    models["all fp8"].compute.fp8_head = models["all fp8"].compute.fp8_cache = True
    for batch, context in SHAPES if cuda else CPU_SHAPES:
        peer = _peer(model, batch, context)
        for name, decoder in models.items():
            drawn = STEPS * (bench.rounds + 2)  # while the clock runs: half of them from less than `context` on
            with _step(decoder, batch, context - drawn // 2, cuda) as step:
                bench.add(
                    Case(
                        f"decode {name}",
                        f"batch {batch}, context {context}",
                        ours=lambda step=step: _times(step.launch, STEPS),
                        error=lambda decoder=decoder: _mismatch(decoder),
                        tolerance=0.0 if decoder.precision == "fp8" else 0.5,
                        bytes=step_bytes(decoder, batch, context),
                        peers={"torch bf16 compiled": lambda peer=peer: _times(peer, STEPS)}
                        if decoder.precision == "bf16"
                        else {},
                        calls=STEPS,
                        graph=False,
                        queue_cycles=QUEUE_CYCLES,
                    )
                )
                if bench.kernels and cuda:
                    print(KernelTimes(step.launch).table(bench.kernels))
        del peer


def _times(launch, count: int) -> None:
    for _ in range(count):
        launch()


def random_decoder(config: DecoderConfig, device: torch.device, **options) -> Decoder:
    """In FP8, of random bf16 parameters made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Decoder(config, "fp8", **options)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(True)


def step_bytes(decoder: Decoder, batch: int, context: int) -> int:
    """What a step must read: matrices but the embedding, and keys and values."""
    config, fp8 = decoder.config, decoder.precision == "fp8"
    matrices = sum(p.numel() for p in decoder.model.layers.parameters() if p.ndim == 2)
    head = decoder.lm_head.weight.numel() * (1 if decoder.compute.fp8_head else 2)
    row = config.head_dim + 4 if decoder.compute.fp8_cache else 2 * config.head_dim
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * row
    return matrices * (1 if fp8 else 2) + head + batch * context * cache


@contextmanager
def _step(decoder: Decoder, batch: int, context: int, graphs: bool):
    """A step whose sequences have `context` tokens in pages that lie anywhere."""
    pages = -(-(context + ROOM) // PAGE)
    cache = PagedCache(decoder.config, batch * pages, PAGE, decoder.compute.cache_dtype, decoder.device)
    order = torch.randperm(batch * pages).tolist()
    with torch.inference_mode(), decoder.compute.constant_weights(KeptWeights(torch.bfloat16)):
        step = DecodeStep(decoder, cache, batch, graphs)
        step.prepare(decoder.compute.head_operand(decoder.lm_head), pages)
        options = SamplingOptions(1.0)
        step.load([DecodeRow(17 + i, context, order[i * pages : (i + 1) * pages], i, options) for i in range(batch)])
        yield step


def _mismatch(decoder: Decoder) -> float:
    """Max |delta log p| between tokens of a rollout and a packed pass over them."""
    asked = [Request(list(range(7, 40 + i)), 8, SamplingOptions(1.0), seed=i) for i in range(3)]
    groups = Rollout(decoder, RolloutOptions(pages=16, page_size=PAGE, sequences=4)).generate(asked)
    samples = [Sample(r.prompt, c, 1.0, 0.0) for r, group in zip(asked, groups, strict=True) for c in group]
    packed = pack(samples, decoder.device)
    with torch.no_grad():
        return (packed.log_probs(decoder) - packed.batch.rollout_logp).abs().max().item()


def _peer(model: Decoder, batch: int, context: int):
    """The step in plain torch over dense caches of just `context` tokens, with the weights of `model`."""
    config, device = model.config, model.device
    shape = batch, config.num_key_value_heads, context, config.head_dim
    caches = [[torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in range(2)] for _ in model.model.layers]
    tables = rotary_tables(inverse_frequencies(config).to(device), torch.full((batch, 1), context - 1, device=device))
    ids = torch.arange(batch, device=device)[:, None]
    layer_step, draw = (torch.compile(part, dynamic=False) for part in (_plain_layer, _plain_draw))

    @torch.no_grad()
    def step():
        x = F.embedding(ids, model.model.embed_tokens.weight)
        for layer, cache in zip(model.model.layers, caches, strict=True):
            x = layer_step(x, *_weights(layer), *cache, *tables, config.head_dim)
        return draw(x, model.model.norm.weight, model.lm_head.weight)

    return replayed([step])


def _weights(layer) -> tuple[torch.Tensor, ...]:
    attn, mlp = layer.self_attn, layer.mlp
    linears = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    norms = layer.input_layernorm, layer.post_attention_layernorm, attn.q_norm, attn.k_norm
    return tuple(module.weight for module in (*linears, *norms))


def _plain_layer(x, wq, wk, wv, wo, wg, wu, wd, n1, n2, nq, nk, keys, values, cos, sin, dim):
    y = F.rms_norm(x, n1.shape, n1, 1e-6)
    q, k, v = (F.linear(y, w).unflatten(-1, (-1, dim)) for w in (wq, wk, wv))
    q, k = (rotate(F.rms_norm(h, n.shape, n, 1e-6), cos, sin) for h, n in ((q, nq), (k, nk)))
    keys[:, :, -1], values[:, :, -1] = k[:, 0], v[:, 0]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=q.shape[2] != k.shape[2])
    x = x + F.linear(out.transpose(1, 2).flatten(2), wo)
    y = F.rms_norm(x, n2.shape, n2, 1e-6)
    return x + F.linear(F.silu(F.linear(y, wg)) * F.linear(y, wu), wd)


def _plain_draw(x, norm, head):
    log_probs = F.linear(F.rms_norm(x, norm.shape, norm, 1e-6), head)[:, 0].float().log_softmax(-1)
    tokens = (log_probs.exp() / torch.empty_like(log_probs).exponential_()).argmax(-1, keepdim=True)
    return tokens, log_probs.gather(1, tokens)
