import argparse
import io

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eightfold.generate import console
from eightfold.models import Decoder, DecoderConfig, save_decoder


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and an end token."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    config = DecoderConfig("llama", 257, 32, 64, 1, 4, 2, 16, initializer_range=0.3, eos_token_id=256)
    return save_decoder(Decoder(config, precision="fp32"), tmp_path_factory.mktemp("m") / "model", tokenizer)


def arguments(folder, **changes):
    values = {"prompt": "Hello", "chat": False, "max_tokens": 12, "temperature": 0.8, "top_k": None, "top_p": 0.9}
    return argparse.Namespace(model=str(folder), seed=1, precision="fp32", **{**values, **changes})


def test_prints_the_continuation(folder, capsys, monkeypatch):
    assert console.run(arguments(folder)) == 0
    first = capsys.readouterr().out
    assert len(first.encode()) > 1
    assert first.endswith("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    console.run(arguments(folder, prompt=None))
    assert capsys.readouterr().out == first


def test_text_appears_when_its_characters_are_whole(tokenizer):
    pieces = []
    printer = console.TextPrinter(tokenizer, pieces.append)
    for token in tokenizer.encode("aé漢b"):
        printer.put(token)
    assert [piece for piece in pieces if piece] == ["a", "é", "漢", "b"]
    printer.put(tokenizer.encode("é")[0])
    printer.end()
    assert "".join(pieces) == "aé漢b\ufffd"


def test_chat_template(tokenizer):
    with pytest.raises(ValueError, match="--chat: the model's tokenizer has no chat template"):
        console.encode(tokenizer, "hi", chat=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:"
    try:
        assert tokenizer.decode(console.encode(tokenizer, "hi", chat=True)) == "<user>hi:"
    finally:
        tokenizer.chat_template = None


def test_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match="prompt: expected some text, got none"):
        console.run(arguments(folder, prompt=""))
    config = DecoderConfig("llama", 32, 32, 64, 1, 4, 2, 16)
    bare = save_decoder(Decoder(config), tmp_path / "bare")
    with pytest.raises(ValueError, match="bare: has no tokenizer"):
        console.run(arguments(bare))


def test_stop_ids():
    assert console.stop_ids(2, [5, 2], None) == [2, 5]
    assert console.stop_ids(None) == []
