"""The flags of `eightfold generate --image`; nothing slow is imported here."""

import argparse

IMAGE = ("embeddings", "classes", "encoder", "instruction", "negative", "vae", "seeds", "size", "steps", "guidance")
IMAGE += ("solver", "shift", "batch", "best_of", "judge", "output")


def add_images(generate: argparse.ArgumentParser) -> None:
    group = generate.add_argument_group("images", "Texts are embeddings, or with --encoder the prompt (lines of it).")
    add = group.add_argument
    add("--image", action="store_true", help="a SANA transformer makes images; --output is a .png grid, or a folder")
    add("--embeddings", metavar="FILE", help="safetensors with embeddings, mask, negative (default: the model's own)")
    add("--classes", metavar="LIST", help="rows of the embeddings, such as 0,2,5-8 (default: all)")
    add("--encoder", metavar="FOLDER", help="instead of embeddings: a text encoder of transformers, for the prompt")
    add("--instruction", metavar="FILE", help="text that goes before each prompt, with --encoder")
    add("--negative", metavar="TEXT", help="prompt to lead away from, with --encoder (default: the empty one)")
    add("--vae", metavar="FOLDER", help="DC-AE decoder (default: the model's own; without one latents are pixels)")
    add("--seeds", metavar="LIST", help="an image of each text for each, such as 0,2,5-8 (default: --seed)")
    add("--size", metavar="HxW", help="pixels (default: what the model was made for)")
    add("--guidance", type=float, help="default: 4.5; 1 is none")
    add("--solver", choices=("flow-dpm", "flow-euler"), help="default: flow-dpm")
    add("--shift", type=float, help="of the steps towards noise (default: 3)")
    add("--batch", type=int, help="images at once (default: 16)")
    add("--best-of", type=int, metavar="N", help="make so many for each image and let --judge choose")
    add("--judge", metavar="PATH", help="module:function or file.py:function: (image, prompt) to (yes, score)")
