"""`eightfold generate --image` from end to end: a tiny random model whose latents are pixels, a grid in PNG, judges."""

import dataclasses
import io
import re

import pytest
import torch
from PIL import Image, ImageChops

from dc_ae_models import SMALL
from eightfold import cli
from eightfold.generate.image import ImageSampler
from eightfold.generate.image_console import numbers
from eightfold.generate.pictures import grid, picture, save_png
from eightfold.generate.prompts import TABLE, Prompts, read_prompts, save_prompts
from eightfold.models.dc_ae import DCAE
from eightfold.models.dc_ae_loading import save_dc_ae
from eightfold.models.sana import Sana
from eightfold.models.sana_loading import load_sana, save_sana
from plain_sana import TINY

CONFIG = dataclasses.replace(TINY, in_channels=3, out_channels=3, sample_size=8)
NAMES = ("airplane", "bird", "a very long caption that is wider than its image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with the classes it knows."""
    torch.manual_seed(1)
    folder = save_sana(Sana(CONFIG, "fp32"), tmp_path_factory.mktemp("sana") / "model")
    width = CONFIG.caption_channels
    table = Prompts(torch.randn(3, 2, width), torch.ones(3, 2), torch.randn(1, 1, width), torch.ones(1, 1), NAMES)
    save_prompts(table, folder / TABLE)
    return folder


def generate(folder, *flags):
    common = ["generate", "--image", str(folder), "--precision", "fp32", "--steps", "2"]
    return cli.main([*common, *map(str, flags)])


def judge_file(tmp_path, body):
    file = tmp_path / "judge.py"
    file.write_text(f"import numpy as np\n\ndef judge(image, prompt):\n    {body}\n")
    return f"{file}:judge"


def cells(page, columns, rows):
    """The images of a grid of 8 x 8 pixels, each enlarged 12 times."""
    images = []
    for row in range(rows):
        for column in range(columns):
            left, top = 4 + 100 * column, 4 + (page.height - 4) // rows * row
            images.append(page.crop((left, top, left + 96, top + 96)).resize((8, 8), Image.Resampling.NEAREST))
    return images


def same(one, other):
    return ImageChops.difference(one, other).getbbox() is None


def test_grid_of_classes_and_seeds(folder, tmp_path, capsys):
    output = tmp_path / "new" / "grid.png"
    assert generate(folder, "--classes", "2,0", "--seeds", "0,5-6", "--guidance", "2", "--output", output) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"done: 6 images of 8x8 in {re.escape(str(output))}; \d+\.\d s\n", out)
    assert err == ""
    page = Image.open(output)
    assert (page.format, page.size) == ("PNG", (3 * 100 + 4, 2 * (96 + 20) + 4))
    known, seeds = read_prompts(folder / TABLE).rows([2, 0]), [0, 5, 6] * 2
    texts = known.embeddings, known.mask, known.negative, known.negative_mask
    sampler = ImageSampler(load_sana(folder, "fp32"))
    want = sampler.sample(*texts, height=8, width=8, steps=2, guidance=2, seeds=seeds)
    assert len({image.numpy().tobytes() for image in want}) == 6
    for shown, image in zip(cells(page, 3, 2), want, strict=True):
        assert same(shown, picture(image))
    boxes = [[(4 + 100 * column, 100 + 116 * row) for column in range(3)] for row in range(2)]
    captions = [[page.crop((left, top, left + 96, top + 18)) for left, top in row] for row in boxes]
    for row in captions:  # the text's, whatever the seed
        assert len(row[0].getcolors()) > 2
        assert all(same(caption, row[0]) for caption in row)
    assert not same(captions[0][0], captions[1][0])


def test_folder_of_images(folder, tmp_path):
    flags = ("--seed", 3, "--size", "4x8", "--solver", "flow-euler", "--shift", 1, "--batch", 2, "--output", tmp_path)
    assert generate(folder, *flags) == 0
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["0000_0000.png", "0001_0000.png", "0002_0000.png", "grid.png"]
    assert Image.open(tmp_path / names[0]).size == (8, 4)


