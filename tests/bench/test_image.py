"""The family of images, dry: tiny sizes on the CPU, the peers uncompiled."""

import json
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def quick(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    monkeypatch.setattr(bench.common.Bench, "_ceilings", lambda self: (10.0, 0.1))


def run(bench, folder, *arguments):
    """Records of each part."""
    bench.__main__.main([*arguments, "--device", "cpu", "--results", str(folder)])
    paths = (folder / "cpu").iterdir()
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()][1:] for path in paths}


def test_image(bench, tmp_path, capsys):
    found = run(bench, tmp_path, "image", "--kernels", "3")
    steps = [record["line"] for part in ("step", "step-4k", "step-others") for record in found[f"image-{part}"]]
    shapes = ("small", "small large", "small narrow")
    assert [(line["op"], line["shape"]) for line in steps] == [
        (f"image step {precision}", shape) for shape in shapes for precision in ("fp8", "bf16")
    ]
    graph, plain = "diffusers compiled, in a CUDA graph", "diffusers compiled"
    assert [set(line["peers_us"]) for line in steps] == 2 * [{graph, plain}] + 4 * [{graph}]
    assert all(line["error"] > 0 for line in steps)
    (decoder,) = (record["line"] for record in found["image-decode"])
    assert set(decoder["peers_us"]) == {"diffusers eager", "diffusers compiled"}
    assert decoder["error"] < 0.05
    (training,) = (record["step"] for record in found["image-training"])
    assert list(training["runs"]) == ["ours", "diffusers bf16 compiled + fused AdamW"]
    assert all(figures["images_per_second"] > 0 for figures in training["runs"].values())
    wholes = [record["step"] for record in found["image-whole"]]
    assert [step["name"] for step in wholes] == [f"images small, 20 steps, batch {batch}" for batch in (1, 2)]
    for step in wholes:
        assert set(step["runs"]) == {"ours", "ours, bf16"}
        assert all(figures["ms"] > figures["decoder_ms"] > 0 for figures in step["runs"].values())
    assert "gradient: error " in capsys.readouterr().out
    text = bench.table.table(bench.table.read_results(tmp_path))
    assert "| images small, 20 steps, batch 2 | ours | " in text
    assert "`image` step fp8" in text


def test_parts_by_name(bench, tmp_path):
    assert set(run(bench, tmp_path, "image-decode")) == {"image-decode"}


def test_without_diffusers_ours_is_timed_alone(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = run(bench, tmp_path, "image")
    lines = [record["line"] for records in found.values() for record in records if "line" in record]
    assert len(lines) == 7
    assert all(line["peers_us"] == {} and line["error"] > 0 for line in lines)
    (training,) = (record["step"] for record in found["image-training"])
    assert list(training["runs"]) == ["ours"]
    assert "peer diffusers left out: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "module", "name", "limit"),
    [
        ("image-step", "image", "TOLERANCES", {"fp8": 1e-6}),
        ("image-decode", "image", "DECODER_TOLERANCE", -1.0),
        ("image-training", "image_training", "TOLERANCES", {"gradient": 1e-6}),
    ],
)
def test_wrong_results_are_not_timed(bench, part, module, name, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(getattr(bench, module), name, limit)
    with pytest.raises(SystemExit, match=r"error .* is over .*; not timed"):
        run(bench, tmp_path, part)


def test_flop_of_a_step(bench):
    """1.6B at 1024 px, two rows: 67.7 M elements of matrices a block, 2,048 tokens, 20 blocks; attention beside it."""
    image = bench.image
    flop = image.step_flop(image.GPU.transformer, 2, 1024, 300)
    matrices = 2 * 2048 * 20 * (6 * 2240**2 + 3 * 2240 * 5600)
    attention = 20 * 2048 * (4 * 300 * 2240 + 4 * 32 * 2240)
    assert flop == matrices + attention
