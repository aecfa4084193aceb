"""Pictures as latents of one or of many sizes, in memory, and the endless walk through them.

Without an autoencoder a picture's latents are its pixels, 3 channels from -1 to 1. An `Encoder`'s are kept as float16,
of the picture and of its mirror image, and in the folder `cache` in parts of 512 pictures: a part's name is the hash of
the encoder's name, the size and the files' content, so that only what has changed is encoded again.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from eightfold.models.files import read_safetensors_file
from eightfold.train.image.config import ImageDataConfig
from eightfold.train.image.sources import BadPicture, Pictures
from eightfold.train.order import Cursor

PART = 512  # pictures of a file of the cache, and of a call of `ready`
_HELD_OUT = 0x5EED
_WIDEST = 4  # of a bucket's sides the longer over the shorter, at most


class Encoder(Protocol):
    """An autoencoder's first half: pictures float32 [B, 3, H, W] from -1 to 1 to latents [B, C, H / compression,
    W / compression], scaled to about unit variance. `name` says which one in the cache: weights and scale."""

    name: str
    compression: int

    def __call__(self, pictures: Tensor) -> Tensor: ...


@dataclass
class Bucket:
    """Pictures of one size. `data` is uint8 [N, 1, 3, H, W], or float16 [N, 1 or 2, C, h, w] of an encoder, the second
    that of the mirror image; `labels` has what each one's caption is (a class, or a row of of a text file)."""

    data: Tensor
    labels: list[int]

    def latents(self, places: np.ndarray, mirrored: np.ndarray | None = None) -> Tensor:
        """float32 [B, C, H, W] of the pictures at `places`, mirrored where `mirrored` bool [B]."""
        chosen = np.zeros(len(places), bool) if mirrored is None else mirrored
        if self.data.dtype != torch.uint8:
            return self.data[torch.from_numpy(places), torch.from_numpy(chosen.astype(np.int64))].float()
        pixels = self.data[torch.from_numpy(places), 0].float() / 127.5 - 1
        return torch.where(torch.from_numpy(chosen)[:, None, None, None], pixels.flip(-1), pixels)


@dataclass(frozen=True)
class Batch:
    """Latents float32 [B, C, H, W] on the CPU, and their labels."""

    latents: Tensor
    labels: list[int]


@dataclass
class ImageData:
    """What `load_images` gives. `names` are those of the pictures in use; `skipped` has the others and why."""

    train: list[Bucket]
    held_out: list[Bucket]
    classes: tuple[str, ...]
    skipped: list[tuple[str, str]]
    fingerprint: str
    flip: bool
    seed: int

    def cursor(self, batch_size: int) -> Cursor:
        """Walks through the batches of `batch_size` of all buckets; a bucket's last batch is filled up with its first
        pictures of that epoch."""
        depends_on = "pictures, data.resolution, data.buckets, data.held_out, batch_size or seed"
        count = sum(_batches(bucket, batch_size) for bucket in self.train)
        return Cursor(count, self.seed, f"{self.fingerprint}-{batch_size}", depends_on)

    def take(self, cursor: Cursor, batch_size: int, generator: np.random.Generator) -> Batch:
        """The next batch; `generator` says which pictures are mirrored."""
        epoch = cursor.epoch
        (number,) = cursor.take(1)
        place = 0
        while number >= (count := _batches(self.train[place], batch_size)):
            place, number = place + 1, number - count
        bucket = self.train[place]
        order = np.random.default_rng([self.seed, epoch, place]).permutation(len(bucket.labels))
        chosen = order[np.arange(number * batch_size, (number + 1) * batch_size) % len(order)]
        mirrored = generator.random(batch_size) < 0.5 if self.flip else None
        return Batch(bucket.latents(chosen, mirrored), [bucket.labels[each] for each in chosen])

    def evaluation(self, count: int, size: int) -> list[Batch]:
        """The first `count` held-out pictures in batches of at most `size`."""
        batches = []
        for bucket in self.held_out:
            for begin in range(0, min(count, len(bucket.labels)), size):
                places = np.arange(begin, min(begin + size, count, len(bucket.labels)))
                batches.append(Batch(bucket.latents(places), [bucket.labels[each] for each in places]))
            count -= min(count, len(bucket.labels))
        return batches


