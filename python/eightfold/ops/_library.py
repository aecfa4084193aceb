"""Loads libeightfold.so: after this import, torch.ops.eightfold.* exists, for CUDA too (ops/_fallback.py)."""

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


def build_info() -> dict:
    """What libeightfold.so was built with: {"cuda", "cuda_version", "compiler", "cpu_gemm"}."""
    from eightfold import _C  # the Python-version-specific half, not needed to run an op

    return _C.build_info()
