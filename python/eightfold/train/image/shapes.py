"""Drawn shapes in three colours, for a demonstration on a machine that has no pictures: a folder for each class."""

from __future__ import annotations

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (215, 50, 45), "green": (50, 165, 70), "blue": (50, 85, 210)}
CORNERS = {"disc": 0, "triangle": 3, "square": 4}
SIZE, _FINE = 32, 4  # pixels of a side, and how much finer shapes are drawn


def draw_shapes(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes `count` PNG files of 32 x 32 pixels for each of nine classes ("red disc"): place, size, turn and the grey
    behind vary."""
    for number, (colour, shape) in enumerate((c, s) for c in COLOURS for s in CORNERS):
        kind, draw = folder / f"{colour} {shape}", random.Random(seed * 100 + number)
        kind.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            _shape(draw, COLOURS[colour], CORNERS[shape]).save(kind / f"{index:05}.png")
    return folder


def _shape(draw: random.Random, colour: tuple[int, int, int], corners: int) -> Image.Image:
    side = SIZE * _FINE
    grey, glow = draw.randint(170, 250), draw.uniform(0.8, 1.1)
    picture = Image.new("RGB", (side, side), (grey, grey, grey))
    radius = draw.uniform(0.22, 0.36) * side
    x, y = (draw.uniform(radius, side - radius) for _ in range(2))
    fill = tuple(min(255, round(part * glow)) for part in colour)
    pen = ImageDraw.Draw(picture)
    if corners:
        turn = draw.uniform(-0.3, 0.3) - math.pi / 2 + (math.pi / 4 if corners == 4 else 0)
        angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
        pen.polygon([(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles], fill=fill)
    else:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)
