"""Two processes on the CPU (gloo, FSDP2): same losses as one, and a checkpoint that goes from two to one and back."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from eightfold.train import checkpoint
from eightfold.train.config import parse_config
from eightfold.train.loop import train
from eightfold.train.report import read_log

# The processes add the same fp32 numbers in another order; FP8 rounds some of the results to the other neighbour.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-3, "fp8": 5e-3}


def torchrun(tmp_path, settings, *arguments, processes=2):
    """`eightfold train` under torchrun; its standard error."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, "-m", "eightfold.cli", "train", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def logged(output, key="loss"):
    return {record["step"]: record[key] for record in read_log(f"{output}/log.jsonl") if key in record}


def optimizer_name():
    try:
        import eightfold.optim  # noqa: F401
    except ImportError:
        return "adamw"
    return "auto"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_two_processes_equal_one(settings, tmp_path, precision):
    settings["model"]["precision"] = precision
    settings["optimizer"]["name"] = optimizer_name()
    one = train(parse_config(settings | {"output": str(tmp_path / "one")}))
    errors = torchrun(tmp_path, settings)
    assert list(logged(settings["output"]).values()) == pytest.approx(one.losses, rel=TOLERANCE[precision])
    assert logged(settings["output"], "held_out_loss") == pytest.approx(one.held_out, rel=TOLERANCE[precision])
    assert errors.count("step 6/6: loss") == 1  # the first process alone prints

    # Continue in one process from the two processes' step 3, and in two from the one process's step 3.
    for start, output in (("run", "run_then_one"), ("one", "one_then_two")):
        folder = checkpoint.folder_of(tmp_path / start, 3)
        go_on = settings | {"output": str(tmp_path / output), "resume": str(folder)}
        if output == "run_then_one":
            train(parse_config(go_on))
        else:
            torchrun(tmp_path, go_on)
        assert list(logged(tmp_path / output).values()) == pytest.approx(one.losses[3:], rel=TOLERANCE[precision])


@pytest.mark.parametrize("objective", ["masked-diffusion", "block-diffusion"])
def test_diffusion_in_two_processes(settings, tmp_path, objective):
    """The noise of a step is that of one process."""
    settings |= {"objective": objective, "diffusion": {"mask_token": 270, "block": 8}}
    one = train(parse_config(settings | {"output": str(tmp_path / "one")}))
    torchrun(tmp_path, settings)
    assert list(logged(settings["output"]).values()) == pytest.approx(one.losses, rel=TOLERANCE["fp32"])
    assert logged(settings["output"], "held_out_loss") == pytest.approx(one.held_out, rel=TOLERANCE["fp32"])


def test_weights_saved_by_two_processes_are_those_of_one(settings, tmp_path):
    from safetensors.torch import load_file

    one = train(parse_config(settings | {"output": str(tmp_path / "one")})).checkpoint
    torchrun(tmp_path, settings)
    two = checkpoint.find(settings["output"], "latest")
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    ours, theirs = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=2e-4, msg=name)
    assert len(json.loads((two / "trainer" / "state.json").read_text())["random"]) == 2


LATE = """
import os, sys, time
from eightfold import cli
fail = cli._fail
def late(*arguments):
    time.sleep(20 if os.environ["RANK"] == "{late}" else 0)
    code = fail(*arguments)
    time.sleep(2 if "{late}" == "neither" else 0)
    return code
cli._fail = late
sys.exit(cli.script())
"""


@pytest.mark.parametrize("late", ["0", "1", "neither"])
def test_a_user_error_is_said_once(settings, tmp_path, late):
    """Also when torchrun ends one process before it could speak, and when both speak before torchrun looks."""
    path, command = tmp_path / "settings.yaml", tmp_path / "late.py"
    path.write_text(yaml.safe_dump(settings | {"batch_size": 3, "micro_batch_size": None}))
    command.write_text(LATE.format(late=late))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(command), "train", str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("eightfold: batch_size=3 cannot be shared by 2 processes") == 1


def test_interrupt_leaves_a_checkpoint(settings, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings | {"steps": 100000, "checkpoint_every": 0}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "eightfold.cli", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not logged(settings["output"]):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    folder = checkpoint.find(settings["output"], "latest")
    step = checkpoint.read_state(folder)["step"]
    assert f"eightfold: interrupted after step {step}; go on with --resume {folder}" in errors
    go_on = settings | {"output": str(tmp_path / "more"), "resume": str(folder), "steps": step + 1}
    assert len(train(parse_config(go_on)).losses) == 1
