"""Where pictures come from, and what class each has.

    folder or .zip   pictures in any depth; a picture's class is the name of the folder it lies in, or what labels.csv
                     at the top says of it (lines "path,class"; pictures it does not name are skipped)
    .npz             `images` uint8 [N, H, W] or [N, H, W, 1 or 3], `labels` integers [N] and `classes` names, both
                     optional; `x`, `y` and `arr_0` are also read
    .npy             images alone
    CIFAR            the folder of python or binary (.bin) batches of CIFAR-10 or CIFAR-100 (fine labels), the training
                     ones

Nothing in a file is executed. A file that cannot be decoded raises BadPicture when it is read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import pickle
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LABELS = "labels.csv"
_CIFAR_DATA = ("data_batch_", "train")
_CIFAR_NAMES = ("batches.meta.txt", "fine_label_names.txt")  # of the classes, beside binary batches
_CIFAR_PIXELS = 3 * 32 * 32
# All that a pickled array names.
_PICKLED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class BadPicture(Exception):
    """A picture that cannot be used; the message says why."""


class Pictures(ABC):
    """Named pictures with labels, indices into `classes`; `skipped`: names and why they are not among them."""

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    skipped: list[tuple[str, str]]

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, Image.Image]:
        """A digest of the picture's content, and the picture in RGB. BadPicture where it cannot be decoded."""


class FilePictures(Pictures):
    """Of a folder or a zip archive."""

    def __init__(self, path: Path):
        self.skipped = []
        if path.is_dir():
            every = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            self._bytes = lambda name: (path / name).read_bytes()
        else:
            try:
                archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path}: truncated or not a zip archive: {error}") from None
            every = sorted(info.filename for info in archive.infolist() if not info.is_dir())
            self._bytes = archive.read
        found = [name for name in every if _is_picture(name)]
        if not found:
            raise ValueError(f"{path}: no pictures ({', '.join(sorted(SUFFIXES))})")
        if LABELS in every:
            listed = _read_labels(self._bytes(LABELS), f"{path}/{LABELS}")
            self.skipped = [(name, f"not in {LABELS}") for name in found if name not in listed]
            found = [name for name in found if name in listed]
            kinds = [listed[name] for name in found]
        else:
            kinds = [PurePosixPath(name).parent.name or "pictures" for name in found]
        self.names, self.classes = found, tuple(sorted(set(kinds)))
        places = {kind: place for place, kind in enumerate(self.classes)}
        self.labels = [places[kind] for kind in kinds]

    def read(self, index: int) -> tuple[bytes, Image.Image]:
        try:
            content = self._bytes(self.names[index])
            with Image.open(io.BytesIO(content)) as opened:
                picture = opened.convert("RGB")
        except Image.DecompressionBombError as error:
            raise BadPicture(str(error)) from None
        except (OSError, ValueError, SyntaxError, EOFError, zipfile.BadZipFile) as error:  # Pillow raises all of them
            raise BadPicture(" ".join(str(error).split()) or type(error).__name__) from None
        return hashlib.blake2b(content, digest_size=16).digest(), picture