def load_images(
    pictures: Pictures,
    config: ImageDataConfig,
    seed: int,
    channels: int,
    patch: int,
    encoder: Encoder | None = None,
    label_of: Callable[[str], int | None] | None = None,
    device: torch.device | str = "cpu",
) -> ImageData:
    """Decodes, scales and crops all pictures, and encodes them where an `encoder` is given (on `device`).

    `channels` and `patch` are the transformer's; `label_of` gives the label of a picture by name, None to skip it;
    labels are classes otherwise. ValueError naming the key where a size or the channels do not fit, or no picture is
    left.
    """
    unit = patch * (1 if encoder is None else encoder.compression)
    if config.resolution % unit:
        raise ValueError(
            f"data.resolution: expected a multiple of {unit} (patches of the latents), got {config.resolution}"
        )
    if encoder is None and channels != 3:
        raise ValueError(f"in_channels: expected 3 for pixels, as no autoencoder is given, got {channels}")
    sizes = bucket_sizes(config.resolution, unit) if config.buckets else [(config.resolution, config.resolution)]
    decoded: dict[tuple[int, int], list[tuple[bytes, np.ndarray, int]]] = {size: [] for size in sizes}
    skipped = list(pictures.skipped)
    for index, name in enumerate(pictures.names):
        kind = pictures.labels[index] if label_of is None else label_of(name)
        if kind is None:
            skipped.append((name, "no caption"))
            continue
        try:
            digest, picture = pictures.read(index)
        except BadPicture as error:
            skipped.append((name, str(error)))
            continue
        size = nearest_size(picture.size, sizes)
        decoded[size].append((digest, fitted(picture, size), kind))
    hashed = hashlib.blake2b(repr((sizes, config.held_out, seed, encoder and encoder.name)).encode(), digest_size=16)
    train, held_out = [], []
    for place, (size, found) in enumerate(decoded.items()):
        if not found:
            continue
        digests, pixels, labels = zip(*found, strict=True)
        hashed.update(repr((size, digests, labels)).encode())
        data = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)[:, None].contiguous()
        if encoder is not None:
            data = _encoded(data, digests, encoder, config, channels, device)
        order = np.random.default_rng([seed, _HELD_OUT, place]).permutation(len(labels))
        cut = round(config.held_out * len(labels))
        for part, target in ((order[:cut], held_out), (order[cut:], train)):
            if len(part):
                target.append(Bucket(data[torch.from_numpy(part)], [labels[each] for each in part]))
    if not train:
        reason = f": {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise ValueError(f"data.path: {config.path}: no picture is left ({len(skipped)} skipped{reason})")
    return ImageData(train, held_out, pictures.classes, skipped, hashed.hexdigest(), config.flip, seed)


def bucket_sizes(resolution: int, unit: int) -> list[tuple[int, int]]:
    """(height, width) of about resolution^2 pixels, both multiples of `unit`, sides at most 4 to 1."""
    tiles = resolution // unit
    rows = range(max(1, math.ceil(tiles / math.sqrt(_WIDEST))), math.floor(tiles * math.sqrt(_WIDEST)) + 1)
    return [(row * unit, max(1, round(tiles * tiles / row)) * unit) for row in rows]


def nearest_size(picture: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Of `sizes` (height, width) the one whose shape is nearest to that of a picture (width, height)."""
    shape = math.log(picture[0] / picture[1])
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - shape))


def fitted(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3]: scaled until it covers `size`, then cut to it around its middle."""
    height, width = size
    if picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        wide, high = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
        picture = picture.resize((wide, high), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
        left, top = (wide - width) // 2, (high - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture)


def _batches(bucket: Bucket, size: int) -> int:
    return -(-len(bucket.labels) // size)


def _encoded(
    pixels: Tensor, digests: tuple[bytes, ...], encoder: Encoder, config: ImageDataConfig, channels: int, device
) -> Tensor:
    """Latents float16 [N, 1 or 2, C, h, w] of pixels uint8 [N, 1, 3, H, W], from the cache where it has them."""
    parts, size = [], tuple(pixels.shape[-2:])
    wanted = (1 + config.flip, channels, *(side // encoder.compression for side in size))
    for begin in range(0, len(pixels), PART):
        part = slice(begin, begin + PART)
        key = hashlib.blake2b(repr((encoder.name, size, config.flip, digests[part])).encode(), digest_size=16)
        file = None if config.cache is None else Path(config.cache) / f"latents-{key.hexdigest()}.safetensors"
        if file is not None and file.is_file():
            latents = read_safetensors_file(file)["latents"]
        else:
            latents = _encode(pixels[part, 0], encoder, config.flip, device)
        if tuple(latents.shape[1:]) != wanted:
            got = tuple(latents.shape[1:])
            raise ValueError(
                f"latents of {encoder.name}: expected (images, channels, height, width) {wanted}, got {got}: "
                f"in_channels of the model is {channels}"
            )
        if file is not None and not file.is_file():
            _store(latents, file)
        parts.append(latents)
    return torch.cat(parts)


@torch.no_grad()
def _encode(pixels: Tensor, encoder: Encoder, flip: bool, device: torch.device | str) -> Tensor:
    made = []
    for few in pixels.split(8):
        pictures = few.to(device).float() / 127.5 - 1
        both = (pictures, pictures.flip(-1)) if flip else (pictures,)
        made.append(torch.stack([encoder(each) for each in both], dim=1).to("cpu", torch.float16))
    latents = torch.cat(made)
    if not latents.isfinite().all():
        raise ValueError(f"latents of {encoder.name}: not finite in float16")
    return latents


def _store(latents: Tensor, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        save_file({"latents": latents.contiguous()}, work)
        os.replace(work, file)
    finally:
        work.unlink(missing_ok=True)
