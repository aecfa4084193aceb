"""The demo on a tiny model: the whole path, and what its saved-activation figure counts."""

import json

import pytest
import torch

from eightfold.train import demo
from eightfold.train.config import ModelConfig


def test_whole_path(tmp_path, monkeypatch, capsys, model_folder):
    monkeypatch.setattr(ModelConfig, "resolved", lambda self: model_folder)
    monkeypatch.setattr(demo, "SEQUENCE_LENGTH", 32)
    assert demo.run(tmp_path, steps=5) == 0
    figures = json.loads((tmp_path / "demo.json").read_text())
    bf16, fp8 = figures["runs"]["bf16"], figures["runs"]["fp8"]
    for run in (bf16, fp8):
        assert run["held_out_after"] < run["held_out_before"]
        assert run["tokens"] == 5 * 2 * 32
    assert bf16["held_out_before"] == pytest.approx(fp8["held_out_before"], abs=0.02)
    assert figures["held_out_difference"] == fp8["held_out_after"] - bf16["held_out_after"]
    assert bf16["optimizer_bytes_per_parameter"] == pytest.approx(8, abs=0.01)
    assert fp8["optimizer_bytes_per_parameter"] < 2.5
    assert 0 < fp8["saved_bytes_per_token"] < 0.7 * bf16["saved_bytes_per_token"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    out = capsys.readouterr().out
    assert f"{fp8['held_out_after']:.4f}" in out
    assert f"{figures['held_out_difference']:+.4f} nats/token" in out


def test_saved_bytes_count_each_memory_once_and_no_weights():
    weight = torch.zeros(8, 16, requires_grad=True)

    class Model:
        def loss(self, ids):
            x = torch.ones(ids.shape[0] * 10, 8) @ weight  # keeps its input: 8 floats a row
            return (x.exp() * x.view(-1, 16)).sum()  # keeps x once and exp(x) once: 32 floats a row

    class Sequences:
        ids = torch.zeros(5, 10)

        def batch(self, rows):
            return (self.ids[rows],)

    class Corpus:
        train = Sequences()

    assert demo.saved_bytes_per_token(Model(), Corpus()) == 4 * (8 + 32)