def test_best_of(folder, tmp_path, capsys):
    """The brightest of so many; more candidates of seed 0 are never worse; each seed has its own."""
    judge = judge_file(tmp_path, "return True, float(np.asarray(image).mean())")
    best = []
    for count in (1, 4, 16):
        flags = ("--classes", "1", "--best-of", count, "--judge", judge, "--output", tmp_path / "best.png")
        assert generate(folder, *flags) == 0
        out, err = capsys.readouterr()
        assert err == ""
        line = re.match(r"'bird', seed 0: candidate seed (\d+) of (\d+): yes, score ([\d.]+)\n", out)
        assert int(line[2]) == count > int(line[1])
        best.append(float(line[3]))
        shown = cells(Image.open(tmp_path / "best.png"), 1, 1)[0]
        assert float(torch.tensor(list(shown.tobytes())).float().mean()) == pytest.approx(best[-1], rel=1e-3)
    assert best[0] <= best[1] <= best[2]
    assert best[0] < best[2]
    assert generate(folder, "--seeds", "0,1", "--best-of", 2, "--judge", judge, "--output", tmp_path / "b.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"{name!r}, seed {s}" for name in NAMES for s in (0, 1)]
    assert all(int(re.search(r"candidate seed (\d+)", line)[1]) // 2 == i % 2 for i, line in enumerate(lines[:-1]))


def test_a_judge_that_raises(folder, tmp_path, capsys):
    judge = judge_file(tmp_path, "raise OSError('no\\nanswer')")
    flags = ("--classes", "1", "--best-of", 12, "--judge", judge, "--output", tmp_path / "best.png")
    assert generate(folder, *flags) == 0
    out, err = capsys.readouterr()
    assert "candidate seed 0 of 12: failed" in out
    lines = err.splitlines()
    assert lines[:-1] == [f"judge: 'bird', seed {i}: OSError: no answer" for i in range(10)]
    assert lines[-1] == "judge: failed for 12 of 12 images, which count as no"


def test_decoder(folder, tmp_path, capsys):
    """Of a pipeline's own folder, and of another one; one whose latents do not fit is refused before a step."""
    pipeline, config = tmp_path / "pipeline", dataclasses.replace(TINY, sample_size=8)
    save_sana(Sana(config, "fp32"), pipeline / "transformer")
    decoder = DCAE(SMALL).eval()
    save_dc_ae(decoder, pipeline / "vae")
    table, output = folder / TABLE, tmp_path / "x.png"
    assert generate(pipeline, "--embeddings", table, "--classes", "0", "--output", output) == 0
    assert "done: 1 images of 32x32 in" in capsys.readouterr().out
    first = output.read_bytes()
    texts = read_prompts(table).rows([0])
    given = texts.embeddings, texts.mask, texts.negative, texts.negative_mask
    sampler = ImageSampler(load_sana(pipeline, "fp32"), decoder.decode, decoder.config.ratio)
    want = picture(sampler.sample(*given, height=32, width=32, steps=2, seeds=[0])[0])
    assert same(Image.open(output).crop((4, 4, 100, 100)).resize((32, 32), Image.Resampling.NEAREST), want)
    flags = ("--embeddings", table, "--classes", "0", "--output", output, "--vae", pipeline / "vae")
    assert generate(pipeline / "transformer", *flags) == 0
    assert output.read_bytes() == first
    capsys.readouterr()
    assert generate(folder, *flags) == cli.USER_ERROR
    assert "--vae: expected latents of 3 channels as the model's, got 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--size", "6"), "--size: expected HEIGHTxWIDTH, got '6'"),
        (("--size", "0x8"), "height: expected a multiple of 1 pixels, got 0"),
        (("--steps", "0"), "steps: expected 1 to 999, got 0"),
        (("--seeds", "3-1"), "--seeds: expected numbers such as 0,2,5-8, got '3-1'"),
        (("--seeds", "4294967296"), "seeds: expected integers from 0 to 4294967295, got 4294967296"),
        (("--classes", "a"), "--classes: expected numbers such as 0,2,5-8, got 'a'"),
        (("--classes", "1,3"), "classes: expected 0 to 2, got 3"),
        (("--embeddings", "absent.safetensors"), "absent.safetensors: no such file"),
        (("--negative", "x"), "--negative: only with --encoder"),
        (("--encoder", "absent", "--classes", "1"), "--classes: not with --encoder"),
        (("--best-of", "4"), "--best-of: --judge and --best-of go together"),
        (("--judge", "a:b"), "--judge: --judge and --best-of go together"),
        (("--judge", "nothing_here:b", "--best-of", "0"), "judge: nothing_here: not imported"),
        (("--judge", "math:hypot", "--best-of", "0"), "--best-of: expected 1 or more, got 0"),
        (("--max-tokens", "3"), "--max-tokens: not with --image"),
        (("--canvas", "3"), "--canvas: not with --image"),
        (("--diffusion",), "--diffusion: not with --image"),
        (("--temperature", "1"), "--temperature: not with --image"),
    ],
)
def test_mistakes(folder, flags, line, capsys, tmp_path):
    assert generate(folder, *flags, "--output", tmp_path / "x.png") == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert line in err
    assert not list(tmp_path.iterdir())


