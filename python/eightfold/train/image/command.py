"""The arguments of `eightfold sana`; nothing slow is imported here."""

import argparse
from collections.abc import Callable


def add_sana_parts(
    sana: argparse.ArgumentParser,
    runs: dict[str, Callable[[argparse.Namespace], int]],
    add_settings: Callable[[argparse.ArgumentParser, str], None],
) -> list[argparse.ArgumentParser]:
    """The parsers of train, grow and prune, which call `runs`; `add_settings` adds what reads a configuration."""
    parts = sana.add_subparsers(dest="part", required=True, metavar="PART")

    train = parts.add_parser("train", help="train on pictures with classes or text embeddings")
    add_settings(train, "optimizer.lr=1e-4")
    train.add_argument("--data", help="folder of pictures, .zip, .npz, .npy, or CIFAR's batches")
    train.add_argument("--output", help="folder for logs, the loss curve and checkpoints (default: image_run)")
    train.add_argument("--precision", help="fp8, bf16 or fp32")
    train.add_argument("--steps", type=int, help="optimizer steps")
    train.set_defaults(run=runs["train"])

    grow = parts.add_parser("grow", help="add blocks that begin as identities (SANA-1.5)")
    prune = parts.add_parser("prune", help="remove the blocks that change the least, measured while sampling")
    for part in (grow, prune):
        part.add_argument("model", help="folder of a saved model, or a training run's")
        part.add_argument("output", help="folder: a new name, empty, or a saved model to replace")
        part.add_argument("--layers", type=int, required=True, help="blocks of the new model")
    grow.add_argument("--keep", type=int, help="first blocks that stay (default: all but the last two)")
    grow.add_argument("--seed", type=int, default=0)
    grow.set_defaults(run=runs["grow"])
    prune.add_argument("--samples", type=int, default=32, help="pictures made to measure (default: 32)")
    prune.add_argument("--batch", type=int, default=8, help="pictures at once")
    prune.add_argument("--steps", type=int, default=20, help="of Flow-DPM-Solver")
    prune.add_argument("--shift", type=float, default=3.0, help="flow.shift of the model's training")
    prune.add_argument("--size", type=int, help="side of the latents (default: the config's sample_size)")
    prune.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="bf16")
    prune.set_defaults(run=runs["prune"])
    return [train, grow, prune]
