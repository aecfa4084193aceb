"""Decoding by diffusion language models: the plain loop's tokens and passes, whatever stands beside a prompt."""

import dataclasses

import pytest
import torch

from eightfold.generate.diffusion_lm import DiffusionGenerator
from eightfold.generate.diffusion_options import DiffusionOptions
from eightfold.models import Decoder, DecoderConfig
from plain_diffusion import PlainLoop

MASK, VOCABULARY = 95, 96
RULES = [{"threshold": 0.4}, {"threshold": 1.0}, {"factor": 1.2}, {"steps": 3}]
SIZES = {"max_position_embeddings": 256, "initializer_range": 0.25}


def tiny(kind, precision="fp32"):
    """LLaDA's shape (MHA, untied head) or Dream's (grouped heads, biases, shifted logits); a head that gives
    confidences from 0.05 to 1."""
    torch.manual_seed(3)
    if kind == "llada":
        config = DecoderConfig("llama", VOCABULARY, 64, 160, 2, 4, 4, 16, **SIZES)
    else:
        config = DecoderConfig("qwen2", VOCABULARY, 64, 160, 2, 4, 2, 16, **SIZES)
    model = Decoder(config, precision=precision)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.6)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


MODELS = {kind: tiny(kind) for kind in ("llada", "dream")}


def options(kind, **settings):
    given = {"mask_token_id": MASK, "attention_block": 0, "shifted_logits": kind == "dream"}
    return DiffusionOptions(**({"canvas": 32, "block_length": 8} | given | settings))


def prompt(length, seed=0):
    return torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(100 * length + seed)).tolist()


def plain(kind, text, cache="dual", block=8, canvas=32, **settings):
    loop = PlainLoop(MODELS[kind], MASK, shifted=kind == "dream", **settings)
    return *loop.run(text, canvas, block, cache), loop


def name_of(rule):
    return "-".join(f"{key}{value}" for key, value in rule.items())


@pytest.mark.parametrize("compat", [False, True], ids=["", "compat"])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_gives_what_the_plain_loop_gives(kind, cache, rule, compat):
    if compat and kind == "dream" and (cache == "none" or "steps" in rule):
        with pytest.raises(ValueError, match="compat: of models with shifted logits only"):
            DiffusionGenerator(MODELS[kind], None, options(kind, cache=cache, compat=compat, **rule))
        return
    engine = DiffusionGenerator(MODELS[kind], None, options(kind, cache=cache, compat=compat, **rule))
    for length in (1, 13):
        (result,) = engine.generate([prompt(length)])
        canvas, forwards, _ = plain(kind, prompt(length), cache, compat=compat, **rule)
        assert (result.canvas, result.forwards) == (canvas, forwards)
        assert MASK not in canvas
        assert result.finish == "length"
        assert result.tokens == canvas
        assert result.tokens_per_forward == 32 / forwards
        assert engine.meters.wasted == 0


@pytest.mark.parametrize("every", [2, 3, 9])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_refreshes_now_and_then_as_the_plain_loop_does(kind, rule, every):
    engine = DiffusionGenerator(MODELS[kind], None, options(kind, refresh_every=every, **rule))
    texts = [prompt(1), prompt(13)]
    found = [(result.canvas, result.forwards) for result in engine.generate(texts)]
    assert found == [plain(kind, text, refresh_every=every, **rule)[:2] for text in texts]


