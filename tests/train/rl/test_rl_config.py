"""The configuration of a reinforcement learning run: sections that are option classes, and one line a mistake."""

import pytest
import yaml

from eightfold.train.rl.config import load_rl_config, parse_rl_config
from eightfold.train.rl.objective import CorrectionOptions, ObjectiveOptions
from eightfold.train.rl.tasks import TaskOptions

MINIMUM = ["model.path=m", "task.name=chain_sum"]


def test_file_and_overrides(tmp_path):
    path = tmp_path / "rl.yaml"
    path.write_text(
        "model: {path: m, precision: fp8}\n"
        "task: {name: chain_sum, options: {max_terms: 3}}\n"
        "overlong: {buffer: 64}\n"
        "objective: {clip_high: 0.28, correction: {kind: truncate}}\n"
    )
    config = load_rl_config(path, ["objective.correction.cap=3", "advantage.dynamic_sampling=true"])
    assert config.model.precision == "fp8"
    assert config.task == TaskOptions("chain_sum", {"max_terms": 3})
    assert config.objective == ObjectiveOptions(clip_high=0.28, correction=CorrectionOptions("truncate", cap=3.0))
    assert config.advantage.dynamic_sampling
    assert config.overlong.buffer == 64
    assert parse_rl_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "objective.clip_lo=1",
            r"unknown key 'objective\.clip_lo' \(did you mean 'clip_low'\?\); allowed in 'objective': ",
        ),
        ("objective.correction.c=1", r"unknown key .*; allowed in 'objective\.correction': cap, floor, kind"),
        ("overlong.buf=1", r"key 'overlong\.buffer' is missing"),
        ("overlong={buffer: 8, b: 1}", r"unknown key 'overlong\.b'.*; allowed in 'overlong': buffer, penalty"),
        ("objective.clip_low=2", r"key 'objective': clip_low: expected 0 to 1, got 2\.0"),
        ("objective.correction.kind=tis", r"key 'objective\.correction\.kind': .*'mask', got 'tis'"),
        ("task.path=x", r"key 'task': name, path: expected one of the two"),
        ("reward.workers=many", r"key 'reward\.workers': .*valid integer.*got 'many'"),
        ("overlong.buffer=257", r"^configuration: overlong\.buffer: expected at most max_new_tokens=256, got 257"),
        (
            "promts_per_step=1",
            r"unknown key 'promts_per_step' \(did you mean 'prompts_per_step'\?\); allowed at the top",
        ),
        ("samples_per_prompt=0", r"key 'samples_per_prompt': .*greater than 0, got 0"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_rl_config(None, [*MINIMUM, override])
    assert "\n" not in str(error.value)


def test_missing_task():
    with pytest.raises(ValueError, match="key 'task' is missing"):
        load_rl_config(None, ["model.path=m"])
