"""Rollout over pages: completions that depend on nothing beside them, with the trainer's log-probabilities."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eightfold.generate.pages import PagePool
from eightfold.generate.requests import Request, RolloutOptions, sample_seed
from eightfold.generate.rollout import Rollout
from eightfold.generate.text import SamplingOptions
from eightfold.models import Decoder, DecoderConfig
from eightfold.models.precision import BF16, KeptWeights

WARM = SamplingOptions(temperature=0.8, top_k=50, top_p=0.95)


@pytest.fixture
def model(device):
    torch.manual_seed(5)
    config = DecoderConfig("llama", 512, 192, 384, 2, 3, 1, 64, initializer_range=0.2, max_position_embeddings=512)
    return Decoder(config, precision="fp8").to(device)


def requests(count, **settings):
    torch.manual_seed(1)
    lengths = [1, 17, 64, 130, 33, 5, 100, 16]
    prompts = [torch.randint(0, 512, (lengths[i % len(lengths)],)).tolist() for i in range(count)]
    settings = {"max_tokens": 20, "options": WARM} | settings
    return [Request(prompt, seed=i, **settings) for i, prompt in enumerate(prompts)]


def run(model, asked, **options):
    engine = Rollout(model, RolloutOptions(**({"pages": 200, "page_size": 16} | options)))
    out = engine.generate(asked)
    assert engine.pool.free == engine.options.pages
    return out


def trainer(model, asked, groups, order):
    """Log-probabilities of all completions from one packed pass that keeps gradients, sequences in `order`."""
    samples = [(r, c) for r, group in zip(asked, groups, strict=True) for c in group]
    ids, starts, rows, labels, temperatures = [], [0], [], [], []
    for i in order:
        request, completion = samples[i]
        ids += [*request.prompt, *completion.tokens][:-1]
        starts.append(len(ids))
        rows += range(len(ids) - len(completion.tokens), len(ids))
        labels += completion.tokens
        temperatures += [request.options.temperature] * len(completion.tokens)
    to = {"device": model.device}
    found = model.token_log_probs(
        torch.tensor(ids, **to),
        torch.tensor(starts, dtype=torch.int32, **to),
        512,
        torch.tensor(rows, **to),
        torch.tensor(labels, **to),
        torch.tensor(temperatures, **to),
        chunk_tokens=37,
    )
    assert found.requires_grad
    parts = iter(found.tolist())
    values = {i: [next(parts) for _ in samples[i][1].tokens] for i in order}
    return [values[i] for i in range(len(samples))]


def test_a_completion_depends_on_nothing_beside_it(model):
    asked = requests(6, samples=3)
    together = run(model, asked)
    assert all(len(c.tokens) == 20 and c.finish == "length" for group in together for c in group)
    assert len({tuple(c.tokens) for c in together[2]}) == 3
    assert together == run(model, asked, page_size=64, prefill_tokens=50, sequences=4)
    assert together == run(model, asked, pages=24)  # too few: sequences give theirs up and are computed again
    backwards = run(model, asked[::-1])
    assert together == backwards[::-1]
    alone = Request(asked[3].prompt, 20, WARM, seed=sample_seed(3, 2))
    assert run(model, [alone])[0][0] == together[3][2]


@pytest.mark.parametrize(("fp8_head", "fp8_cache"), [(False, False), (True, False), (False, True), (True, True)])
def test_log_probs_have_the_trainers_bits(model, fp8_head, fp8_cache):
    model.compute.fp8_head, model.compute.fp8_cache = fp8_head, fp8_cache
    asked = requests(5, samples=2) + requests(2, options=SamplingOptions())
    groups = run(model, asked, sequences=7, pages=40)
    rolled = [c.log_probs for group in groups for c in group]
    count = len(rolled)
    for order in (range(count), torch.randperm(count).tolist()):
        assert trainer(model, asked, groups, order) == rolled


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_bf16_by_kernels_is_near_the_trainer(model_type, device, monkeypatch):
    """With constant weights norms and SwiGLU are kernels on CUDA (here on the CPU too): fewer, of nearly the values."""
    monkeypatch.setattr(BF16, "kernels_on", lambda self, device: self._kept is not None)
    layers = 3
    config = DecoderConfig(model_type, 512, 192, 384, layers, 3, 1, 64, initializer_range=0.04)
    model = Decoder(config, precision="bf16").to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    asked = requests(5, samples=2)
    with CountOps() as seen:
        groups = run(model, asked, cuda_graphs=False)
    forwards = seen.counts["eightfold::rms_norm"]  # the first of each
    assert forwards >= 20
    for op, each in (("swiglu", layers), ("rope_cache_write", layers), ("add_rms_norm", 2 * layers)):
        assert seen.counts[f"eightfold::{op}"] == each * forwards, op
    for op in ("silu", "silu_", "sigmoid", "rsqrt", "rsqrt_"):
        assert seen.counts[f"aten::{op}"] == 0, op
    products = sum(seen.counts[f"aten::{op}"] for op in ("linear", "matmul", "mm", "addmm"))
    assert products == 4 * layers * forwards  # q, k and v are one; gate and up; o; down
    rolled = [c.log_probs for group in groups for c in group]
    found = trainer(model, asked, groups, range(len(rolled)))
    apart = (torch.tensor(rolled) - torch.tensor(found)).abs()
    assert apart.max() < 0.05, apart


def test_greedy_is_the_largest_logit_of_the_packed_pass(model):
    (request,) = requests(1, options=SamplingOptions(), max_tokens=8)
    (completion,) = run(model, [request])[0]
    ids = list(request.prompt)
    for token in completion.tokens:
        starts = torch.tensor([0, len(ids)], dtype=torch.int32, device=model.device)
        with torch.no_grad():
            hidden = model.packed_hidden(torch.tensor(ids, device=model.device), starts, len(ids))
        assert (hidden[-1].float() @ model.lm_head.weight.bfloat16().float().t()).argmax().item() == token
        ids.append(token)


def test_stops(model):
    (request,) = requests(1, max_tokens=20)
    free = run(model, [request])[0][0].tokens
    stop = free[9]
    at = free.index(stop)
    (ended,) = run(model, [Request(request.prompt, 20, WARM, seed=request.seed, stop_ids=frozenset({stop}))])[0]
    assert (ended.tokens, ended.finish) == (free[: at + 1], "stop")

    class Tokenizer:
        def decode(self, ids):
            return "".join(f"<{i}>" for i in ids)

    text = f"<{free[5]}><{free[6]}>"
    asked = Request(request.prompt, 20, WARM, seed=request.seed, stop=("never", text))
    engine = Rollout(model, RolloutOptions(pages=20, page_size=16), Tokenizer())
    seen = []
    (ended,) = engine.generate([asked], on_complete=lambda *found: seen.append(found))[0]
    assert ended.finish == "stop"
    assert Tokenizer().decode(ended.tokens).endswith(text)
    assert seen == [(0, 0, ended)]


def test_the_weights_of_the_moment(model):
    asked = requests(2)
    engine = Rollout(model, RolloutOptions(pages=60, page_size=16))
    before = engine.generate(asked)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    after = engine.generate(asked)
    assert before != after
    assert after == run(model, asked)


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        (Request([1] * 500, 20), {}, "context of 512"),
        (Request([1] * 100, 20), {"pages": 7}, "need 8 pages of 16, the cache has 7"),
        (Request([1], 20, stop=("x",)), {}, "need a tokenizer"),
    ],
)
def test_requests_that_cannot_be_served(request_, options, message):
    config = DecoderConfig("llama", 512, 192, 384, 1, 3, 1, 64, max_position_embeddings=512)
    with pytest.raises(ValueError, match=message):
        run(Decoder(config, precision="fp8"), [request_], **options)


def test_bad_options():
    for call, message in (
        (lambda: Request([], 3), "prompt: expected at least one token"),
        (lambda: Request([1], 0), "max_tokens: expected 1 or more, got 0"),
        (lambda: Request([1], 1, samples=0), "samples: expected 1 or more, got 0"),
        (lambda: RolloutOptions(pages=0), "pages: expected 1 or more, got 0"),
        (lambda: RolloutOptions(pages=1, page_size=24), "page_size: expected a multiple of 16, got 24"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_page_pool_counts_holders():
    pool = PagePool(3)
    page = pool.take()
    assert pool.share(page) == page
    assert pool.free == 2
    pool.release(page)
    assert pool.free == 2
    pool.release(page)
    assert pool.free == 3
    with pytest.raises(ValueError, match="no holder"):
        pool.release(page)
    assert len({pool.take() for _ in range(3)}) == 3
    with pytest.raises(IndexError):
        pool.take()


def test_steps_asked_for_ahead(model):
    """As on CUDA, where a step is asked for before the one ahead of it is read; some end meanwhile."""
    asked = requests(7, samples=2, stop_ids=frozenset(range(0, 512, 13)))
    for options in ({}, {"sequences": 5}, {"pages": 24}):
        expected = run(model, asked, **options)
        engine = Rollout(model, RolloutOptions(**({"pages": 200, "page_size": 16} | options)))
        engine._ahead = True
        assert engine.generate(asked) == expected
        assert engine.pool.free == engine.options.pages
    assert {c.finish for group in expected for c in group} == {"stop", "length"}


def test_a_second_call_reads_the_weights_where_the_first_did(model):
    """Codes stay at their addresses, which CUDA graphs ask for, and hold the bytes of the weights of the moment."""
    engine = Rollout(model, RolloutOptions(pages=200, page_size=16))
    asked = requests(3)
    first = engine.generate(asked)
    kept = [cache._codes for cache in engine.kept.codes.values() if cache._codes is not None]
    addresses = [[part.data_ptr() for part in codes] for codes in kept]
    assert addresses
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    second = engine.generate(asked)
    assert second != first
    assert [[part.data_ptr() for part in codes] for codes in kept] == addresses
    assert second == run(model, asked)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_kept_weights_follow_the_layer_where_they_are(name, device):
    kept, layer = KeptWeights(torch.bfloat16), torch.nn.Linear(8, 16, device=device)
    before = kept.rounded(layer, name), kept.widened(layer, name)
    with torch.no_grad():
        getattr(layer, name).mul_(-1.25)
    kept.refresh()
    want = getattr(layer, name).detach().bfloat16()
    for make, dtype, first in zip((kept.rounded, kept.widened), (torch.bfloat16, torch.float32), before, strict=True):
        assert make(layer, name) is first
        assert torch.equal(first, want.to(dtype))
        assert first.dtype == dtype
    layer.bfloat16()
    assert kept.rounded(layer, name).data_ptr() == getattr(layer, name).data_ptr()
    assert kept.rounded(torch.nn.Linear(8, 16, bias=False, device=device), "bias") is None


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_longer_sequences_in_a_later_call(model, precision):
    """Their wider table of pages takes other graphs, after those of the calls before are gone."""
    model = model.in_precision(precision)
    engine = Rollout(model, RolloutOptions(pages=200, page_size=16))
    for tokens in (5, 40, 200, 300):
        asked = [Request([7] * tokens, 6, WARM, seed=1), Request([9] * 3, 6, WARM, seed=2)]
        found = engine.generate(asked)
        assert [len(c.tokens) for (c,) in found] == [6, 6]
        assert precision == "bf16" or found == run(model, asked)  # products of bf16 are a vendor's


def test_weights_in_other_memory(model):
    """Graphs know addresses: other parameters, in new memory, take other graphs."""
    engine = Rollout(model, RolloutOptions(pages=200, page_size=16))
    asked = requests(3)
    first = engine.generate(asked)
    layer = model.model.layers[1]
    for module in (model.model.norm, model.model.embed_tokens, layer.input_layernorm, layer.mlp.up_proj):
        module.weight = torch.nn.Parameter(module.weight.detach() * 1.25)
    engine._steps._replay("old", lambda: None)
    second = engine.generate(asked)
    assert second != first
    assert "old" not in engine._steps._replay._captured
    assert second == run(model, asked)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    config = DecoderConfig("llama", 512, 192, 384, 2, 3, 1, 64, initializer_range=0.2, max_position_embeddings=512)
    model = Decoder(config, precision="fp8")
    asked = requests(3)
    assert run(model.to("cuda:1"), asked) == run(model.to("cuda:0"), asked)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_kernels_on_the_heels_of_each_other(model_type, bare_memory):
    """With nothing between them kernels start before those ahead have ended; here q, k and v are one product."""
    config = DecoderConfig(model_type, 512, 512, 1024, 3, 4, 2, 128, initializer_range=0.1)
    model = Decoder(config, precision="fp8").cuda()
    # Some sequences are of several chunks of 512 keys; three rows leave one of four blank.
    asked = [Request([3] * tokens, 40, WARM, seed=tokens) for tokens in (1500, 1, 600)]
    torch.utils.deterministic.fill_uninitialized_memory = True
    expected = run(model, asked, cuda_graphs=False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    for graphs in (True, False):
        for turn in range(3):
            assert run(model, asked, pages=300, cuda_graphs=graphs) == expected, f"graphs: {graphs}, turn {turn}"


def test_a_cache_given_back(model):
    engine = Rollout(model, RolloutOptions(pages=200, page_size=16, keep_cache=False))
    asked = requests(3)
    assert engine.generate(asked) == engine.generate(asked) == run(model, asked)


def test_a_refused_request_leaves_nothing_behind(model):
    engine = Rollout(model, RolloutOptions(pages=200, page_size=16))
    asked = requests(2)
    with pytest.raises(ValueError, match=r"requests\[1\]: prompt and completion"):
        engine.generate([asked[0], Request([1], 512)])
    assert engine.generate(asked) == run(model, asked)


def test_training_reads_the_codes_that_rollout_reads(model):
    """Also layer by layer again in the backward pass; their addresses stay, and gradients have the same bits."""
    torch.manual_seed(2)
    model.checkpoint_layers = True
    ids = torch.randint(0, 512, (1, 40), device=model.device)
    model.loss(ids, ids.roll(-1, 1)).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    engine = Rollout(model, RolloutOptions(pages=200, page_size=16))
    asked = requests(2)
    first = engine.generate(asked)
    before = {layer: cache._codes for layer, cache in engine.kept.codes.items()}
    model.compute.codes = engine.kept.codes
    model.loss(ids, ids.roll(-1, 1)).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert all(cache._codes is before[layer] for layer, cache in engine.kept.codes.items())
    assert engine.generate(asked) == first
