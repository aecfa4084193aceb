"""The step's parts, dry: tiny sizes on the CPU, the peers uncompiled."""

import json

import pytest
import torch


@pytest.fixture(autouse=True)
def quick(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(bench.common.Bench, "_ceilings", lambda self: (10.0, 0.1))


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_are_run_by_name_and_leave_results(bench, tmp_path, capsys):
    names = ["llama-small", "qwen2-small", "small", "small-fp32", "alone"]
    bench.__main__.main([*names, "--device", "cpu", "--results", str(tmp_path)])
    files = {path.stem: records(path) for path in (tmp_path / "cpu").iterdir()}
    assert set(files) == {f"step-{name}" for name in names}
    for name in ("llama-small", "qwen2-small"):
        machine, line, step = files[f"step-{name}"]
        assert "versions" in machine["machine"]
        assert set(line["line"]["peers_us"]) == {"bf16 compiled"}
        assert line["line"]["op"] == "layer fwd+bwd"
        runs = step["step"]["runs"]
        assert set(runs) == {"ours", "bf16 eager", "bf16 compiled"}
        assert runs["ours"]["saved_units"] < 0.55 * runs["bf16 eager"]["saved_units"]
        assert runs["ours"]["ms"] > 0
    (step,) = [r["step"] for r in files["step-small"] if "step" in r]
    assert set(step["runs"]) == {"ours", "bf16 compiled + fused AdamW"}
    assert all(run["tokens_per_second"] > 0 and run["host_ms"] > 0 for run in step["runs"].values())
    (step,) = [r["step"] for r in files["step-small-fp32"] if "step" in r]
    assert step["runs"]["fp32 master + autocast, compiled"]["peak_bytes"] == 1
    assert set(step["runs"]["ours"]) == {"ms", "host_ms", "tokens_per_second", "peak_bytes", "state_bytes"}
    (step,) = [r["step"] for r in files["step-alone"] if "step" in r]
    assert set(step["runs"]) == {"ours"}
    assert "tokens_per_second" in capsys.readouterr().out
    text = bench.table.table(bench.table.read_results(tmp_path))
    assert "| layer of llama-small 1x64 | ours | " in text


def test_variants(bench, tmp_path):
    bench.__main__.main(["llama-small-variants", "--device", "cpu", "--results", str(tmp_path)])
    (line,) = [r["line"] for r in records(tmp_path / "cpu" / "step-llama-small-variants.jsonl") if "line" in r]
    assert set(line["peers_us"]) == {"ours compiled"}


def test_what_does_not_fit_is_said(bench, monkeypatch):
    properties = type("Properties", (), {"total_memory": 80})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def out_of_memory():
        raise torch.OutOfMemoryError("no")

    assert bench.step._alone(out_of_memory, torch.device("cpu")) == {"peak_bytes": None, "does_not_fit": 80}


def test_peers_that_fail_are_left_out_and_said(bench, monkeypatch, tmp_path, capsys):
    def broken(module, **_):
        raise RuntimeError("no compiler")

    def fails_when_called(module, **_):
        return lambda *_: broken(module)

    monkeypatch.setattr(torch, "compile", broken)
    bench.__main__.main(["small", "--device", "cpu", "--results", str(tmp_path)])
    assert "peer bf16 compiled + fused AdamW left out: no compiler" in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", fails_when_called)
    bench.__main__.main(["llama-small", "--device", "cpu", "--results", str(tmp_path)])
    assert "peer bf16 compiled left out at llama-small 1x64: no compiler" in capsys.readouterr().out
    (step,) = [r["step"] for r in records(tmp_path / "cpu" / "step-llama-small.jsonl") if "step" in r]
    assert set(step["runs"]) == {"ours", "bf16 eager"}


def test_every_figure_of_the_hopper_targets_has_a_part(bench):
    parts = bench.step.parts(cuda=True)
    assert {"llama-2-7b", "qwen2.5-7b", "1.1B", "1.1B-fp32", "3B", "3B-fp32", "7B", "7B-batch-4"} <= set(parts)
    config = bench.step.MODELS["1.1B"][0]
    assert config.hidden_size * config.num_hidden_layers == 2048 * 22


def test_unknown_names(bench, capsys):
    with pytest.raises(SystemExit):
        bench.__main__.main(["gem", "--device", "cpu"])
    assert "unknown family gem; known: quant" in capsys.readouterr().err


def test_classes_of_kernels(bench):
    for kernel, group in (
        ("void eightfold::fp8_gemm_pairs_kernel<Config<2, 2, 1, false>>(...)", "GEMM"),
        ("nvjet_tst_256x128", "GEMM"),
        ("eightfold::quant::parts_cast_kernel<4, 16>", "casts, norms, SwiGLU"),
        ("eightfold::quant::fold_dweight_kernel", "casts, norms, SwiGLU"),
        ("eightfold::adamw_dre_kernel", "optimizer"),
        ("eightfold::conv::depthwise_glu_kernel<true>", "convolution"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolution"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("eightfold::cross_entropy_kernel", "loss"),
        ("Memset (Device)", "other"),
    ):
        assert bench.kernel_times.class_of(kernel) == group
