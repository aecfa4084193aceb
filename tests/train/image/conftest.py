"""A small folder of pictures with three classes, and a configuration that trains on it in a second."""

import pytest
from PIL import Image, ImageDraw

COLOURS = {"blue": (40, 60, 220), "green": (30, 180, 60), "red": (220, 40, 40)}


def draw_pictures(folder, count=12, size=(8, 8)):
    for kind, colour in COLOURS.items():
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            picture = Image.new("RGB", size, (200, 200, 200))
            ImageDraw.Draw(picture).rectangle((number % 3, number % 4, number % 3 + 3, number % 4 + 3), fill=colour)
            picture.save(folder / kind / f"{number:02}.png")
    return folder


TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "in_channels": 3,
    "out_channels": 3,
    "caption_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
}


@pytest.fixture
def pictures(tmp_path):
    return draw_pictures(tmp_path / "pictures")


@pytest.fixture
def settings(tmp_path, pictures):
    return make_settings(pictures, tmp_path / "run")


def make_settings(pictures, output):
    return {
        "model": {"sizes": dict(TINY), "precision": "fp32"},
        "data": {"path": str(pictures), "resolution": 8, "held_out": 0.2},
        "captions": {"tokens": 2},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "output": str(output),
        "steps": 6,
        "batch_size": 8,
        "eval_every": 3,
        "checkpoint_every": 3,
        "tensorboard": False,
        "device": "cpu",
    }
