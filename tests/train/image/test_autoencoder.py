"""Training on the latents of a DC-AE from disk: what they are, where they are kept, and what does not fit."""

import dataclasses
import math
import shutil

import pytest
import torch

from dc_ae_models import SMALL, random_model
from eightfold.models import DCAE, load_dc_ae, save_dc_ae
from eightfold.train.image.autoencoder import load_encoder
from eightfold.train.image.config import ImageDataConfig, parse_image_config
from eightfold.train.image.data import load_images
from eightfold.train.image.loop import train_image
from eightfold.train.image.sources import open_pictures

CHANNELS, RATIO = SMALL.latent_channels, SMALL.ratio


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_dc_ae(random_model(SMALL), tmp_path_factory.mktemp("vae") / "small")


@pytest.fixture
def encoded(monkeypatch):
    """Batches that an autoencoder has encoded since the test began."""
    seen, encode = [], DCAE.encode
    monkeypatch.setattr(DCAE, "encode", lambda self, pictures: seen.append(len(pictures)) or encode(self, pictures))
    return seen


def of_latents(settings, saved, **data):
    sizes = {**settings["model"]["sizes"], "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 1}
    model = {**settings["model"], "sizes": sizes}
    return {**settings, "model": model, "data": {**settings["data"], "autoencoder": str(saved), **data}}


def test_latents_are_those_of_the_autoencoder(pictures, saved):
    config = ImageDataConfig(path=str(pictures), resolution=8, held_out=0)
    (bucket,) = load_images(open_pictures(pictures), config, 0, CHANNELS, 1, load_encoder(saved, CHANNELS)).train
    assert bucket.data.shape == (36, 2, CHANNELS, 8 // RATIO, 8 // RATIO)
    vae, source = load_dc_ae(saved), open_pictures(pictures)
    wanted = []
    for index in range(36):
        picture = torch.frombuffer(bytearray(source.read(index)[1].tobytes()), dtype=torch.uint8).view(1, 8, 8, 3)
        picture = picture.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            wanted.append(torch.cat([vae.encode(picture), vae.encode(picture.flip(-1))]))
    wanted = torch.stack(wanted)
    distances = torch.cdist(
        bucket.data.float().flatten(1), wanted.flatten(1)
    )  # a bucket has them in an order of its own
    assert distances.min(dim=1).values.max() < 2e-3 * wanted.flatten(1).norm(dim=1).mean()
    assert distances.argmin(dim=1).unique().numel() == 36


def test_name_is_of_weights_and_sizes(saved, tmp_path):
    encoder = load_encoder(saved, CHANNELS)
    assert encoder.compression == RATIO
    moved = shutil.copytree(saved, tmp_path / "moved")
    assert load_encoder(moved, CHANNELS).name == encoder.name
    model = load_dc_ae(saved)
    with torch.no_grad():
        model.encoder.conv_out.bias[0] += 1e-3
    assert load_encoder(save_dc_ae(model, tmp_path / "other"), CHANNELS).name != encoder.name
    scaled = DCAE(dataclasses.replace(SMALL, scaling_factor=0.5))
    scaled.load_state_dict(load_dc_ae(saved).state_dict())
    assert load_encoder(save_dc_ae(scaled, tmp_path / "scaled"), CHANNELS).name != encoder.name


def test_a_run_on_latents(settings, saved, tmp_path, encoded):
    plain = train_image(parse_image_config(of_latents(settings, saved)))
    assert sum(encoded) == 72  # each picture and its mirror image
    assert all(math.isfinite(loss) for loss in plain.losses)
    cache = {"cache": str(tmp_path / "latents")}
    first, again = (
        train_image(parse_image_config({**of_latents(settings, saved, **cache), "output": str(tmp_path / name)}))
        for name in ("first", "again")
    )
    assert sum(encoded) == 144  # the last run found them in the cache
    assert first.losses == again.losses == plain.losses
    assert [file.suffix for file in (tmp_path / "latents").iterdir()] == [".safetensors"]
    resumed = {
        **of_latents(settings, saved, **cache),
        "output": str(tmp_path / "again"),
        "resume": "latest",
        "steps": 8,
    }
    assert len(train_image(parse_image_config(resumed)).losses) == 2


def test_another_autoencoder_is_not_resumed_with(settings, saved, tmp_path):
    train_image(parse_image_config(of_latents(settings, saved)))
    model = load_dc_ae(saved)
    with torch.no_grad():
        model.encoder.conv_out.bias[0] += 1e-3
    other = of_latents(settings, save_dc_ae(model, tmp_path / "other"))
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        train_image(parse_image_config({**other, "resume": "latest", "steps": 8}))


def test_what_does_not_fit(settings, saved, tmp_path, encoded):
    wrong = of_latents(settings, saved)
    wrong["model"]["sizes"].update(in_channels=3, out_channels=3)
    grey = save_dc_ae(random_model(dataclasses.replace(SMALL, in_channels=1)), tmp_path / "grey")
    cases = [
        (wrong, ValueError, "small: expected 3 channels, those of the model's latents, got 4"),
        (of_latents(settings, grey), ValueError, "grey: expected 3 channels, those of pictures, got 1"),
        (of_latents(settings, tmp_path / "absent"), FileNotFoundError, "absent: expected a folder or a .safetensors"),
        (of_latents(settings, tmp_path), FileNotFoundError, r"config\.json"),
        (of_latents(settings, saved, resolution=10), ValueError, r"data\.resolution: expected a multiple of 4 "),
    ]
    for values, error, message in cases:
        with pytest.raises(error, match=message) as raised:
            train_image(parse_image_config(values))
        assert str(raised.value).startswith("data.")
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"encoder: expected None, as data\.autoencoder is .*small"):
        train_image(parse_image_config(of_latents(settings, saved)), encoder=lambda pictures: pictures)
    assert not encoded
    assert not (tmp_path / "run").exists()


def test_truncated_weights(settings, saved, tmp_path):
    broken = shutil.copytree(saved, tmp_path / "broken")
    (file,) = broken.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"data\.autoencoder: .*broken") as raised:
        train_image(parse_image_config(of_latents(settings, broken)))
    assert "\n" not in str(raised.value)
