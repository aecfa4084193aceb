"""The long families of generation, dry: tiny sizes on the CPU, the peers uncompiled."""

import json

import pytest
import torch


@pytest.fixture(autouse=True)
def quick(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    monkeypatch.setattr(bench.common.Bench, "_ceilings", lambda self: (10.0, 0.1))


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_decode(bench, tmp_path):
    bench.__main__.main(["decode", "--device", "cpu", "--results", str(tmp_path)])
    lines = [record["line"] for record in records(tmp_path / "cpu" / "decode.jsonl") if "line" in record]
    assert [line["op"] for line in lines] == ["decode fp8", "decode all fp8", "decode bf16"]
    assert [line["error"] for line in lines][:2] == [0, 0]
    assert lines[2]["error"] < 0.5
    assert set(lines[2]["peers_us"]) == {"torch bf16 compiled"}


def test_step_bytes(bench):
    """Qwen3-8B: 6.95 G parameters in layers and 0.62 G in the head; 144 KiB a token of keys and values."""
    with torch.device("meta"):
        model = bench.decode.Decoder(bench.decode.QWEN3_8B, "fp8")
    layers, head = 36 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 12288), 151936 * 4096
    assert bench.decode.step_bytes(model, 1, 1000) == layers + 2 * head + 1000 * 147456
    model.compute.fp8_head = model.compute.fp8_cache = True
    assert bench.decode.step_bytes(model, 2, 10) == layers + head + 20 * 36 * 2 * 8 * 132
    assert bench.decode.step_bytes(model.in_precision("bf16"), 1, 0) == 2 * (layers + head)


def test_rl(bench, tmp_path, capsys):
    bench.__main__.main(["rl", "--device", "cpu", "--results", str(tmp_path)])
    steps = [record["step"] for record in records(tmp_path / "cpu" / "rl.jsonl") if "step" in record]
    assert [step["name"] for step in steps] == ["RL rollout, small", "RL training, small", "RL whole step, small"]
    for step in steps:
        assert set(step["runs"]) == {"ours", "ours, head and cache bf16", "bf16"}
        assert all(run["ms"] > 0 and run["tokens_per_second"] > 0 for run in step["runs"].values())
    out = capsys.readouterr().out
    assert "ours: weights handed over in " in out
    assert out.count("max |delta log p| 0.0") >= 2  # the two flows in FP8


def test_rl_training(bench, tmp_path, capsys):
    bench.__main__.main(["rl_training", "--device", "cpu", "--results", str(tmp_path)])
    (found,) = (record["step"] for record in records(tmp_path / "cpu" / "rl_training.jsonl") if "step" in record)
    assert set(found["runs"]) == {"ours", "bf16"}
    assert all(run["ms"] == run["ms_a_micro_batch"] / run["sequences"] > 0 for run in found["runs"].values())
    assert "bf16 / ours: " in capsys.readouterr().out


def test_diffusion(bench, tmp_path):
    bench.__main__.main(["diffusion", "--device", "cpu", "--results", str(tmp_path)])
    found = records(tmp_path / "cpu" / "diffusion.jsonl")
    lines = [record["line"]["op"] for record in found if "line" in record]
    modes = ("bf16", "fp8", "all fp8")
    assert lines == [f"diffusion {op} {mode}" for mode in modes for op in ("refresh", "step")]
    runs = [record["step"]["runs"] for record in found if "step" in record]
    assert [list(run) for run in runs] == [[mode] for mode in modes for _ in range(3)]
    for run in runs:
        (figures,) = run.values()
        assert figures["forwards"] == 2 * 11
        assert figures["tokens_per_second"] > 0
