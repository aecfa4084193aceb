"""Captions: learned ones of classes, text embeddings of a file, and which of several is drawn."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eightfold.train.image.captions import Captions, TextFile, caption_probabilities, choose
from eightfold.train.image.config import CaptionConfig

NAMES = ["a.png", "b.png", "a.png", "a.png"]


def write(file, names=NAMES, **changes):
    count = len(NAMES)
    tensors = {
        "embeddings": torch.arange(count * 6.0).view(count, 3, 2).bfloat16(),
        "mask": torch.tensor([[1, 1, 0]] * count, dtype=torch.uint8),
        "scores": torch.tensor([30.0, 10.0, 28.0, 20.0]),
        **changes,
    }
    metadata = {} if names is None else {"files": json.dumps(names)}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata)
    return file


def test_power_law_and_softmax():
    scores = np.array([30.0, 27.0, 24.0])
    got = caption_probabilities(scores, CaptionConfig(tau=0.5))
    np.testing.assert_allclose(got, [900 / 1629, 729 / 1629, 0], rtol=1e-12)
    got = caption_probabilities(scores, CaptionConfig(choice="softmax", tau=2.0, least_score=0))
    want = np.exp(scores / 2) / np.exp(scores / 2).sum()
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_array_equal(
        caption_probabilities(np.array([3.0, 9.0]), CaptionConfig()), [0, 1]
    )  # the best stays


def test_text_file(tmp_path):
    source = TextFile(write(tmp_path / "t.safetensors"), CaptionConfig(tau=0.5))
    assert source.label_of("c.png") is None
    labels = [source.label_of("b.png"), *[source.label_of("a.png")] * 400]
    generator = np.random.default_rng(0)
    chosen = choose(labels, source, generator)
    assert chosen.text.shape == (401, 3, 2)
    assert chosen.mask.tolist()[0] == [True, True, False]
    rows = (chosen.text[:, 0, 0] / 6).int()
    assert rows[0] == 1
    share = (rows[1:] == 0).float().mean()
    assert share == pytest.approx(900 / (900 + 784), abs=0.08)
    assert not (rows == 3).any()  # its score is below 25
    plain = TextFile(write(tmp_path / "p.safetensors", scores=None, mask=None), CaptionConfig())
    drawn = choose([plain.label_of("a.png")] * 300, plain, generator)
    assert drawn.mask.all()
    assert {0, 2, 3} == set((drawn.text[:, 0, 0] / 6).int().tolist())


def test_dropped_captions_are_the_learned_empty_one(tmp_path):
    source = TextFile(write(tmp_path / "t.safetensors"), CaptionConfig())
    captions = Captions(2, 3)
    chosen = choose([1, 0], source, np.random.default_rng(0))
    text, mask = captions.embed(chosen, torch.tensor([True, False]))
    assert torch.equal(text[0], captions.null)
    assert torch.equal(text[1], chosen.text[1])
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    classes = Captions(2, 3, ("cat", "dog"))
    text, mask = classes.embed(choose([1, 0, 1], None, np.random.default_rng(0)), torch.tensor([False, False, True]))
    assert mask is None
    assert torch.equal(text, torch.stack([classes.classes[1], classes.classes[0], classes.null]))
    text.sum().backward()
    assert classes.null.grad.eq(1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": None}, "expected a list 'files' in its metadata"),
        ({"embeddings": None}, "expected a tensor 'embeddings'"),
        ({"names": ["a.png"]}, r"embeddings: expected \[1 as of files, tokens, channels\], got \[4, 3, 2\]"),
        ({"mask": torch.ones(4, 2)}, r"mask: expected \[4, 3\], got \[4, 2\]"),
        ({"scores": torch.ones(3)}, r"scores: expected \[4\], got \[3\]"),
    ],
)
def test_bad_files(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"t.safetensors: {message}"):
        TextFile(write(tmp_path / "t.safetensors", **changes), CaptionConfig())


def test_files_that_are_none(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"t\.safetensors: truncated"):
        TextFile(tmp_path / "t.safetensors", CaptionConfig())
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        TextFile(tmp_path / "absent.safetensors", CaptionConfig())
