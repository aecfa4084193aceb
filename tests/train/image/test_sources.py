"""Where pictures come from: every container, its classes, and one line for what is wrong with it."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from eightfold.train.image.sources import BadPicture, open_pictures


def test_folder(pictures):
    found = open_pictures(pictures)
    assert found.classes == ("blue", "green", "red")
    assert found.names[0] == "blue/00.png"
    assert found.labels == [0] * 12 + [1] * 12 + [2] * 12
    digest, picture = found.read(30)
    assert picture.mode == "RGB"
    assert picture.size == (8, 8)
    assert digest == found.read(30)[0] != found.read(31)[0]


def test_zip_has_what_the_folder_has(pictures, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted(pictures.rglob("*.png")):
            archive.write(file, f"top/{file.relative_to(pictures)}")
        archive.writestr("top/notes.txt", "no picture")
        archive.writestr("__MACOSX/top/red/00.png", "no picture")
    folder, zipped = open_pictures(pictures), open_pictures(tmp_path / "all.zip")
    assert zipped.classes == folder.classes
    assert zipped.labels == folder.labels
    assert zipped.read(5)[0] == folder.read(5)[0]
    assert zipped.names[5] == "top/blue/05.png"


def test_labels_file_decides(pictures):
    (pictures / "labels.csv").write_text("red/00.png, warm\nblue/01.png,cold\n")
    found = open_pictures(pictures)
    assert dict(zip(found.names, (found.classes[label] for label in found.labels))) == {
        "red/00.png": "warm",
        "blue/01.png": "cold",
    }
    assert len(found.skipped) == 34
    assert found.skipped[0] == ("blue/00.png", "not in labels.csv")
    (pictures / "labels.csv").write_text("red/00.png,warm\nblue/01.png\n")
    with pytest.raises(ValueError, match=r"labels\.csv: line 2: expected path,class, got 1 columns"):
        open_pictures(pictures)


@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 6, 4, 1), (5, 6, 4, 3)])
def test_arrays(tmp_path, shape):
    images = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1, 1, 0, 2], classes=["x", "y", "z"])
    found = open_pictures(tmp_path / "a.npz")
    assert found.classes == ("x", "y", "z")
    assert found.labels == [0, 1, 1, 0, 2]
    assert found.names[3] == "a.npz[3]"
    got = np.asarray(found.read(3)[1])
    assert np.array_equal(got, np.broadcast_to(images.reshape(5, 6, 4, -1)[3], (6, 4, 3)))
    np.save(tmp_path / "a.npy", images)
    assert open_pictures(tmp_path / "a.npy").labels == [0] * 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "expected an array 'images', got pictures"),
        ({"images": np.zeros((2, 4, 4, 3))}, r"expected uint8 images .* got float64 \(2, 4, 4, 3\)"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, r"expected uint8 images .* got uint8 \(2, 3, 4, 4\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0]}, r"labels: expected 2 integers from 0, got"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, -1]}, r"labels: expected 2 integers from 0, got"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 2], "classes": ["a", "b"]},
            "labels: expected less than the 2 classes, got 2",
        ),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_pictures(tmp_path / "a.npz")


def test_cifar(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    for name, part, labels in (("data_batch_1", pixels[:4], [0, 1, 1, 0]), ("data_batch_2", pixels[4:], [1, 1])):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": part, b"labels": labels}))
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": pixels, b"labels": [0] * 6}))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}))
    found = open_pictures(tmp_path)
    assert found.classes == ("cat", "dog")
    assert found.labels == [0, 1, 1, 0, 1, 1]
    assert np.array_equal(np.asarray(found.read(4)[1]), pixels[4].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("file", "before", "names"),
    [("data_batch_1.bin", b"", "batches.meta.txt"), ("train.bin", b"\x13", "fine_label_names.txt")],
)
def test_binary_cifar(tmp_path, file, before, names):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    rows = [before + bytes([label]) + each.tobytes() for label, each in zip((1, 0, 1), pixels, strict=True)]
    (tmp_path / file).write_bytes(b"".join(rows))
    (tmp_path / "test_batch.bin").write_bytes(b"not read")
    (tmp_path / names).write_text("cat\ndog\n\n")
    found = open_pictures(tmp_path)
    assert (found.classes, found.labels) == (("cat", "dog"), [1, 0, 1])
    assert np.array_equal(np.asarray(found.read(2)[1]), pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))
    (tmp_path / file).write_bytes(b"".join(rows)[:-1])
    with pytest.raises(ValueError, match=f"{file}: expected rows of .* bytes, got"):
        open_pictures(tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_batch_that_would_run_code_is_refused(tmp_path, capsys):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(ValueError, match="not a batch of CIFAR: it holds a builtins"):
        open_pictures(tmp_path)
    assert capsys.readouterr().out == ""


def test_corrupt_pictures(pictures):
    (pictures / "red" / "00.png").write_bytes((pictures / "red" / "00.png").read_bytes()[:60])
    (pictures / "red" / "01.png").write_bytes(b"")
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG")
    (pictures / "red" / "02.png").write_bytes(content.getvalue())  # the name does not matter
    found = open_pictures(pictures)
    for name, good in (("red/00.png", False), ("red/01.png", False), ("red/02.png", True)):
        index = found.names.index(name)
        if good:
            found.read(index)
            continue
        with pytest.raises(BadPicture) as error:
            found.read(index)
        assert "\n" not in str(error.value)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder or file"):
        open_pictures(tmp_path / "absent")
    with pytest.raises(ValueError, match="no pictures"):
        open_pictures(tmp_path)
    for name, message in (
        ("a.zip", "not a zip archive"),
        ("a.npz", "not arrays of numpy"),
        ("a.txt", "expected a folder"),
    ):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(ValueError, match=message):
            open_pictures(tmp_path / name)
