"""What training from scratch on much text needs: random weights, tokens kept between runs, sequences without masks."""

import json

import numpy as np
import pytest
import torch

from eightfold.models.loading import new_decoder
from eightfold.train.config import DataConfig, parse_config
from eightfold.train.data import Corpus, Document, pack, tokenize, tokenize_all, tokens_of
from eightfold.train.loop import train


@pytest.fixture
def sizes(model_folder, tmp_path, tokenizer):
    """A folder with a config.json and a tokenizer, without weights."""
    folder = tmp_path / "sizes"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((model_folder / "config.json").read_text())
    return folder


def test_random_weights_by_seed(sizes, settings, tmp_path):
    settings["model"] |= {"path": str(sizes), "init": "random"}
    settings |= {"steps": 2, "checkpoint_every": 0, "checkpoint_at_end": False}
    starts = []
    for number, seed in enumerate((0, 0, 1)):
        result = train(parse_config(settings | {"seed": seed, "output": str(tmp_path / str(number))}))
        starts.append(result.losses[0])
    assert starts[0] == starts[1] != starts[2]
    assert 5 < starts[0] < 6.2  # ln 272 = 5.6
    model, tokenizer = new_decoder(sizes, "bf16", torch.bfloat16)
    assert tokenizer is not None
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        new_decoder(sizes / "config.json")
    settings["model"]["init"] = "none"
    with pytest.raises(ValueError, match=r"key 'model.init': .*'pretrained' or 'random', got 'none'"):
        parse_config(settings)


def test_compiled_layers_compute_the_same(settings, monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self), options)))
    settings |= {"steps": 1, "eval_every": 0, "checkpoint_at_end": False, "checkpoint_every": 0}
    settings["model"]["compile"] = True
    train(parse_config(settings))
    assert [(kind.__name__, options) for kind, options in compiled] == [("DecoderLayer", {"dynamic": False})] * 2


def test_sequences_that_are_not_isolated_have_no_document_ids(settings, text_folder, tokenizer, tmp_path):
    config = DataConfig(path=str(text_folder), sequence_length=32, isolate_documents=False)
    corpus = Corpus.load(config, tokenizer, 0)
    isolated = Corpus.load(config.model_copy(update={"isolate_documents": True}), tokenizer, 0)
    assert torch.equal(corpus.train.ids, isolated.train.ids)
    assert torch.equal(corpus.train.labels, isolated.train.labels)
    assert corpus.train.batch([0, 2])[2] is None
    assert corpus.held_out.document_ids is None
    assert corpus.fingerprint != isolated.fingerprint
    ids = [(np.arange(9, dtype=np.int32), np.ones(9, dtype=bool))]
    assert pack(ids, 4, isolate=False).document_ids is None
    settings["data"]["isolate_documents"] = False
    settings |= {"steps": 30, "output": str(tmp_path / "out")}
    result = train(parse_config(settings))
    assert result.held_out[30] < 0.8 * result.held_out[0]


def texts(count):
    return [Document(f"text {i} " * (i % 7 + 1), "prompt" if i % 3 == 0 else "") for i in range(count)]


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_documents_tokenised_together_are_what_each_is_alone(tokenizer, train_on_prompt):
    config = DataConfig(path="", train_on_prompt=train_on_prompt)
    together = tokenize_all(texts(600), tokenizer, config)
    for document, tokens in zip(texts(600), together, strict=True):
        for a, b in zip(tokens, tokenize(document, tokenizer, config), strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)


def test_tokens_are_kept(tokenizer, tmp_path, monkeypatch):
    from eightfold.train import data

    config = DataConfig(path="", cache=str(tmp_path / "kept"))
    calls = []
    real = data.tokenize_all
    monkeypatch.setattr(data, "tokenize_all", lambda *arguments: calls.append(1) or real(*arguments))
    first = tokens_of(texts(20), tokenizer, config)
    again = tokens_of(texts(20), tokenizer, config)
    assert len(calls) == 1
    assert all(np.array_equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    tokens_of(texts(21), tokenizer, config)
    tokens_of(texts(20), tokenizer, config.model_copy(update={"train_on_prompt": True}))
    assert len(calls) == 3
    (path, *_) = sorted((tmp_path / "kept").iterdir())
    assert path.suffix == ".npz"
    for damaged in sorted((tmp_path / "kept").iterdir()):
        damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"tokens-\w+\.npz: damaged, remove it"):
        tokens_of(texts(20), tokenizer, config)
    with pytest.raises(ValueError, match=r"data\.cache: the model's tokenizer"):
        tokens_of(texts(20), object(), config)


def test_a_walk_keeps_its_order(text_folder, tokenizer):
    """The order of an epoch is made once; a cursor that is set back makes that of its epoch again."""
    corpus = Corpus.load(DataConfig(path=str(text_folder), sequence_length=16), tokenizer, 3)
    count = len(corpus.train)
    cursor = corpus.start()
    walk = [cursor.take(count) for _ in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in walk)
    assert walk[0] != walk[1]
    other = corpus.start()
    other.take(5)
    other.load_state_dict(json.loads(json.dumps({"epoch": 1, "position": 2, "fingerprint": corpus.fingerprint})))
    assert other.take(count - 2) == walk[1][2:]
    assert other.take(count) == walk[2]
