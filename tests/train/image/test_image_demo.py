"""The demo through the command line, and the samples that it writes."""

import numpy as np
import pytest
import torch
from PIL import Image

from eightfold import cli
from eightfold.train.image import demo
from eightfold.train.image.captions import Captions
from eightfold.train.image.model import ImageModel, load_image_model
from eightfold.train.image.samples import sample_classes, to_pixels, write_sheet
from eightfold.train.image.shapes import draw_shapes
from small_image_model import image_model


@pytest.fixture
def small(monkeypatch):
    for name, value in {"WIDTH": 32, "LAYERS": 2, "DRAWN": 6, "COLUMNS": 2, "SAMPLER_STEPS": 3}.items():
        monkeypatch.setattr(demo, name, value)


def test_demo(tmp_path, capsys, small):
    output = tmp_path / "demo"
    assert cli.main(["train", "--demo", "image", "--output", str(output), "--steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "learns drawn shapes" in out
    assert f"eightfold sana train {output}/config.yaml --resume latest steps=16" in out
    sheet = Image.open(output / "samples.png")
    assert sheet.height > 9 * 64
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = load_image_model(output / "model", "fp32")
    assert len(model.captions.names) == 9
    assert "red triangle" in model.captions.names
    more = ["sana", "train", str(output / "config.yaml"), "--resume", "latest", "steps=5"]
    assert cli.main(more) == 0  # what it says goes on
    assert "step-00000005" in capsys.readouterr().out


def test_demo_on_own_pictures(tmp_path, capsys, small, pictures):
    (pictures / "red" / "00.png").write_bytes(b"no picture")
    command = [
        "train",
        "--demo",
        "image",
        "--images",
        str(pictures),
        "--output",
        str(tmp_path / "demo"),
        "--steps",
        "2",
    ]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert f"learns {pictures}" in captured.out
    assert "1 picture was skipped: red/00.png" in captured.err
    assert load_image_model(tmp_path / "demo" / "model").captions.names == ("blue", "green", "red")
    assert cli.main(["train", "--images", str(pictures)]) == cli.USER_ERROR
    assert cli.main(["train", "--demo", "image", "--images", str(tmp_path / "none")]) == cli.USER_ERROR
    assert "none: no such folder or file" in capsys.readouterr().err


def test_a_sample_does_not_depend_on_those_beside_it():
    model = image_model("fp32").eval()
    options = {"size": (8, 6), "steps": 4, "guidance": 2.0}
    many = sample_classes(model, [2, 0, 1], **options)
    torch.testing.assert_close(sample_classes(model, [2], **options), many[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sample_classes(model, [2], **options, seed=1), many[:1], atol=1e-2)


def test_guidance_moves_away_from_the_empty_caption():
    model = image_model("fp32").eval()
    noiseless = {"size": (8, 6), "steps": 1}  # one step: x0 = x - velocity, linear in guidance
    none, one, two = (sample_classes(model, [0, 1], guidance=g, **noiseless) for g in (0.0, 1.0, 2.0))
    torch.testing.assert_close(two - one, one - none, rtol=1e-3, atol=1e-4)
    assert (one - none).abs().max() > 1e-3


def test_samples_want_classes():
    model = ImageModel(image_model("fp32").sana, Captions(8, 2))
    with pytest.raises(ValueError, match="expected one of classes"):
        sample_classes(model, [0], (8, 8))


def test_sheet(tmp_path):
    pixels = to_pixels(torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2))
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 128, 255]
    write_sheet(tmp_path / "sheet.png", {"a": pixels, "long name": pixels[2:]}, zoom=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] == 4 + 2 * (6 + 4)
    assert sheet[6, -8, 0] == 255
    assert sheet[6, -18, 0] == 128


def test_drawn_shapes_differ_and_repeat(tmp_path):
    one, other = (draw_shapes(tmp_path / name, 3) for name in ("a", "b"))
    files = sorted(file.relative_to(one) for file in one.rglob("*.png"))
    assert len(files) == 27
    content = [(one / file).read_bytes() for file in files]
    assert content == [(other / file).read_bytes() for file in files]
    assert len(set(content)) == 27
    red = np.asarray(Image.open(one / "red square" / "00000.png")).astype(int)
    assert (red[..., 0] - red[..., 1] > 60).mean() > 0.05
