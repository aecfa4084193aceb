"""Block-causal models: the plain loop's tokens and passes, which computes the text before a block anew in each pass."""

import pytest
import torch

from eightfold.generate.diffusion_lm import DiffusionGenerator
from eightfold.generate.diffusion_options import DiffusionOptions
from eightfold.models import Decoder, DecoderConfig
from plain_diffusion import PlainLoop

MASK, BLOCK = 95, 16
RULES = [{"threshold": 0.5}, {"factor": 1.2}, {"steps": 2}]


def tiny():
    torch.manual_seed(3)
    sizes = {"max_position_embeddings": 256, "initializer_range": 0.25}
    model = Decoder(DecoderConfig("qwen2", 96, 64, 160, 2, 4, 2, 16, **sizes), precision="fp32")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.6)
    return model


MODEL = tiny()


def options(**settings):
    given = {"mask_token_id": MASK, "attention_block": BLOCK, "canvas": 40, "sub_block": 4}
    return DiffusionOptions(**(given | settings))


def prompt(length):
    return torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def plain(text, cache, shifted, window=4, canvas=40, **settings):
    return PlainLoop(MODEL, MASK, shifted=shifted, **settings).run_causal(text, canvas, BLOCK, window, cache)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_gives_what_the_plain_loop_gives(cache, shifted, rule):
    """Prompts that end within the first block, at a block's end, within a later one."""
    texts = [prompt(n) for n in (1, 16, 47)]
    chosen = options(cache=cache, shifted_logits=shifted, **rule)
    engine = DiffusionGenerator(MODEL, None, chosen)
    results = engine.generate(texts)
    for text, result in zip(texts, results, strict=True):
        assert (result.canvas, result.forwards) == plain(text, cache, shifted, **rule)
        assert MASK not in result.canvas
        assert engine.generate([text]) == [result]
    assert engine.meters.wasted == 0


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_ends_at_a_stop_id_that_is_not_the_prompts(cache):
    texts = [prompt(n) for n in (18, 5, 36)]
    canvases = [plain(text, cache, True, threshold=0.5)[0] for text in texts]
    stops = frozenset(canvases[0][8:12])
    texts[0][-1] = texts[1][2] = canvases[0][9]
    chosen = options(cache=cache, shifted_logits=True, threshold=0.5, stop_ids=stops)
    results = DiffusionGenerator(MODEL, None, chosen).generate(texts)
    for text, result in zip(texts, results, strict=True):
        expected = plain(text, cache, True, threshold=0.5, stops=stops)
        assert (result.canvas, result.forwards) == expected
        assert result.finish == ("eos" if stops & set(result.tokens) else "length")
    assert any(result.finish == "eos" for result in results)


def test_without_sub_blocks():
    """SDAR's blocks are small and decoded as a whole; here both caches are one."""
    text = prompt(21)
    results = [
        DiffusionGenerator(MODEL, None, options(sub_block=BLOCK, cache=cache)).generate([text])[0]
        for cache in ("prefix", "dual")
    ]
    assert results[0] == results[1]
    assert (results[0].canvas, results[0].forwards) == plain(text, "prefix", False, BLOCK, threshold=0.9)


def test_one_pass_ahead():
    texts = [prompt(n) for n in (3, 30)]
    engine = DiffusionGenerator(MODEL, None, options(threshold=0.5, shifted_logits=True))
    expected = engine.generate(texts)
    engine._ahead = True
    assert engine.generate(texts) == expected


def test_sequences_move_when_others_end():
    """The last sequence goes on alone, with the keys of its prompt."""
    texts = [prompt(18), prompt(5), prompt(36)]
    canvases = [plain(text, "dual", True, threshold=0.5)[0] for text in texts]
    first, last = set(canvases[0][:20]), set(canvases[2])
    stop = next(iter(first - last))
    chosen = options(shifted_logits=True, threshold=0.5, stop_ids=frozenset({stop}))
    results = DiffusionGenerator(MODEL, None, chosen).generate(texts)
    assert results[0].finish == "eos"
    assert results[2].canvas == canvases[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "none"}, "cache: a block-causal model's cache of the prefix is exact: expected prefix or dual"),
        ({"block_length": 8}, "block_length: expected 16, the blocks of this block-causal model, got 8"),
        ({"sub_block": 3}, "sub_block: expected a divisor of block_length .16., got 3"),
        ({"compat": True}, "compat: expected False for a block-causal model"),
        ({"steps": 5}, "steps: expected 1 to 4, the tokens that they uncover, got 5"),
    ],
)
def test_options_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionGenerator(MODEL, None, options(**settings))
