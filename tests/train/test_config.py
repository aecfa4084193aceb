"""Configuration: YAML, overrides, and one clear line for each mistake."""

import pytest

from eightfold.train.config import load_config

MINIMUM = ["model.path=m", "data.path=d"]


def test_file_and_overrides(config_file):
    config = load_config(config_file, ["optimizer.lr=1e-4", "steps=7", "resume=null", "optimizer.betas=[0.8, 0.9]"])
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.steps == 7
    assert config.resume is None
    assert config.batch_size == 4  # from the file
    assert config.keep_last == 2  # the default


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", r"unknown key 'stepz' \(did you mean 'steps'\?\); allowed at the top: batch_size, .*steps"),
        ("optimizer.lrr=3", r"unknown key 'optimizer\.lrr' .*'lr'.* allowed in 'optimizer': betas, .*, lr, .*"),
        ("steps=many", r"key 'steps': .*valid integer.*got 'many'"),
        ("steps=0", r"key 'steps': .*greater than 0, got 0"),
        ("optimizer.lr=-1", r"key 'optimizer\.lr': .*greater than 0"),
        ("model.precision=fp4", r"key 'model\.precision': .*'fp32', 'bf16' or 'fp8', got 'fp4'"),
        ("model.fp8_head=true", r"key 'model': fp8_head: expected precision fp8 beside it, got bf16"),
        ("model.fp8_cache=true", r"key 'model': fp8_cache: expected precision fp8 beside it, got bf16"),
        ("tensorboard=perhaps", r"key 'tensorboard': .*valid boolean"),
        ("data.held_out=1.5", r"key 'data\.held_out': .*less than 1"),
        ("steps", r"override 'steps' is not of the form key=value"),
        ("model.path.x=3", r"model\.path is not a section"),
        ("steps=[", r"override 'steps=\[': the value is not YAML"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(None, [*MINIMUM, override])
    assert "\n" not in str(error.value)


def test_missing_key():
    with pytest.raises(ValueError, match="key 'data' is missing"):
        load_config(None, ["model.path=m"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected a mapping of keys at the top, got list"),
        (b"a: [1\nb: 2", "not YAML: .*line 2"),
        (b"a: \xff", "not UTF-8 at byte 3"),
        (b"model: {path: m}\ndata: {path: d}\nmodle: 1", "unknown key 'modle'"),
    ],
)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml")
