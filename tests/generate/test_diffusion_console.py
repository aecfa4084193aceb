import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eightfold import cli
from eightfold.generate import diffusion_console
from eightfold.generate.diffusion_options import DiffusionMeters
from eightfold.models import Decoder, DecoderConfig, save_decoder

MASK = 257


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, an end token and a mask."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "<end>": 256, "<mask>": MASK}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", mask_token="<mask>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    config = DecoderConfig(
        "llama", 264, 32, 64, 1, 4, 2, 16, initializer_range=0.3, mask_token_id=MASK, attention_block=0
    )
    return save_decoder(Decoder(config, precision="fp32"), tmp_path_factory.mktemp("m") / "model", tokenizer)


def generate(folder, *flags):
    return cli.main(["generate", str(folder), "Hello", "--precision", "fp32", *flags])


def test_prints_the_text_and_what_it_took(folder, tokenizer, capsys):
    assert generate(folder, "--diffusion", "--canvas", "16", "--block", "8", "--steps", "2") == 0
    out, err = capsys.readouterr()
    assert "<mask>" not in out
    assert err.startswith("4 forwards, 4.00 tokens per forward; ")
    assert err.count("\n") == 1
    assert generate(folder, "--diffusion", "--canvas", "16", "--block", "8", "--steps", "2", "--cache", "none") == 0
    other = capsys.readouterr().out
    assert len(other) > 1


def test_a_terminal_shows_every_pass(folder, capsys, monkeypatch):
    shown = []
    view = diffusion_console.view

    def watch(*args):
        shown.append(view(*args).plain)
        return view(*args)

    monkeypatch.setattr(diffusion_console, "view", watch)
    flags = ("--diffusion", "--canvas", "16", "--block", "8", "--steps", "4", "--temperature", "0.9")
    generate(folder, *flags)
    text = capsys.readouterr().out
    assert shown == []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate(folder, *flags)
    assert capsys.readouterr().out.endswith(text)
    assert shown[0] == "░" * 16
    assert [one.count("░") for one in shown] == [16, 14, 12, 10, 8, 6, 4, 2, 0]


def test_view(tokenizer):
    ids = tokenizer.encode("aé b")
    before, after = [*ids[:3], MASK, MASK, MASK], [*ids[:3], MASK, *ids[3:]]
    text = diffusion_console.view(tokenizer, before, after, MASK)
    assert text.plain == "aé░ b"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans] == [
        ("░", "dim"),
        (" b", "bold green"),
    ]


def test_mistakes(folder, capsys):
    for flags, line in (
        (("--canvas", "16"), "--canvas: only with --diffusion"),
        (("--diffusion", "--max-tokens", "16"), "--max-tokens: not with --diffusion"),
        (("--diffusion", "--top-p", "0.9"), "--top-p: not with --diffusion"),
        (("--diffusion", "--canvas", "20", "--block", "8"), "canvas: expected a multiple of block_length (8), got 20"),
        (("--diffusion", "--threshold", "1.5"), "threshold: expected 0 < threshold <= 1, got 1.5"),
        (("--diffusion", "--factor", "1", "--steps", "3"), "threshold, factor, steps: expected one of them"),
    ):
        assert generate(folder, *flags) == cli.USER_ERROR
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert line in err


def test_a_causal_model_is_refused(tmp_path, tokenizer, capsys):
    config = DecoderConfig("llama", 264, 32, 64, 1, 4, 2, 16, mask_token_id=MASK)
    save_decoder(Decoder(config, precision="fp32"), tmp_path / "model", tokenizer)
    assert generate(tmp_path / "model", "--diffusion") == cli.USER_ERROR
    assert "attention_block: expected 0 or 2 and more, got 1: a causal model" in capsys.readouterr().err


def test_summary():
    line = diffusion_console.summary(DiffusionMeters(2.0, 60, 30, 20))
    assert line == "20 forwards, 3.00 tokens per forward; 30.0 tokens/s of the canvas, 15.0 of the text"
