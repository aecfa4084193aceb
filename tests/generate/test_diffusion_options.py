"""Options, prompts and models that do not fit, and predictions of nothing but masks."""

import dataclasses

import pytest
import torch

from eightfold.generate.diffusion_lm import DiffusionGenerator
from eightfold.generate.diffusion_options import DiffusionMeters, DiffusionOptions, make_plan, result_of
from eightfold.models import Decoder, DecoderConfig

MASK = 50
CONFIG = DecoderConfig("llama", 56, 32, 64, 1, 2, 2, 16, max_position_embeddings=64, eos_token_id=[2, 3])


def model():
    torch.manual_seed(0)
    return Decoder(CONFIG, precision="fp32")


def options(**settings):
    given = {"canvas": 16, "block_length": 8, "mask_token_id": MASK, "attention_block": 0}
    return DiffusionOptions(**(given | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "threshold: expected 0 < threshold <= 1, got 0.0"),
        ({"threshold": 1.01}, "threshold: expected 0 < threshold <= 1, got 1.01"),
        ({"threshold": float("nan")}, "threshold: expected 0 < threshold <= 1, got nan"),
        ({"factor": 0.0}, "factor: expected a positive number, got 0.0"),
        ({"factor": 1.0, "threshold": 0.9}, "threshold, factor, steps: expected one of them, got .*0.9.*1.0"),
        ({"cache": "both"}, "cache: expected none, prefix or dual, got 'both'"),
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"canvas": 0}, "canvas: expected 1 or more, got 0"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"refresh_every": 0}, "refresh_every: expected 1 or more, got 0"),
        ({"refresh_every": 2, "cache": "prefix"}, "refresh_every: expected 1 with cache='prefix', got 2"),
    ],
)
def test_options_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        options(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"canvas": 20}, r"canvas: expected a multiple of block_length \(8\), got 20"),
        ({"mask_token_id": None}, "mask_token_id: the model's config names none, and none was given"),
        ({"mask_token_id": 56}, "mask_token_id: expected 0 to 55, got 56"),
        ({"attention_block": None}, "attention_block: expected 0 or 2 and more, got 1: a causal model"),
        ({"block_length": 72, "canvas": 72}, "block_length: expected 1 to 64, got 72"),
        ({"steps": 9}, "steps: expected 1 to 8, the tokens that they uncover, got 9"),
        ({"stop_ids": frozenset({56})}, "stop_ids: expected 0 to 55, got 56"),
        ({"forbidden": (-1,)}, "forbidden: expected 0 to 55, got -1"),
        ({"refresh_every": 2, "compat": True}, "compat: expected refresh_every 1, got 2"),
        ({"refresh_every": 2, "attention_block": 8}, "refresh_every: a block-causal model's cache is exact"),
    ],
)
def test_options_that_do_not_fit_the_model(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionGenerator(model(), None, options(**settings))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], []], r"prompts\[1\]: expected at least one token, got none"),
        ([[1, 2], [4] * 49], r"prompts\[1\]: prompt and canvas of 49 \+ 16 tokens are longer than .* context of 64"),
        ([[56]], r"prompts\[0\]: expected ids from 0 to 55 but the mask token 50, got 56"),
        ([[7, MASK]], r"prompts\[0\]: expected ids from 0 to 55 but the mask token 50, got 50"),
        (["text"], r"prompts\[0\]: text needs a tokenizer, got none"),
    ],
)
def test_prompts_are_checked(prompts, message):
    with pytest.raises(ValueError, match=message):
        DiffusionGenerator(model(), None, options()).generate(prompts)


def test_a_vocabulary_that_the_heads_kernel_does_not_take():
    odd = dataclasses.replace(CONFIG, vocab_size=60)
    with pytest.raises(ValueError, match="vocab_size: expected a multiple of 8, got 60"):
        make_plan(options(), odd)


def test_one_seed_a_prompt():
    with pytest.raises(ValueError, match="seeds: expected one for each of 2 prompts, got 1"):
        DiffusionGenerator(model(), None, options()).generate([[1], [2]], [0])


def test_the_longest_prompt_fits():
    (result,) = DiffusionGenerator(model(), None, options()).generate([[4] * 48])
    assert len(result.canvas) == 16


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_model_that_predicts_the_mask(cache):
    """Never, unless it is allowed; then a pass without progress is an error, not the first of many."""
    constant = model()
    with torch.no_grad():
        constant.lm_head.weight.zero_()
        constant.lm_head.weight[MASK] = 1.0
        constant.model.embed_tokens.weight.fill_(1.0)
        for name, parameter in constant.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    (result,) = DiffusionGenerator(constant, None, options(cache=cache, stop_ids=frozenset())).generate([[1]])
    assert MASK not in result.canvas
    for settings in ({}, {"steps": 2}, {"factor": 1.0}):
        chosen = options(cache=cache, forbid_mask=False, **settings)
        with pytest.raises(ValueError, match=r"prompts\[0\]: a pass has uncovered nothing.*the mask token 50"):
            DiffusionGenerator(constant, None, chosen).generate([[1]])


def test_logits_that_are_not_finite():
    broken = model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"prompts\[0\]: a pass has uncovered nothing: the model's logits are not fini"
    ):
        DiffusionGenerator(broken, None, options()).generate([[1]])


def test_stop_ids_come_from_the_model_and_the_tokenizer():
    assert make_plan(options(), CONFIG, [7]).stop_ids == (2, 3, 7)
    assert make_plan(options(stop_ids=frozenset({5})), CONFIG, [7]).stop_ids == (5,)
    assert make_plan(options(), dataclasses.replace(CONFIG, eos_token_id=4)).stop_ids == (4,)
    assert make_plan(options(stop_ids=frozenset()), CONFIG).stop_ids == ()


def test_forbidden_ids_are_not_drawn():
    allowed = {5, 6, 7, 9}
    chosen = options(forbidden=tuple(set(range(56)) - allowed), temperature=1.0, forbid_mask=False)
    for result in DiffusionGenerator(model(), None, chosen).generate([[1, 2, 3]] * 3):
        assert set(result.canvas) <= allowed


def test_results_and_meters():
    plan = make_plan(options(), CONFIG)
    result = result_of([9, 8, 2, 7, MASK], 2, plan)
    assert (result.tokens, result.finish, result.uncovered) == ([9, 8, 2], "eos", 4)
    assert result.tokens_per_forward == 2
    assert result_of([9, MASK, 2], 1, plan).finish == "length"  # a mask is before it
    assert DiffusionMeters().canvas_tokens_per_second == DiffusionMeters().tokens_per_second == 0
    assert DiffusionMeters(2.0, 60, 30, 20).tokens_per_second == 15
