"""The demo's whole path with a model that has hardly learned; a second call reads what the first has made."""

import json

import pytest

from eightfold import cli
from eightfold.generate import diffusion_demo


def test_whole_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diffusion_demo, "TEST", 3)
    assert diffusion_demo.run(tmp_path, steps=3, sums=200) == 0
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert list(figures) == ["dual", "prefix", "none"]
    for found in figures.values():
        assert 0 <= found["right"] <= 3
        assert 1 <= found["tokens_per_forward"] <= 24
        assert found["tokens_per_second"] > 0
    out = capsys.readouterr().out
    assert out.count("each line is a pass of the model") == 2
    assert "tokens per forward" in out
    monkeypatch.setattr(diffusion_demo, "train", None)
    assert diffusion_demo.run(tmp_path) == 0
    again = json.loads((tmp_path / "demo.json").read_text())
    for cache, found in figures.items():
        assert again[cache]["forwards"] == found["forwards"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo"], "--demo: expected with --diffusion, and no model: it makes its own"),
        (["--diffusion", "--demo", "some-model"], "--demo: expected with --diffusion, and no model: it makes its own"),
        ([], "model: expected a folder, a .gguf file or smollm2, got none"),
        (["some-model", "--output", "x"], "--output: only with --demo"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert cli.main(["generate", *arguments]) == 2
    assert message in capsys.readouterr().err
