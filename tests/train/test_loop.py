"""The loop: losses fall, a resume repeats every bit, interrupts leave a checkpoint, logs and curve are written."""

import json
import math
import shutil

import pytest
import torch

from eightfold.train import checkpoint
from eightfold.train.config import OptimizerConfig, parse_config
from eightfold.train.loop import train
from eightfold.train.report import read_log
from eightfold.train.run import learning_rate


def optimizers():
    try:
        import eightfold.optim  # noqa: F401
    except ImportError:
        return ["adamw"]
    return ["adamw", "adamw8", "came8bit"]


def test_loss_falls_and_everything_is_written(settings, tmp_path):
    settings |= {"steps": 30, "tensorboard": True, "eval_every": 10, "checkpoint_every": 10}
    result = train(parse_config(settings))
    assert result.losses[-1] < 0.75 * result.losses[0]
    assert list(result.held_out) == [0, 10, 20, 30]
    assert result.held_out[30] < 0.75 * result.held_out[0]
    assert result.tokens == 30 * 4 * 32
    assert result.tokens_per_second > 0

    run = tmp_path / "run"
    records = read_log(run / "log.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert [record["loss"] for record in steps] == result.losses
    assert {"lr", "grad_norm", "tokens_per_second", "memory_bytes"} <= set(steps[0])
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checkpoint.complete(run)] == ["step-00000020", "step-00000030"]
    pytest.importorskip("tensorboard")
    assert list((run / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("name", optimizers())
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_resume_repeats_every_bit(settings, tmp_path, precision, name):
    settings["optimizer"]["name"] = name
    settings["model"]["precision"] = precision
    straight = train(parse_config(settings))
    shutil.copytree(checkpoint.folder_of(tmp_path / "run", 3), checkpoint.folder_of(tmp_path / "again", 3))
    resumed = train(parse_config({**settings, "output": str(tmp_path / "again"), "resume": "latest"}))
    assert resumed.losses == straight.losses[3:]
    assert resumed.held_out[6] == straight.held_out[6]
    weights = "step-00000006/model.safetensors"
    whole, parts = (tmp_path / name / "checkpoints" / weights for name in ("run", "again"))
    assert whole.read_bytes() == parts.read_bytes()


def test_resume_drops_log_lines_after_the_checkpoint(settings, ended_run, tmp_path):
    shutil.copytree(ended_run, tmp_path / "run")
    shutil.rmtree(checkpoint.folder_of(tmp_path / "run", 6))
    train(parse_config(settings | {"resume": "latest", "steps": 7}))
    steps = [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl") if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_accumulation_does_not_change_the_update(settings):
    whole = train(parse_config(settings | {"micro_batch_size": 4, "output": settings["output"] + "1"}))
    parts = train(parse_config(settings | {"micro_batch_size": 1, "output": settings["output"] + "2"}))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_micro_batches_add_up_inside_the_products(settings, weight_gradients, monkeypatch):
    """All but the first of four; the same run as with sums by autograd."""
    changes = {"micro_batch_size": 1, "steps": 3}
    settings = settings | changes | {"model": settings["model"] | {"precision": "fp8"}}
    ours = train(parse_config(settings))
    assert sum(weight_gradients) * 4 == 3 * len(weight_gradients) > 0
    monkeypatch.setattr("eightfold.train.loop.sum_in_products", lambda model, world: None)
    weight_gradients.clear()
    theirs = train(parse_config(settings | {"output": settings["output"] + "2"}))
    assert not any(weight_gradients)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)


def test_transformers_loads_a_checkpoint(ended_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eightfold.models.loading import load_decoder

    folder = checkpoint.find(ended_run, "latest")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours, _ = load_decoder(folder, "fp32")
    ids = torch.tensor([tokenizer.encode("The fox is quick")])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_parameters_in_bf16(settings):
    settings["model"] |= {"parameters": "bf16", "precision": "bf16"}
    result = train(parse_config(settings))
    assert result.losses[-1] < result.losses[0]
    from safetensors import safe_open

    with safe_open(result.checkpoint / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_schedule():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[11] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 15)))
    constant = config.model_copy(update={"schedule": "constant"})
    assert {learning_rate(constant, step, 20) for step in range(3, 20)} == {1.0}
    assert learning_rate(OptimizerConfig(lr=1.0), 0, 1) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "batch_size=5 is not a multiple of micro_batch_size=2 x 1 processes"),
        ({"resume": "latest"}, "no checkpoint to resume from"),
        ({"resume": "/nowhere/step-1"}, "no such checkpoint folder"),
        ({"optimizer": {"lr": 1e30, "max_grad_norm": None}}, r"the loss is \w+: the run diverged"),
    ],
)
def test_clear_errors(settings, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        train(parse_config(settings | changes))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_no_cuda(settings):
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        train(parse_config(settings | {"device": "cuda"}))


def test_resume_refuses_what_does_not_fit(settings, text_folder, ended_run):
    shutil.copytree(ended_run, settings["output"])
    for changes, message in (
        ({}, "already holds checkpoints; go on with --resume"),
        ({"resume": "latest"}, r"is at step 6; raise --steps \(6\) to go on"),
        ({"resume": "latest", "steps": 9, "seed": 5}, "the data are not those of the checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            train(parse_config(settings | changes))
    (text_folder / "new.txt").write_text("something else")
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        train(parse_config(settings | {"resume": "latest", "steps": 9}))


@pytest.mark.skipif("adamw8" not in optimizers(), reason="eightfold.optim is not built")
def test_resume_refuses_another_optimizer(settings, ended_run):
    shutil.copytree(ended_run, settings["output"])
    settings["optimizer"]["name"] = "adamw8"
    with pytest.raises(ValueError, match=r"its optimizer is torch\.optim.*the run's is eightfold\.optim"):
        train(parse_config(settings | {"resume": "latest", "steps": 9}))


def test_state_file_is_readable_json(ended_run):
    folder = checkpoint.find(ended_run, "latest")
    state = json.loads((folder / "trainer" / "state.json").read_text())
    assert state["step"] == 6
    assert state["config"]["batch_size"] == 4
    assert set(state["data"]) == {"epoch", "position", "fingerprint"}