def test_confidences_are_spread():
    """Else the rules would not be told apart."""
    _, forwards, loop = plain("llada", prompt(13), threshold=0.4)
    values = torch.tensor([c for _, confidence in loop.history for c in confidence])
    assert ((values > 0.1) & (values < 0.4)).sum() > 20
    assert (values > 0.4).sum() > 20
    assert 4 < forwards < 32


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_the_caches_agree_where_nothing_has_changed(kind):
    """A block's first step after a refresh that has uncovered nothing yet: every mode predicts the same."""
    found = {}
    for cache in ("none", "prefix", "dual"):
        engine = DiffusionGenerator(MODELS[kind], None, options(kind, cache=cache, batch=2))
        texts = [prompt(5), prompt(18)]
        rows = [engine._row(i, text, 0) for i, text in enumerate(texts)]
        engine._open(rows)
        step, rest = engine._step, []
        step._uncover = lambda n, hidden, rest=rest: rest.append(hidden.clone())
        with torch.inference_mode(), engine.model.compute.constant_weights(engine.kept):
            step.load(rows)
            step.enter(8)
            step.refresh()
            step.step()
        found[cache] = rest
    for cache in ("none", "prefix", "dual"):
        for hidden in found[cache]:
            torch.testing.assert_close(hidden, found["none"][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cache", "every"), [("none", 1), ("prefix", 1), ("dual", 1), ("dual", 3)])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_a_prompt_knows_nothing_of_those_beside_it(kind, cache, every):
    texts = [prompt(n) for n in (1, 30, 7, 16, 3)]
    stops = {"llada": {4, 9, 33, 60}, "dream": {20, 40}}[kind]
    warm = {"cache": cache, "refresh_every": every, "temperature": 0.7, "threshold": 0.5, "stop_ids": frozenset(stops)}
    together = DiffusionGenerator(MODELS[kind], None, options(kind, batch=3, **warm))
    seeds = [11, 5, 3, 5, 8]
    results = together.generate(texts, seeds)
    alone = DiffusionGenerator(MODELS[kind], None, options(kind, **warm))
    assert results == [alone.generate([text], [seed])[0] for text, seed in zip(texts, seeds, strict=True)]
    assert {result.finish for result in results} == {"eos", "length"}
    for text, seed, result in zip(texts, seeds, results, strict=True):
        canvas, forwards, _ = plain(
            kind, text, cache, temperature=0.7, seed=seed, threshold=0.5, stops=stops, refresh_every=every
        )
        assert (result.canvas, result.forwards) == (canvas, forwards)
    assert together.generate(texts, [7] * 5) != results


@pytest.mark.parametrize("early", [True, False])
def test_ends_at_a_stop_id(early):
    canvas, forwards, _ = plain("llada", prompt(13), threshold=0.4)
    stop = canvas[12]
    chosen = options("llada", threshold=0.4, stop_ids=frozenset({stop}), early_stop=early)
    engine = DiffusionGenerator(MODELS["llada"], None, chosen)
    (result,) = engine.generate([prompt(13)])
    at = canvas.index(stop)
    assert result.tokens == canvas[: at + 1]
    assert result.finish == "eos"
    assert engine.meters.tokens == at + 1
    if early:
        assert result.canvas[16:] == [MASK] * 16
        assert result.forwards < forwards
        assert engine.meters.canvas_tokens == result.uncovered == 32 - result.canvas.count(MASK)
    else:
        assert (result.canvas, result.forwards, result.uncovered) == (canvas, forwards, 32)


def test_what_is_watched():
    """Canvases after each pass, of whoever takes part; a token that is uncovered stays."""
    watched = [[], []]
    engine = DiffusionGenerator(MODELS["dream"], None, options("dream", threshold=0.5))
    results = engine.generate([prompt(3), prompt(9)], on_pass=lambda i, canvas: watched[i].append(canvas))
    for canvases, result in zip(watched, results, strict=True):
        assert len(canvases) == result.forwards
        assert canvases[-1] == result.canvas
        for before, after in zip([[MASK] * 32, *canvases], canvases):
            assert before != after
            assert all(b in (MASK, a) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_a_pass_too_many_changes_nothing(rule):
    texts = [prompt(n) for n in (4, 21)]
    engine = DiffusionGenerator(MODELS["llada"], None, options("llada", **rule))
    expected, passes = engine.generate(texts), engine.meters.passes
    engine._ahead = True  # as on CUDA: a pass is asked for before the one before it is read
    assert engine.generate(texts) == expected
    assert engine.meters.passes == passes + engine.meters.wasted
    assert engine.meters.wasted <= 4
    if "steps" in rule:
        assert engine.meters.wasted == 0  # the host knows how many a pass uncovers


def test_prompts_may_be_text_and_many():
    class Words:
        eos_token_id = None

        def encode(self, text):
            return [ord(c) % 90 for c in text]

    engine = DiffusionGenerator(MODELS["llada"], Words(), options("llada", batch=2))
    results = engine.generate(["abc", "de", "f"])
    assert results == engine.generate([[ord(c) % 90 for c in text] for text in ("abc", "de", "f")])
    assert engine.generate([]) == []


def test_weights_may_change_between_calls():
    model = tiny("llada", precision="bf16")
    engine = DiffusionGenerator(model, None, options("llada", threshold=0.4))
    before = engine.generate([prompt(5)])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    after = engine.generate([prompt(5)])
    assert after != before
    assert after == DiffusionGenerator(model, None, engine.options).generate([prompt(5)])


def test_more_rows_behind_a_block_than_block_attention_takes():
    settings = {"cache": "prefix", "steps": 3}
    engine = DiffusionGenerator(MODELS["llada"], None, options("llada", canvas=72, block_length=24, **settings))
    results = engine.generate([prompt(3), prompt(12)])
    for result, n in zip(results, (3, 12), strict=True):
        assert (result.canvas, result.forwards) == plain("llada", prompt(n), "prefix", 24, 72, steps=3)[:2]


@pytest.mark.parametrize(
    "settings", [{}, {"fp8_cache": True}, {"fp8_head": True}, {"cache": "prefix"}, {"refresh_every": 2}], ids=str
)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_low_precisions(device, precision, settings):
    """All is uncovered, the same each time; and, on CUDA, whether passes are replayed or not."""
    torch.manual_seed(3)
    config = DecoderConfig("llama", 384, 128, 256, 2, 2, 2, 64, **SIZES)
    model = Decoder(config, precision=precision).to(device)
    chosen = options("llada", threshold=0.2, **settings)
    texts = [prompt(9), prompt(20)]
    engine = DiffusionGenerator(model, None, chosen)
    results = engine.generate(texts)
    assert all(MASK not in r.canvas and r.uncovered == 32 for r in results)
    assert 4 < results[0].forwards < 32
    assert results == engine.generate(texts)
    assert engine.meters.wasted <= 4
    eager = DiffusionGenerator(model, None, dataclasses.replace(chosen, cuda_graphs=False))
    assert results == eager.generate(texts)
    assert device.type == "cuda" or results[1:] == engine.generate(texts[1:], [1])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_block_causal_in_low_precision(device, cache):
    torch.manual_seed(3)
    model = Decoder(DecoderConfig("qwen2", 384, 128, 256, 2, 2, 1, 64, **SIZES), precision="fp8").to(device)
    chosen = options("dream", attention_block=16, block_length=16, threshold=0.2, cache=cache)
    engine = DiffusionGenerator(model, None, chosen)
    results = engine.generate([prompt(9), prompt(20)])
    assert all(MASK not in r.canvas for r in results)
    eager = DiffusionGenerator(model, None, dataclasses.replace(chosen, cuda_graphs=False))
    assert results == engine.generate([prompt(9), prompt(20)]) == eager.generate([prompt(9), prompt(20)])
