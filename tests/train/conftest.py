"""A tiny Llama folder with a byte tokenizer, text for it, and a configuration that trains it in a second."""

import os

import pytest
import torch
import yaml

TEXT = "The fox is quick and the dog is lazy. Numbers: 1 2 3 4 5 6 7 8 9. "


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i + 1 for i, letter in enumerate(letters)} | {"<end>": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, make_model):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """make_model(folder, **sizes) saves a random Llama with those sizes."""
    return lambda folder, **changes: _save_model(folder, tokenizer, changes)


def _save_model(folder, tokenizer, changes):
    from eightfold.models.decoder import Decoder, DecoderConfig
    from eightfold.models.loading import save_decoder

    sizes = {
        "model_type": "llama",
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    torch.manual_seed(1)
    save_decoder(Decoder(DecoderConfig(**{**sizes, **changes}), "fp32"), folder, tokenizer)
    return folder


@pytest.fixture
def weight_gradients(monkeypatch):
    """Of every FP8 weight gradient that is made, whether it was added to a sum."""
    from eightfold.nn import _products

    found, make = [], _products.weight_gradient

    def watched(columns, input_columns, dtype, total):
        found.append(total is not None)
        return make(columns, input_columns, dtype, total)

    monkeypatch.setattr(_products, "weight_gradient", watched)
    return found


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models gain nothing from threads, and lose much where other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    yield
    torch.set_num_threads(before)
    del os.environ["OMP_NUM_THREADS"]


@pytest.fixture
def text_folder(tmp_path):
    return write_text(tmp_path / "text")


def write_text(folder):
    folder.mkdir()
    for number in range(24):
        words = TEXT.split()[number % 7 :] * (2 + number % 3)
        (folder / f"{number:02}.txt").write_text(" ".join([str(number), *words]))
    return folder


@pytest.fixture
def settings(tmp_path, model_folder, text_folder):
    """Nested values of a configuration; tests change them and call parse_config."""
    return make_settings(model_folder, text_folder, tmp_path / "run")


@pytest.fixture(scope="session")
def ended_run(tmp_path_factory, model_folder):
    """Output folder of a run of the ``settings`` that has ended: checkpoints at steps 3 and 6. Copy it."""
    from eightfold.train.config import parse_config
    from eightfold.train.loop import train

    root = tmp_path_factory.mktemp("ended")
    train(parse_config(make_settings(model_folder, write_text(root / "text"), root / "run")))
    return root / "run"


def make_settings(model_folder, text_folder, output):
    return {
        "model": {"path": str(model_folder), "precision": "fp32"},
        "data": {"path": str(text_folder), "sequence_length": 32, "held_out": 0.15},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "output": str(output),
        "steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "eval_every": 3,
        "eval_sequences": 6,
        "checkpoint_every": 3,
        "tensorboard": False,
        "device": "cpu",
    }


@pytest.fixture
def config_file(tmp_path, settings):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
