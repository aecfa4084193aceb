"""The command line: what it prints, its exit codes, one line for each mistake, a quick start."""

import subprocess
import sys

import pytest

from eightfold import cli


def eightfold(*arguments, **options):
    """`eightfold` in another process."""
    command = [sys.executable, "-m", "eightfold.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def fails_with(capsys, line, *arguments):
    """The command returns 2 and prints one line that contains ``line``."""
    assert cli.main([str(argument) for argument in arguments]) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("eightfold: ")
    assert err.count("\n") == 1
    assert line in err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("eightfold", "python", "torch", "library", "kernels inside", "CPU", "GPU"):
        assert any(line.startswith(f"{name} ") for line in out.splitlines()), name


def test_info_counts_kernels():
    pytest.importorskip("eightfold.ops")
    from eightfold.info import collect

    facts = collect()
    count = int(facts["kernels inside"].split()[0])
    assert count >= 15
    assert f"for the CPU {count} " in facts["kernels inside"]


def test_help_and_version_start_quickly():
    code = "import sys; from eightfold import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'transformers', 'matplotlib', 'pydantic', 'tensorboard', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("info", "train", "generate", "export", "bench", "demo"):
        assert f"  {command} " in done.stdout
    assert eightfold("--version").stdout.startswith("eightfold ")


def test_train_mistakes(capsys, tmp_path):
    fails_with(capsys, "key 'model' is missing", "train")
    fails_with(capsys, "no such configuration file", "train", tmp_path / "absent.yaml")
    common = ("train", "--model", tmp_path, "--data", tmp_path, "--output", tmp_path / "run")
    fails_with(capsys, "unknown key 'optimizer.lrr'", *common, "optimizer.lrr=1")
    fails_with(capsys, "unknown key 'optimizer.lrr'", *common, "--set", "optimizer.lrr=1", "steps=2")
    fails_with(capsys, "'fp32', 'bf16' or 'fp8', got 'fp4'", *common, "--precision", "fp4")
    fails_with(capsys, "greater than 0, got -1", *common, "--steps", -1)
    fails_with(capsys, f"{tmp_path / 'config.json'}", *common)
    assert not (tmp_path / "run").exists()


def test_arguments_of_train(monkeypatch, tmp_path, capsys):
    from eightfold.train import loop

    seen = []

    def train(config):
        seen.append(config)
        return loop.Result(checkpoint=tmp_path)

    monkeypatch.setattr(loop, "train", train)
    yaml = tmp_path / "c.yaml"
    yaml.write_text("model: {path: m}\ndata: {path: d}\nsteps: 3\noptimizer: {lr: 1e-4}\n")
    for arguments in (
        (yaml, "optimizer.lr=2e-4", "--steps", 5, "--precision", "fp8"),
        (yaml, "--steps", 5, "--precision", "fp8", "optimizer.lr=2e-4"),
        (yaml, "--set", "optimizer.lr=2e-4", "steps=5", "--precision", "fp8"),
        ("model.path=m", "data.path=d", "steps=5", "optimizer.lr=2e-4", "model.precision=fp8"),
    ):
        assert cli.main(["train", *map(str, arguments)]) == 0
        config = seen.pop()
        assert (config.model.path, config.steps, config.optimizer.lr) == ("m", 5, 2e-4)
        assert config.model.precision == "fp8"
        assert config.resume is None
    for arguments, resume in (
        (("--resume",), "latest"),
        (("--resume", "steps=4"), "latest"),
        (("--resume", "a: 'b'"), "a: 'b'"),
    ):
        assert cli.main(["train", str(yaml), *arguments]) == 0
        assert seen.pop().resume == resume
    with pytest.raises(SystemExit):
        cli.main(["train", str(yaml), "--stepz", "3"])
    assert "unrecognized arguments: --stepz" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    for arguments in (("--debug", "train"), ("train", "--debug")):
        done = eightfold(*arguments)
        assert "Traceback" in done.stderr
        assert "key 'model' is missing" in done.stderr


def test_bench_runs_the_source_tree(monkeypatch, tmp_path, capsys):
    package = tmp_path / "python" / "eightfold"
    package.mkdir(parents=True)
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text("def main(arguments): print(arguments)")
    (tmp_path / "bench" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("bench", "bench.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert cli.main(["bench", "gemm", "quant", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "['gemm', 'quant', '--device', 'cpu']\n"
    for name in ("bench", "bench.__main__"):
        sys.modules.pop(name, None)


def test_generate_mistakes(capsys, tmp_path):
    fails_with(capsys, "absent", "generate", tmp_path / "absent", "hello")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    fails_with(capsys, "cut.gguf", "generate", tmp_path / "cut.gguf", "hello")


def test_no_command():
    done = eightfold()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_interrupt_before_training_starts(monkeypatch, capsys):
    from eightfold.train import loop

    def train(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", train)
    assert cli.main(["train", "model.path=m", "data.path=d"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "eightfold: interrupted\n"
