"""`python -m bench [family ...] [--device cpu|cuda] [--results DIR]`; of `step` and `image` also their parts."""

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path

from . import FAMILIES, LONG, PARTED
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
        help="of decode, rl_training and image on a GPU: also the N longest kernels",
    )
    options = parser.parse_args(arguments)
    if any(family.startswith("rl") for family in options.families):
        # Read at the first allocation: micro-batches that fill the memory shall not fail for holes in it.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    whole = [name for name in (*FAMILIES, *LONG) if name not in PARTED]
    runs = {name: _runner(name) for name in whole}
    named = set(options.families) - set(whole)
    if named:
        parts = {family: _parts(family, options.device) for family in PARTED}
        known = [part for of_one in parts.values() for part in of_one]
        unknown = named - {*PARTED, *known}
        if unknown:
            families = ", ".join(FAMILIES + LONG)
            parser.error(
                f"unknown family {', '.join(sorted(unknown))}; known: {families}; "
                f"parts of {' and '.join(PARTED)}: {', '.join(known)}"
            )
        for family, of_one in parts.items():
            for name, run in of_one.items():
                if name in named or (family in named and "-variants" not in name):
                    runs[name if name.startswith(family) else f"{family}-{name}"] = run
    chosen = [name for name in runs if name in options.families or name not in whole]
    for name in chosen or FAMILIES:
        bench = Bench(options.device, kernels=options.kernels)
        runs[name](bench)
        bench.report(name, options.results, options.commit)


def _runner(family: str) -> Callable[[Bench], None]:
    return lambda bench: importlib.import_module(f"{__package__}.{family}").run(bench)


def _parts(family: str, device: str | None) -> dict[str, Callable[[Bench], None]]:
    import torch

    cuda = (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    return importlib.import_module(f"{__package__}.{family}").parts(cuda)


if __name__ == "__main__":
    main()