def test_mistakes_of_files_and_other_modes(folder, tmp_path, capsys):
    for arguments, line in (
        (["--image"], "model: expected a folder or a file of a SANA transformer, got none"),
        (["--image", str(tmp_path)], f"--embeddings: expected a file, or --encoder, as {tmp_path} has no {TABLE}"),
        (["--image", str(folder), "a cat"], "prompt: only with --encoder"),
        (["--image", str(folder), "a cat", "--encoder", "absent"], "absent: no such folder"),
        (["model", "--guidance", "2"], "--guidance: only with --image"),
        (["model", "--best-of", "2"], "--best-of: only with --image"),
        (["--image", str(folder), "--output", f"{folder / TABLE}/x.png"], "x.png: not saved"),
    ):
        assert cli.main(["generate", *arguments]) == cli.USER_ERROR
        assert line in capsys.readouterr().err
    narrow = save_prompts(Prompts(torch.zeros(1, 1, 8), None, None, None, ("x",)), tmp_path / "narrow.safetensors")
    assert generate(folder, "--embeddings", narrow) == cli.USER_ERROR
    assert "negative: expected a text to lead away from" in capsys.readouterr().err
    assert generate(folder, "--embeddings", narrow, "--guidance", 1) == cli.USER_ERROR
    assert "text: expected embeddings [N, T, 24]" in capsys.readouterr().err
    latents = save_sana(Sana(TINY, "fp32"), tmp_path / "latents")
    assert generate(latents, "--embeddings", folder / TABLE) == cli.USER_ERROR
    assert "decode: expected one for latents of 4 channels" in capsys.readouterr().err


def test_a_bar_on_a_terminal(folder, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert generate(folder, "--batch", 2, "--output", tmp_path / "x.png") == 0
    assert "4/4" in terminal.getvalue()  # two batches of two steps


def test_numbers():
    assert numbers("--seeds", "7") == [7]
    assert numbers("--seeds", "0, 5-7,2-2") == [0, 5, 6, 7, 2]


def test_grids_and_files(tmp_path):
    images = [Image.new("RGB", (100, 120), color) for color in ("red", "green", "blue")]
    page = grid(images, ["", "", ""], 2)
    assert page.size == (2 * 104 + 4, 2 * 124 + 4)
    assert [page.getpixel(at)[:3] for at in ((50, 60), (160, 60), (50, 190), (160, 190))] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]
    cut = grid(images[:1], ["a caption that is much wider than the image is"], 5)
    assert cut.size == (108, 120 + 20 + 4)
    assert cut.crop((105, 0, 108, 144)).getcolors() == [(3 * 144, (255, 255, 255))]
    for wrong in (([], [], 1), (images, ["x"], 1), (images, ["", "", ""], 0)):
        with pytest.raises(ValueError, match="grid: expected images, a caption for each and 1 column or more"):
            grid(*wrong)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match=r"taken\.png: not saved"):
        save_png(images[0], tmp_path / "taken.png")
    assert [file.name for file in tmp_path.iterdir()] == ["taken.png"]
