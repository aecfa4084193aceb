"""Checkpoints under failure: a full disk, cut files, other models, other versions, an interrupt."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from eightfold.train import checkpoint
from eightfold.train.config import parse_config
from eightfold.train.distributed import World
from eightfold.train.loop import train


@pytest.fixture
def finished(settings, ended_run):
    """Settings that go on with a run that has ended at step 6, and its newest checkpoint."""
    shutil.copytree(ended_run, settings["output"])
    return settings | {"resume": "latest", "steps": 8}, checkpoint.find(settings["output"], "latest")


@pytest.fixture
def at_step_3(finished, settings):
    """Settings that go on with the same run, were it at step 3."""
    shutil.rmtree(finished[1])
    return settings | {"resume": "latest"}


def expect(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        train(parse_config(settings))
    assert "\n" not in str(error.value)


def test_keep_last(settings, tmp_path):
    train(parse_config(settings | {"checkpoint_every": 1, "keep_last": 3}))
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000004", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("file", ["model.safetensors", "trainer/__0_0.distcp", "config.json"])
def test_truncated_file(finished, file):
    settings, folder = finished
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    expect(settings, rf"{file} has {len(data) // 2} bytes, expected {len(data)}: truncated")


def test_missing_file(finished):
    settings, folder = finished
    (folder / "model.safetensors").unlink()
    expect(settings, r"step-00000006: model\.safetensors is missing")


def test_damaged_weights_of_the_right_size(finished):
    settings, folder = finished
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(b"\xff" * size)
    expect(settings, "step-00000006: damaged weights")


def test_damaged_optimizer_states_of_the_right_size(finished):
    settings, folder = finished
    path = folder / "trainer" / "__0_0.distcp"
    path.write_bytes(b"\xff" * path.stat().st_size)
    expect(settings, "trainer: optimizer states do not fit this run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "state.json: damaged: not JSON"),
        ('{"format": 99}', "checkpoint format 99; this version reads format 1"),
        ("[]", "checkpoint format None"),
    ],
)
def test_bad_state_file(finished, content, message):
    settings, folder = finished
    (folder / "trainer" / "state.json").write_text(content)
    expect(settings, message)


def test_folder_that_is_no_checkpoint(finished, model_folder):
    settings, _ = finished
    expect(settings | {"resume": str(model_folder)}, "not a checkpoint of eightfold train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48, "head_dim": 12}, r"another model: \S+ has shape \(.*\), expected \(.*\)"),
        ({"num_hidden_layers": 3}, r"another model: it has no model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"another model: it has model\.layers\.1"),
    ],
)
def test_checkpoint_of_another_model(finished, tmp_path, make_model, changes, message):
    settings, _ = finished
    settings["model"]["path"] = str(make_model(tmp_path / "other", **changes))
    expect(settings, message)


def test_other_parameter_dtype(finished):
    settings, _ = finished
    settings["model"]["parameters"] = "bf16"
    expect(settings, r"its parameters are torch\.float32, the run's are torch\.bfloat16 \(model\.parameters\)")


@pytest.mark.parametrize("where", ["model", "optimizer", "state"])
def test_full_disk_leaves_the_old_checkpoint(at_step_3, tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "model":
        monkeypatch.setattr("eightfold.models.loading.save_file", full)
    elif where == "optimizer":
        monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    else:
        monkeypatch.setattr(checkpoint, "_seal", full)
    with pytest.raises(OSError, match="step-00000006: the checkpoint could not be written: No space left on device"):
        train(parse_config(at_step_3))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert len(train(parse_config(at_step_3)).losses) == 3


@pytest.mark.parametrize("megabytes", [0.1, 0.5])
def test_disk_that_takes_so_many_bytes(config_file, tmp_path, at_step_3, megabytes):
    """A real write error from the kernel, through the command line: RLIMIT_FSIZE cuts each file off."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from eightfold.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({int(megabytes * 1e6)}, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(config_file), "--resume"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "the checkpoint could not be written: " in done.stderr.splitlines()[-1]
    assert "older ones are untouched" in done.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert len(train(parse_config(at_step_3)).losses) == 3


def test_leftovers_of_a_killed_save_are_ignored_and_removed(at_step_3, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".step-00000005.writing").mkdir()
    shutil.copytree(checkpoints / "step-00000003" / "trainer", checkpoints / "step-00000009" / "trainer")
    (checkpoints / "step-00000009" / "trainer" / "state.json").unlink()
    assert checkpoint.find(tmp_path / "run", "latest").name == "step-00000003"
    train(parse_config(at_step_3))
    assert not list(checkpoints.glob(".step-*"))


def start_training(config_file, tmp_path, *arguments):
    """`eightfold train` in another process, once it has taken its first step."""
    command = [sys.executable, "-m", "eightfold.cli", "train", str(config_file), "steps=100000", "checkpoint_every=0"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"loss"' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_checkpoint(config_file, tmp_path, settings, number):
    process = start_training(config_file, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (folder,) = checkpoint.complete(tmp_path / "run")
    step = checkpoint.read_state(folder)["step"]
    assert errors.splitlines()[-1] == f"eightfold: interrupted after step {step}; go on with --resume {folder}"
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step
    more = train(parse_config(settings | {"resume": str(folder), "steps": step + 1, "output": str(tmp_path / "more")}))
    assert len(more.losses) == 1


def test_second_interrupt_ends_at_once(config_file, tmp_path, at_step_3):
    (tmp_path / "run" / "log.jsonl").unlink()
    process = start_training(config_file, tmp_path, "--resume", "eval_every=0")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130)  # 130 when the checkpoint was faster than the second signal
    assert "Traceback" not in errors
    assert checkpoint.complete(tmp_path / "run")
    for folder in checkpoint.complete(tmp_path / "run"):
        checkpoint.read_state(folder)


def test_random_state_is_restored(settings, model_folder):
    from eightfold.models.loading import load_decoder

    world = World(0, 1, torch.device("cpu"))
    model, _ = load_decoder(model_folder, "fp32")
    optimizer = torch.optim.AdamW(model.parameters())
    folder = checkpoint.save(settings["output"], 1, model, optimizer, {"note": "kept"}, world)
    expected = torch.rand(4)
    torch.rand(3)
    assert checkpoint.load(folder, model, optimizer, world)["note"] == "kept"
    assert torch.equal(torch.rand(4), expected)
