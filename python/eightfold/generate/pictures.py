"""Images as files: PNG, one by one or in a grid with a caption under each."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eightfold.models.files import write_file

_LEAST = 96  # pixels that an image has in a grid at least: smaller ones are enlarged by a whole factor
_MARGIN, _FONT = 4, 12


def picture(image: Tensor) -> Image.Image:
    """uint8 [H, W, 3] as an image of Pillow."""
    return Image.fromarray(image.cpu().numpy())


def grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Images of one size, row by row, with a caption under each, cut to its width; none where all are empty."""
    if not images or len(captions) != len(images) or columns < 1:
        given = f"{len(images)} images, {len(captions)} captions, {columns} columns"
        raise ValueError(f"grid: expected images, a caption for each and 1 column or more, got {given}")
    factor = math.ceil(_LEAST / min(images[0].size))
    width, height = (factor * side for side in images[0].size)
    font = ImageFont.load_default(_FONT)
    below = 2 * _MARGIN + _FONT if any(captions) else _MARGIN
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, rows * (height + below) + _MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = _MARGIN + number % columns * (width + _MARGIN)
        top = _MARGIN + number // columns * (height + below)
        page.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + _MARGIN // 2), _cut(caption, width, font), fill="black", font=font)
    return page


def save_png(image: Image.Image, file: str | os.PathLike) -> Path:
    """Writes to a temporary name and renames. OSError naming the file."""

    def write(work: Path) -> None:
        work.parent.mkdir(parents=True, exist_ok=True)
        image.save(work, format="PNG")

    return write_file(Path(file), write)


def _cut(caption: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    line = " ".join(caption.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."
