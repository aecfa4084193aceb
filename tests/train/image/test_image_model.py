"""Folders of image models: saved, read back, and one line for what is wrong with one."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eightfold.models.sana_loading import load_sana
from eightfold.train.image.captions import Captions
from eightfold.train.image.model import ImageModel, load_image_model, read_image_model, save_image_model
from small_image_model import image_model, inputs


@pytest.fixture
def folder(tmp_path):
    return save_image_model(image_model("fp32"), tmp_path / "model")


def test_saved_and_read_back(folder):
    model, read = image_model("fp32"), load_image_model(folder, "fp32")
    assert read.captions.names == ("blue", "green", "red")
    assert all(parameter.requires_grad for parameter in read.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    with torch.no_grad():  # a folder of diffusers, too
        assert torch.equal(load_sana(folder, "fp32")(**inputs(model.sana)), model.sana(**inputs(model.sana)))
    with safe_open(folder / "embeddings.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["captions"]) == ["blue", "green", "red"]


def test_other_values_under_the_same_names(tmp_path):
    model = image_model("fp32")
    half = {name: (tensor / 2).bfloat16() for name, tensor in model.state_dict().items()}
    save_image_model(model, tmp_path / "model", half)
    for name, tensor in read_image_model(model, tmp_path / "model").items():
        assert torch.equal(tensor, half[name]), name


def test_models_that_differ(folder):
    with pytest.raises(ValueError, match="of another model: its num_layers is 3, the run's 2"):
        read_image_model(image_model("fp32", num_layers=2), folder)
    other = ImageModel(image_model("fp32").sana, Captions(8, 2, ("cat", "dog", "fox")))
    with pytest.raises(ValueError, match="its classes are not those of the data"):
        read_image_model(other, folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeddings": torch.zeros(3, 2, 8)}, "negative: expected 2 dimensions, got None"),
        (
            {"negative": torch.zeros(2, 8), "embeddings": torch.zeros(2, 2, 8)},
            r"embeddings: expected shape \(3, 2, 8\)",
        ),
        ({"negative": torch.zeros(2, 8)}, "missing 1 tensor: embeddings"),
        (
            {"negative": torch.zeros(2, 6), "embeddings": torch.zeros(3, 2, 6)},
            "expected 8 channels as the transformer, got 6",
        ),
    ],
)
def test_bad_captions(folder, tensors, message):
    save_file(tensors, folder / "embeddings.safetensors", {"captions": '["blue", "green", "red"]'})
    with pytest.raises(ValueError, match=message):
        load_image_model(folder)
    (folder / "embeddings.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"embeddings\.safetensors: truncated"):
        load_image_model(folder)
