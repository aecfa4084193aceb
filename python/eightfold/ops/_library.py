"""Loads libeightfold.so: after this import, torch.ops.eightfold.* exists, for CUDA too (ops/_fallback.py)."""

from collections.abc import Callable
from pathlib import Path

import torch

from eightfold.ops import _fallback

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "libeightfold.so"

if not LIBRARY_PATH.exists():
    raise ImportError(
        f"eightfold: {LIBRARY_PATH} is missing: the package was not built. Run `make build` in the source tree, "
        "or install the wheel."
    )
torch.ops.load_library(str(LIBRARY_PATH))
_fallback.install_where_needed()


def direct(name: str) -> Callable:
    """torch.ops.eightfold.<name> for positional arguments, without what torch does in Python before its dispatcher: 0.8
    of the 4.4 us of a call on small CPU tensors. What is being compiled sees torch.ops, all that the compiler knows."""
    packet, is_compiling = getattr(torch.ops.eightfold, name), torch.compiler.is_compiling
    entry = packet.default._op

    def call(*arguments):
        return packet(*arguments) if is_compiling() else entry(*arguments)

    return call


def build_info() -> dict:
    """What libeightfold.so was built with: {"cuda", "cuda_version", "compiler", "cpu_gemm"}."""
    from eightfold import _C  # the Python-version-specific half, not needed to run an op

    return _C.build_info()
