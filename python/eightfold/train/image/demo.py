"""`eightfold train --demo image`: a tiny class-conditional SANA learns pictures of 32 x 32 pixels on a CPU.

Pictures come from a folder or an archive (`--images`), or are drawn here: then the sheet says so.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import yaml

from eightfold.train.image.config import ImageConfig, parse_image_config
from eightfold.train.image.loop import train_image
from eightfold.train.image.model import load_image_model, save_image_model
from eightfold.train.image.samples import sample_classes, to_pixels, write_sheet
from eightfold.train.image.shapes import draw_shapes

STEPS = 1000
DRAWN = 200  # pictures of each class
SIZE, SHIFT = 32, 3.0
GUIDANCE, SAMPLER_STEPS, COLUMNS, ROWS = 2.5, 20, 8, 10
WIDTH, LAYERS = 128, 5


def run(output: Path, steps: int | None = None, images: Path | None = None) -> int:
    """Trains in ``output`` and writes samples.png, loss.png and the folder model there; returns an exit code."""
    start = time.perf_counter()
    shutil.rmtree(output / "run", ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    drawn = images is None
    if drawn:
        shutil.rmtree(output / "shapes", ignore_errors=True)
        images = draw_shapes(output / "shapes", DRAWN)
    config = demo_config(images, output / "run", steps or STEPS)
    (output / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    what = "drawn shapes (use --images FOLDER_OR_ZIP for pictures of your own)" if drawn else str(images)
    print(f"A SANA of {LAYERS} blocks, {WIDTH} wide, learns {what}.\n", flush=True)
    result = train_image(config)
    shutil.copy(output / "run" / "loss.png", output / "loss.png")

    model = load_image_model(result.model, "fp32").eval()
    folder = save_image_model(model, output / "model")
    names = model.captions.names[:ROWS]
    labels = [label for label in range(len(names)) for _ in range(COLUMNS)]
    pixels = to_pixels(sample_classes(model, labels, (SIZE, SIZE), SAMPLER_STEPS, GUIDANCE, SHIFT))
    rows = {name: pixels[row * COLUMNS : (row + 1) * COLUMNS] for row, name in enumerate(names)}
    title = f"Flow-DPM-Solver, {SAMPLER_STEPS} steps, guidance {GUIDANCE}{'; of drawn shapes' if drawn else ''}"
    write_sheet(output / "samples.png", rows, title=title)

    print()
    if result.held_out:
        before, after = (result.held_out[step] for step in (min(result.held_out), max(result.held_out)))
        print(f"Held-out loss {before:.4f} before, {after:.4f} after {config.steps} steps;")
    print(f"{result.images_per_second:,.1f} pictures/s, {time.perf_counter() - start:.0f} s in all.")
    print(f"Samples: {output / 'samples.png'}; curve: {output / 'loss.png'}; model: {folder}")
    print(f"Make:    eightfold generate {folder} --image --guidance {GUIDANCE} --output {output / 'pictures.png'}")
    print(f"Go on:   eightfold sana train {output / 'config.yaml'} --resume latest steps={4 * config.steps}")
    print(f"Prune:   eightfold sana prune {folder} {output / 'pruned'} --layers {LAYERS - 1}")
    return 0


def demo_config(images: Path, output: Path, steps: int) -> ImageConfig:
    heads = WIDTH // 32
    return parse_image_config(
        {
            "model": {
                "precision": "fp32",
                "sizes": {
                    "num_layers": LAYERS,
                    "num_attention_heads": heads,
                    "attention_head_dim": 32,
                    "num_cross_attention_heads": heads,
                    "cross_attention_head_dim": 32,
                    "in_channels": 3,
                    "out_channels": 3,
                    "caption_channels": 64,
                    "qk_norm": True,
                    "sample_size": SIZE,
                    "patch_size": 4,
                    "interpolation_scale": 1.0,
                },
            },
            "data": {"path": str(images), "resolution": SIZE, "held_out": 0.02},
            "flow": {"shift": SHIFT},
            "optimizer": {
                "lr": 2e-3,
                "warmup_steps": min(50, steps // 2),
                "max_grad_norm": 1.0,
                "schedule": "cosine",
            },
            "ema": {"decay": 0.99},
            "output": str(output),
            "steps": steps,
            "batch_size": 32,
            "device": "cpu",
            "deterministic": False,
            "eval_every": max(1, steps // 6),
            "eval_images": 128,
            "log_every": max(1, steps // 30),
            "checkpoint_every": 0,
            "tensorboard": False,
        }
    )
