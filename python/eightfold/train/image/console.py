"""`eightfold sana grow` and `eightfold sana prune`, on folders that training saved."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from eightfold.models.sana_loading import load_sana, save_sana
from eightfold.train.image.growth import grow, kept_blocks
from eightfold.train.image.loop import model_folder
from eightfold.train.image.model import ImageModel, load_image_model, read_captions, save_image_model
from eightfold.train.image.prune import most_important, prune, sampled_importance


def run_grow(args: argparse.Namespace) -> int:
    source = model_folder(args.model)
    sana, captions = load_sana(source, "fp32"), read_captions(source)
    keep = kept_blocks(sana.config.num_layers, args.keep)
    grown = grow(sana, args.layers, keep, args.seed)
    if captions is None:
        folder = save_sana(grown, args.output)
    else:
        folder = save_image_model(ImageModel(grown, captions), args.output)
    print(f"done: the first {keep} of {sana.config.num_layers} blocks and {args.layers - keep} new ones in {folder}")
    print(f"train it: eightfold sana train CONFIG --model {folder}")
    return 0


def run_prune(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_image_model(model_folder(args.model), args.precision, device=device).eval()
    if not model.captions.names:
        raise ValueError(f"{args.model}: expected a model of classes; for text there is eightfold.train.image.prune")
    side = args.size or model.config.sample_size
    importance = sampled_importance(model, side, args.samples, args.batch, args.steps, args.shift)
    pruned = prune(model.sana, importance, args.layers)
    folder = save_image_model(ImageModel(pruned, model.captions), Path(args.output))
    kept = most_important(importance, args.layers)
    print("block  importance")
    for block, value in enumerate(importance):
        print(f"{block:5}  {value:.5f}{'' if block in kept else '  removed'}")
    print(f"done: {args.layers} of {len(importance)} blocks in {folder}")
    print(f"tune it: eightfold sana train CONFIG --model {folder}")
    return 0
