"""`python -m bench [family ...] [--device cpu|cuda] [--results DIR]`; of `step` also its parts, by name."""

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path

from . import FAMILIES, LONG
from .common import Bench


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="eightfold bench", description="Time the kernels of this machine.")
    parser.add_argument(
        "families", nargs="*", help=f"which ({', '.join(FAMILIES + LONG)}); default: all but {', '.join(LONG)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is one")
    parser.add_argument("--results", type=Path, help="also write JSON lines under this folder")
    parser.add_argument("--commit", help="what the results are of, where there is no git checkout")
    parser.add_argument(
        "--kernels",
        type=int,
        default=0,
        metavar="N",
        help="of decode and rl_training on a GPU: also the N longest kernels",
    )
    options = parser.parse_args(arguments)
    # Read at the first allocation: micro-batches that fill the memory shall not fail for holes in it.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    whole = [name for name in (*FAMILIES, *LONG) if name != "step"]
    steps = set(options.families) - set(whole)
    runs = {name: _runner(name) for name in whole}
    if steps:
        parts = _parts(options.device)
        unknown = steps - {"step", *parts}
        if unknown:
            known = ", ".join(FAMILIES + LONG)
            parser.error(
                f"unknown family {', '.join(sorted(unknown))}; known: {known}; parts of step: {', '.join(parts)}"
            )
        runs |= {
            name: run for name, run in parts.items() if name in steps or ("step" in steps and "-variants" not in name)
        }
    chosen = [name for name in runs if name in options.families or name not in whole]
    for name in chosen or FAMILIES:
        bench = Bench(options.device, kernels=options.kernels)
        runs[name](bench)
        bench.report(name if name in whole else f"step-{name}", options.results, options.commit)


def _runner(family: str) -> Callable[[Bench], None]:
    return lambda bench: importlib.import_module(f"{__package__}.{family}").run(bench)


def _parts(device: str | None) -> dict[str, Callable[[Bench], None]]:
    import torch

    from . import step

    return step.parts((device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda")


if __name__ == "__main__":
    main()
