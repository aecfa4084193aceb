"""Runs of seconds: what is learned, resume to the same bits, precisions, optimizers, captions, mistakes."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.train.image import loop as image_loop
from eightfold.train.image.config import EmaConfig, load_image_config, parse_image_config
from eightfold.train.image.ema import WeightMean, stochastic_bf16
from eightfold.train.image.loop import model_folder, train_image
from eightfold.train.image.model import load_image_model
from eightfold.train.interrupt import Interrupted
from eightfold.train.report import read_log


def tensors(folder):
    return {
        file.relative_to(folder): load_file(file)
        for file in sorted(folder.rglob("*.safetensors"))
        if "trainer" not in file.parts
    }


def same(one, other):
    assert one.keys() == other.keys()
    for file, content in one.items():
        for name, tensor in content.items():
            assert torch.equal(tensor, other[file][name]), (file, name)


def test_it_learns_and_leaves_a_model(settings, tmp_path):
    result = train_image(parse_image_config({**settings, "steps": 30, "eval_every": 0, "checkpoint_every": 0}))
    assert result.held_out[30] < 0.5 * result.held_out[0]
    assert result.mean_held_out.keys() == result.held_out.keys()
    assert result.held_out[0] == result.mean_held_out[0]
    assert result.units == 30 * 8
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    folder = model_folder(tmp_path / "run")
    assert folder == result.model == result.checkpoint / "ema"
    model = load_image_model(folder, "fp32")
    assert model.captions.names == ("blue", "green", "red")
    assert model.captions.classes.shape == (3, 2, 8)
    stored = load_file(folder / "embeddings.safetensors")
    assert torch.equal(stored["embeddings"], model.captions.classes)
    assert torch.equal(stored["negative"], model.captions.null)
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [record["loss"] for record in records if "loss" in record] == pytest.approx(result.losses)


@pytest.mark.parametrize("changes", [{}, {"model.precision": "fp8", "ema.dtype": "bf16", "micro_batch_size": 4}])
def test_resume_repeats_every_bit(settings, tmp_path, changes):
    def run(output, steps, **more):
        overrides = [f"{key}={json.dumps(value)}" for key, value in {**changes, **more}.items()]
        config = load_image_config(write_yaml(tmp_path, {**settings, "output": str(tmp_path / output)}), overrides)
        config.steps = steps
        return train_image(config)

    whole = run("whole", 6)
    run("parts", 3)
    parts = run("parts", 6, resume="latest")
    same(tensors(whole.checkpoint), tensors(parts.checkpoint))
    assert parts.losses == whole.losses[3:]
    assert parts.held_out[6] == whole.held_out[6]


def write_yaml(folder, values):
    (folder / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    return folder / "config.yaml"


def test_micro_batches_add_up(settings, tmp_path):
    losses = [
        train_image(
            parse_image_config({**settings, "output": str(tmp_path / str(size)), "micro_batch_size": size})
        ).losses
        for size in (8, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_and_fp8_follow_fp32(settings, tmp_path):
    after = {}
    for precision in ("fp32", "bf16", "fp8"):
        values = {**settings, "output": str(tmp_path / precision), "steps": 20, "eval_every": 0, "checkpoint_every": 0}
        values["model"] = {**settings["model"], "precision": precision}
        result = train_image(parse_image_config(values))
        after[precision] = result.held_out[20]
        assert (result.optimizer_bytes_per_parameter < 7) == (precision == "fp8")  # narrow tensors keep fp32 moments
    assert after["bf16"] == pytest.approx(after["fp32"], rel=0.05)
    assert after["fp8"] == pytest.approx(after["fp32"], rel=0.1)


def test_came8bit(settings):
    optimizer = {"name": "came8bit", "lr": 3e-3, "warmup_steps": 2}
    result = train_image(parse_image_config({**settings, "steps": 20, "checkpoint_every": 0, "optimizer": optimizer}))
    assert result.held_out[20] < 0.6 * result.held_out[0]
    assert result.optimizer_bytes_per_parameter < 7  # narrow matrices keep an fp32 moment


def test_interrupt_leaves_a_checkpoint(settings, tmp_path, monkeypatch):
    step = image_loop._ImageRun._one_step

    def interrupted(self):
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(image_loop._ImageRun, "_one_step", interrupted)
    with pytest.raises(Interrupted, match="after step 2; go on with --resume"):
        train_image(parse_image_config({**settings, "checkpoint_every": 0}))
    assert model_folder(tmp_path / "run").parent.name == "step-00000002"


def test_skipped_pictures_are_said_at_the_end(settings, pictures, capsys):
    for number in range(7):
        (pictures / "red" / f"{number:02}.png").write_bytes(b"no picture")
    result = train_image(parse_image_config(settings))
    assert len(result.skipped) == 7
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("7 pictures were skipped: red/00.png: cannot identify")
    assert last.endswith("; and 2 more")


def write_text(file, names, channels=8):
    save_file({"embeddings": torch.randn(len(names), 5, channels)}, file, {"files": json.dumps(names)})
    return {"path": str(file)}


def test_text_embeddings(settings, tmp_path):
    names = [f"{kind}/{number:02}.png" for kind in ("blue", "red") for number in range(12)]
    captions = write_text(tmp_path / "t.safetensors", names)
    result = train_image(parse_image_config({**settings, "captions": captions}))
    assert [reason for _, reason in result.skipped] == ["no caption"] * 12
    model = load_image_model(result.model, "fp32")
    assert model.captions.classes is None
    assert model.captions.null.shape == (5, 8)
    captions = write_text(tmp_path / "w.safetensors", names, channels=6)
    with pytest.raises(ValueError, match=r"w\.safetensors: embeddings: expected 8 channels .* got 6"):
        train_image(parse_image_config({**settings, "captions": captions, "output": str(tmp_path / "other")}))


def test_goes_on_from_a_folder(settings, tmp_path):
    first = train_image(parse_image_config(settings))
    values = {**settings, "model": {"path": str(tmp_path / "run"), "precision": "fp32"}, "output": str(tmp_path / "2")}
    second = train_image(parse_image_config(values))
    assert second.held_out[0] == pytest.approx(first.mean_held_out[6], rel=1e-6)


def test_checkpoints_of_other_runs(settings, pictures):
    train_image(parse_image_config(settings))
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train_image(parse_image_config(settings))
    more = {**settings, "steps": 9, "resume": "latest"}
    deeper = {**more, "model": {**settings["model"], "sizes": {**settings["model"]["sizes"], "num_layers": 3}}}
    with pytest.raises(ValueError, match="a checkpoint of another model: its num_layers is 2, the run's 3"):
        train_image(parse_image_config(deeper))
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        train_image(parse_image_config({**more, "seed": 1}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=x", "key 'model': expected one of path, released and sizes, got path and sizes"),
        ("model.sizes=null", "key 'model': expected one of path, released and sizes, got none"),
        ("model.sizes.num_layers=0", "num_layers: expected a positive integer, got 0"),
        ("model.sizes.layers=2", r"unknown key 'model\.sizes\.layers' .*; allowed in 'model\.sizes': .*num_layers"),
        ("flow.shift=0", r"key 'flow\.shift': .*greater than or equal to 0\.001, got 0"),
        ("flow.shft=1", r"unknown key 'flow\.shft' \(did you mean 'shift'\?\)"),
        ("ema.decay=1", r"key 'ema\.decay': .*less than 1, got 1"),
        ("captions.choice=best", r"key 'captions\.choice': .*'power' or 'softmax', got 'best'"),
        ("micro_batch_size=3", "batch_size: expected a multiple of micro_batch_size=3, got 8"),
        ("optimizer.name=sgd", r"key 'optimizer\.name': .*'came8bit'"),
    ],
)
def test_mistakes_in_a_configuration(settings, tmp_path, override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_image_config(write_yaml(tmp_path, settings), [override])
    assert "\n" not in str(error.value)


def test_models_that_do_not_fit(settings, monkeypatch):
    sizes = {**settings["model"]["sizes"], "out_channels": 6}
    with pytest.raises(ValueError, match="model: expected as many out_channels as in_channels"):
        train_image(parse_image_config({**settings, "model": {"sizes": sizes}}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in one process"):
        train_image(parse_image_config(settings))


# ---- the mean of the weights ----


def test_mean_of_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    mean = WeightMean(model, EmaConfig(decay=0.5), 0)
    want = 0.0
    for step in range(1, 12):
        model.weight.data.fill_(float(step))
        mean.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * step
    assert mean.tensors["weight"].item() == pytest.approx(want, rel=1e-6)


def test_a_mean_in_bf16_moves_by_less_than_it_can_hold():
    model = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.ones_(model.weight)
    mean = WeightMean(model, EmaConfig(decay=0.999, dtype="bf16"), 0)
    model.weight.data.fill_(1.1)
    for step in range(9000, 9500):
        mean.update(model, step)
    assert mean.tensors["weight"].float().mean() == pytest.approx(1.1 - 0.1 * 0.999**500, abs=2e-3)


def test_stochastic_rounding_has_no_bias():
    x = torch.full((200_000,), -1.003)
    rounded = stochastic_bf16(x, torch.Generator().manual_seed(0)).double()
    assert set(rounded.unique().tolist()) == {-1.0, -1.0078125}
    assert rounded.mean() == pytest.approx(-1.003, abs=3e-5)
