"""`eightfold generate --image`: images of texts or classes in a grid, or in a folder."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from eightfold.generate.image import ImageSampler, OnStep
from eightfold.generate.pictures import grid, picture, save_png
from eightfold.generate.prompts import TABLE, PromptEncoder, Prompts, read_prompts
from eightfold.generate.scaling import Judge, Tournament, candidate_seeds, load_judge, tournament
from eightfold.models.sana_loading import load_sana

_COLUMNS = 8  # of a grid with one image to a text
_SHOWN = 10  # failures of a judge that are shown, of all


def run(args: argparse.Namespace) -> int:
    """Images of `args.model` for every text and every seed; see the command line's help for the rest. What was made
    goes to standard output; progress and failures of a judge go to standard error."""
    seeds = numbers("--seeds", args.seeds) if args.seeds is not None else [args.seed]
    classes = None if args.classes is None else numbers("--classes", args.classes)
    size = None if args.size is None else _size(args.size)
    if (args.best_of is None) != (args.judge is None):
        raise ValueError(f"--{'judge' if args.judge else 'best-of'}: --judge and --best-of go together")
    judge = None if args.judge is None else load_judge(args.judge)
    if judge is not None and args.best_of < 1:
        raise ValueError(f"--best-of: expected 1 or more, got {args.best_of}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = _prompts(args, classes, device)
    model = load_sana(args.model, precision=args.precision, device=device).eval()
    sampler = _sampler(args, model, device)
    side = model.config.sample_size * sampler.ratio
    given = {name: getattr(args, name) for name in ("steps", "guidance", "solver", "shift", "batch")}
    options = {name: value for name, value in given.items() if value is not None}
    options["height"], options["width"] = size or (side, side)

    begin = time.perf_counter()
    if judge is None:
        images, notes = _images(sampler, prompts, seeds, options), []
    else:
        images, notes = _chosen(sampler, prompts, seeds, options, judge, args.best_of)
    seconds = time.perf_counter() - begin
    files = _save(images, prompts.captions, len(seeds), Path(args.output or "images.png"))
    for note in notes:
        print(note)
    shape = f"{options['height']}x{options['width']}"
    print(f"done: {len(images)} images of {shape} in {files}; {seconds:.1f} s")
    return 0


def numbers(flag: str, text: str) -> list[int]:
    """The numbers of a list such as 0,2,5-8."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"{flag}: expected numbers such as 0,2,5-8, got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"--size: expected HEIGHTxWIDTH, got {text!r}")
    return int(match[1]), int(match[2])


def _prompts(args: argparse.Namespace, classes: list[int] | None, device: str) -> Prompts:
    if args.encoder is None:
        wrong = [f"--{name}" for name in ("instruction", "negative") if getattr(args, name) is not None]
        if args.prompt is not None or wrong:
            raise ValueError(f"{(wrong or ['prompt'])[0]}: only with --encoder")
        table = Path(args.model) / TABLE if args.embeddings is None else Path(args.embeddings)
        if args.embeddings is None and not table.is_file():
            raise ValueError(f"--embeddings: expected a file, or --encoder, as {args.model} has no {TABLE}")
        prompts = read_prompts(table)
        return prompts if classes is None else prompts.rows(classes)
    if args.embeddings is not None or classes is not None:
        raise ValueError(f"--{'classes' if args.embeddings is None else 'embeddings'}: not with --encoder")
    texts = (
        [args.prompt] if args.prompt is not None else [line for line in sys.stdin.read().splitlines() if line.strip()]
    )
    if not texts:
        raise ValueError("prompt: expected some text, got none")
    instruction = ""
    if args.instruction is not None:
        instruction = Path(args.instruction).read_text(encoding="utf-8").removesuffix("\n")
    return PromptEncoder(args.encoder, device, instruction).encode(texts, args.negative or "")


def _sampler(args: argparse.Namespace, model, device: str) -> ImageSampler:
    folder = Path(args.model) / "vae" if args.vae is None else Path(args.vae)
    if args.vae is None and not folder.is_dir():
        return ImageSampler(model)
    from eightfold.models.dc_ae_loading import load_dc_ae

    decoder = load_dc_ae(folder, device=device)
    channels = decoder.config.latent_channels
    if channels != model.config.in_channels:
        raise ValueError(
            f"--vae: expected latents of {model.config.in_channels} channels as the model's, got {channels}"
        )
    return ImageSampler(model, decoder.decode, decoder.config.ratio)


def _images(sampler: ImageSampler, prompts: Prompts, seeds: list[int], options: dict) -> list[Image.Image]:
    """For each text one of each seed."""
    with _progress() as on_step:
        return [picture(image) for image in _sample(sampler, prompts, seeds * len(prompts), options, on_step)]


def _sample(sampler: ImageSampler, prompts: Prompts, seeds, options: dict, on_step: OnStep | None) -> torch.Tensor:
    texts = prompts.embeddings, prompts.mask, prompts.negative, prompts.negative_mask
    return sampler.sample(*texts, seeds=seeds, on_step=on_step, **options)


def _chosen(
    sampler: ImageSampler, prompts: Prompts, seeds: list[int], options: dict, judge: Judge, count: int
) -> tuple[list[Image.Image], list[str]]:
    """For each text and seed the winner among `count` images, and a line on each."""
    winners, notes, failed, asked = [], [], 0, 0
    for row, caption in enumerate(prompts.captions):
        for seed in seeds:
            candidates, own = candidate_seeds(seed, count), prompts.rows([row])
            with _progress() as on_step:
                made = [picture(image) for image in _sample(sampler, own, candidates, options, on_step)]
            found = tournament(made, caption, judge)
            winners.append(made[found.winner])
            notes.append(_note(caption, seed, candidates, found))
            for number in found.failures:
                failed += 1
                if failed <= _SHOWN:
                    line = f"judge: {caption!r}, seed {candidates[number]}: {found.judgements[number].failure}"
                    print(line, file=sys.stderr)
            asked += count
    if failed:
        print(f"judge: failed for {failed} of {asked} images, which count as no", file=sys.stderr)
    return winners, notes


def _note(caption: str, seed: int, candidates: range, found: Tournament) -> str:
    best = found.judgements[found.winner]
    answer = "failed" if best.failure else f"{'yes' if best.yes else 'no'}, score {best.score:.4g}"
    return f"{caption!r}, seed {seed}: candidate seed {candidates[found.winner]} of {len(candidates)}: {answer}"


def _save(images: list[Image.Image], captions: tuple[str, ...], each: int, output: Path) -> Path:
    """One grid, with a column for each seed; or in a folder the images, named by text and seed, and the grid."""
    under = [caption for caption in captions for _ in range(each)]
    page = grid(images, under, each if each > 1 else _COLUMNS)
    if output.suffix.lower() == ".png":
        return save_png(page, output)
    for number, image in enumerate(images):
        save_png(image, output / f"{number // each:04d}_{number % each:04d}.png")
    save_png(page, output / "grid.png")
    return output


@contextmanager
def _progress() -> Iterator[OnStep | None]:
    """A bar on a terminal, fed by steps; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("steps", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
