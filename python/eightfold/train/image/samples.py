"""Pictures of a model of classes by Flow-DPM-Solver and classifier-free guidance, and a sheet of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eightfold.generate.flow import flow_dpm, solve
from eightfold.train.image.model import ImageModel
from eightfold.train.order import step_generator

_NOISE = 0x51A2  # what random numbers are for


@torch.no_grad()
def sample_classes(
    model: ImageModel,
    labels: Sequence[int],
    size: tuple[int, int],
    steps: int = 20,
    guidance: float = 4.5,
    shift: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Latents float32 [B, channels, H, W] of classes `labels`, at `size` (H, W); the noise of the n-th depends on
    `seed` and n alone. ValueError where the model has no classes."""
    if model.captions.classes is None:
        raise ValueError("model: expected one of classes, got one whose captions are text")
    device, sana, count = model.device, model.sana, len(labels)
    shape = (model.config.in_channels, *size)
    noise = np.stack([step_generator(seed, _NOISE, n).standard_normal(shape, dtype=np.float32) for n in range(count)])
    captions = model.captions.classes[torch.tensor(labels, device=device)]
    text = sana.text_states(torch.cat([model.captions.null.expand(count, -1, -1), captions]))

    def velocity(x: Tensor, time: float) -> Tensor:
        times = torch.full((2 * count,), time * model.config.timestep_scale, device=device)
        empty, named = sana.velocity(torch.cat([x, x]), sana.time_states(times), text).chunk(2)
        return empty + guidance * (named - empty)

    return solve(flow_dpm(steps, shift), velocity, torch.from_numpy(noise).to(device))


def to_pixels(latents: Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] of pixels from -1 to 1, [B, 3, H, W]."""
    scaled = ((latents.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def write_sheet(file: Path, rows: dict[str, np.ndarray], zoom: int = 2, title: str = "") -> None:
    """PNG with a row of pictures uint8 [N, H, W, 3] for each name, which stands on its left."""
    font = ImageFont.load_default(13)
    first = next(iter(rows.values()))
    high, wide, gap = first.shape[1] * zoom, first.shape[2] * zoom, 4
    left = 16 + max(round(font.getlength(name)) for name in rows)
    top = 28 if title else gap
    columns = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (left + columns * (wide + gap), top + len(rows) * (high + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), title, fill="black", font=font)
    for row, (name, pictures) in enumerate(rows.items()):
        y = top + row * (high + gap)
        draw.text((8, y + high // 2 - 8), name, fill="black", font=font)
        for column, pixels in enumerate(pictures):
            picture = Image.fromarray(pixels).resize((wide, high), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * (wide + gap), y))
    sheet.save(file)