class ArrayPictures(Pictures):
    """Of an array uint8 [N, H, W, 3]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...], source: object):
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"{source}: expected uint8 images [N, H, W] or [N, H, W, 1 or 3], got {images.dtype} {images.shape}"
            )
        labels = np.zeros(len(images), np.int64) if labels is None else np.asarray(labels)
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
            raise ValueError(
                f"{source}: labels: expected {len(images)} integers from 0, got {labels.dtype} {labels.shape}"
            )
        count = int(labels.max(initial=0)) + 1
        classes = classes or tuple(str(number) for number in range(count))
        if count > len(classes):
            raise ValueError(f"{source}: labels: expected less than the {len(classes)} classes, got {count - 1}")
        self._images, self.labels, self.classes, self.skipped = images, labels.tolist(), classes, []
        self.names = [f"{source}[{place}]" for place in range(len(images))]

    def read(self, index: int) -> tuple[bytes, Image.Image]:
        pixels = np.ascontiguousarray(self._images[index])
        digest = hashlib.blake2b(pixels.tobytes() + repr(pixels.shape).encode(), digest_size=16).digest()
        return digest, Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")


def open_pictures(path: str | Path) -> Pictures:
    """The pictures at `path`. ValueError or FileNotFoundError with one line naming it and what is wrong."""
    path = Path(path)
    if path.is_dir():
        batches = sorted(file for file in path.iterdir() if file.is_file() and _is_cifar(file))
        return _cifar(path, batches) if batches else FilePictures(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or file")
    if path.suffix == ".zip":
        return FilePictures(path)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"{path}: expected a folder, .zip, .npz or .npy")
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {"images": content} if path.suffix == ".npy" else {name: content[name] for name in content.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: truncated or not arrays of numpy: {error}") from None
    images = next((arrays[name] for name in ("images", "x", "arr_0") if name in arrays), None)
    if images is None:
        raise ValueError(f"{path}: expected an array 'images', got {', '.join(sorted(arrays)) or 'none'}")
    labels = next((arrays[name] for name in ("labels", "y") if name in arrays), None)
    return ArrayPictures(images, labels, tuple(str(name) for name in arrays.get("classes", ())), path.name)


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _read_labels(content: bytes, source: str) -> dict[str, str]:
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source}: not CSV in UTF-8: {error}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(f"{source}: line {number}: expected path,class, got {len(row)} columns")
    return {name.strip(): kind.strip() for name, kind in rows}


def _is_cifar(file: Path) -> bool:
    return file.suffix in ("", ".bin") and file.name.startswith(_CIFAR_DATA)


def _cifar(folder: Path, batches: list[Path]) -> ArrayPictures:
    images, labels, classes = [], [], ()
    for file in batches:
        data, kinds = _binary_batch(file) if file.suffix else _pickled_batch(file)
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += list(kinds)
    for name in ("batches.meta", "meta"):
        if (folder / name).is_file():
            content = _unpickled(folder / name)
            classes = tuple(content.get("label_names", content.get("fine_label_names", ())))
    for name in _CIFAR_NAMES:
        if (folder / name).is_file():
            classes = tuple((folder / name).read_text().split())
    return ArrayPictures(np.concatenate(images), np.array(labels), classes, folder.name)


def _pickled_batch(file: Path) -> tuple[np.ndarray, list[int]]:
    content = _unpickled(file)
    kinds = content.get("labels", content.get("fine_labels"))
    data = content.get("data")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _CIFAR_PIXELS or kinds is None:
        raise ValueError(f"{file}: expected CIFAR's data [N, {_CIFAR_PIXELS}] and labels")
    return data, kinds


def _binary_batch(file: Path) -> tuple[np.ndarray, list[int]]:
    """Rows of a label (CIFAR-100, train.bin: a coarse and a fine one) and the pixels."""
    row = _CIFAR_PIXELS + (2 if file.stem == "train" else 1)
    content = np.fromfile(file, np.uint8)
    if not len(content) or len(content) % row:
        raise ValueError(f"{file}: expected rows of {row} bytes, got {len(content)} bytes")
    rows = content.reshape(-1, row)
    return rows[:, -_CIFAR_PIXELS:], rows[:, -_CIFAR_PIXELS - 1].tolist()


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module, name)


def _unpickled(file: Path) -> dict[str, Any]:
    """The dictionary of a batch, its names as text."""
    try:
        with open(file, "rb") as opened:
            content = _ArraysOnly(opened, encoding="bytes").load()
        return {_text(key): _text(value) for key, value in content.items()}
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, ImportError) as error:
        raise ValueError(f"{file}: not a batch of CIFAR: {error}") from None


def _text(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [each.decode() for each in value]
    return value.decode() if isinstance(value, bytes) else value
