"""Sizes, latents, the cache of an autoencoder's latents, and the walk through batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from eightfold.train.image import data as image_data
from eightfold.train.image.config import ImageDataConfig
from eightfold.train.image.data import bucket_sizes, fitted, load_images, nearest_size
from eightfold.train.image.sources import open_pictures
from eightfold.train.order import step_generator


class Halves:
    """An autoencoder's stand-in: means of 2 x 2 pixels, four channels."""

    name, compression = "halves", 2

    def __init__(self, channels=4):
        self.seen, self.channels = 0, channels

    def __call__(self, pictures):
        self.seen += len(pictures)
        small = torch.nn.functional.avg_pool2d(pictures, 2)
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1)[:, : self.channels]


def load(path, encoder=None, channels=None, patch=2, **options):
    config = ImageDataConfig(path=str(path), **{"resolution": 8, "held_out": 0.25, **options})
    channels = channels or (3 if encoder is None else 4)
    return load_images(open_pictures(path), config, 0, channels, patch, encoder)


def test_pixels_are_the_latents(pictures):
    found = load(pictures, flip=False)
    assert [len(bucket.labels) for bucket in (*found.train, *found.held_out)] == [27, 9]
    batch = found.take(found.cursor(4), 4, step_generator(0, 0, 0))
    assert batch.latents.dtype == torch.float32
    assert batch.latents.shape == (4, 3, 8, 8)
    want = {tuple(np.asarray(open_pictures(pictures).read(i)[1]).flatten()) for i in range(36)}
    for latents in batch.latents:
        pixels = ((latents.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
        assert tuple(pixels.flatten().tolist()) in want


def test_walk_sees_every_picture_once_an_epoch_and_goes_on(pictures):
    found = load(pictures, flip=False, held_out=1 / 3)
    cursor, seen = found.cursor(8), []
    for step in range(3):
        seen += [latents.numpy().tobytes() for latents in found.take(cursor, 8, step_generator(0, 0, step)).latents]
    assert cursor.epoch == 1
    assert sorted(seen) == sorted(bytes(found.train[0].latents(np.array([n])).numpy().tobytes()) for n in range(24))
    state = cursor.state_dict()
    ahead = found.take(cursor, 8, step_generator(0, 0, 3))
    again = found.cursor(8)
    again.load_state_dict(state)
    assert torch.equal(found.take(again, 8, step_generator(0, 0, 3)).latents, ahead.latents)
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        found.cursor(4).load_state_dict(state)
    (pictures / "red" / "00.png").unlink()
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        load(pictures, flip=False, held_out=1 / 3).cursor(8).load_state_dict(state)


def test_half_are_mirrored(pictures):
    plain, mirrored = load(pictures, flip=False), load(pictures)
    one, other = (d.take(d.cursor(27), 27, step_generator(0, 0, 0)).latents for d in (plain, mirrored))
    same = [torch.equal(a, b) for a, b in zip(one, other)]
    assert 5 < sum(same) < 22
    assert all(torch.equal(a.flip(-1), b) for a, b, kept in zip(one, other, same) if not kept)


def test_corrupt_files_are_skipped_and_named(pictures):
    (pictures / "red" / "05.png").write_bytes(b"no picture")
    found = load(pictures)
    ((name, reason),) = found.skipped
    assert name == "red/05.png"
    assert "cannot identify" in reason
    assert sum(len(bucket.labels) for bucket in (*found.train, *found.held_out)) == 35
    for file in pictures.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no picture is left \(36 skipped: blue/00.png: cannot identify"):
        load(pictures)


def test_unknown_resolution_and_channels(pictures):
    with pytest.raises(ValueError, match=r"data\.resolution: expected a multiple of 2 .*, got 9"):
        load(pictures, resolution=9)
    with pytest.raises(ValueError, match=r"data\.resolution: expected a multiple of 4 .*, got 10"):
        load(pictures, Halves(), resolution=10)
    with pytest.raises(ValueError, match=r"in_channels: expected 3 for pixels, .* got 4"):
        load(pictures, channels=4)
    with pytest.raises(
        ValueError, match=r"latents of halves: expected .*\(2, 4, 4, 4\), got \(2, 3, 4, 4\): in_channels"
    ):
        load(pictures, Halves(3))


def test_latents_are_cached_by_content(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "PART", 16)
    cache = tmp_path / "cache"
    first = Halves()
    made = load(pictures, first, cache=str(cache))
    assert first.seen == 2 * 36  # and mirrored
    assert len(list(cache.iterdir())) == 3
    assert made.train[0].data.shape == (27, 2, 4, 4, 4)
    again = Halves()
    assert torch.equal(load(pictures, again, cache=str(cache)).train[0].data, made.train[0].data)
    assert again.seen == 0
    Image.new("RGB", (8, 8)).save(pictures / "red" / "11.png")  # the last part
    changed = Halves()
    load(pictures, changed, cache=str(cache))
    assert changed.seen == 2 * 4
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"latents-\w+\.safetensors: truncated"):
        load(pictures, Halves(), cache=str(cache))


def test_mirrored_latents_are_those_of_the_mirrored_picture(pictures):
    bucket = load(pictures, Halves()).train[0]
    both = [bucket.latents(np.arange(27), np.full(27, mirrored)) for mirrored in (False, True)]
    torch.testing.assert_close(both[0].flip(-1), both[1])


def test_latents_that_float16_cannot_hold(pictures):
    wide = Halves()
    wide.__class__ = type("Wide", (Halves,), {"__call__": lambda self, x: Halves.__call__(self, x) * 1e6})
    with pytest.raises(ValueError, match="latents of halves: not finite"):
        load(pictures, wide)


def test_buckets_by_shape(tmp_path):
    for kind, size in (("wide", (40, 20)), ("high", (20, 40)), ("square", (30, 30))):
        (tmp_path / kind).mkdir()
        for number in range(6):
            Image.new("RGB", size, (number, 0, 0)).save(tmp_path / kind / f"{number}.png")
    found = load(tmp_path, resolution=16, buckets=True, held_out=0)
    shapes = sorted(tuple(bucket.data.shape[-2:]) for bucket in found.train)
    assert shapes == [(12, 22), (16, 16), (22, 12)]
    cursor, seen = found.cursor(4), set()
    for step in range(6):
        batch = found.take(cursor, 4, step_generator(0, 0, step))
        seen.add((tuple(batch.latents.shape[-2:]), *set(batch.labels)))
    assert seen == {((22, 12), 0), ((16, 16), 1), ((12, 22), 2)}
    assert cursor.epoch == 1


def test_sizes():
    sizes = bucket_sizes(64, 8)
    assert (64, 64) in sizes
    assert all(height % 8 == width % 8 == 0 for height, width in sizes)
    assert all(max(size) <= 4.5 * min(size) for size in sizes)
    assert all(0.8 < height * width / 64**2 < 1.25 for height, width in sizes)
    assert nearest_size((200, 100), sizes) == (48, 88)


def test_fitted_cuts_around_the_middle():
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, 5:15] = 255
    assert (fitted(Image.fromarray(pixels), (10, 10)) == 255).all()
    assert fitted(Image.fromarray(pixels), (4, 12)).shape == (4, 12, 3)
