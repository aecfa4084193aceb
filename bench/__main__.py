"""`python -m bench [family ...] [--device cpu|cuda] [--results DIR]`."""

import argparse
import importlib
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
    options = parser.parse_args(arguments)
    unknown = set(options.families) - {*FAMILIES, *LONG}
    if unknown:
        parser.error(f"unknown family {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES + LONG)}")
    for family in options.families or FAMILIES:
        bench = Bench(options.device)
        importlib.import_module(f"{__package__}.{family}").run(bench)
        bench.report(family, options.results, options.commit)


if __name__ == "__main__":
    main()
