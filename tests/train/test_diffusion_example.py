"""examples/diffusion_lm at a tiny size: sums are written, a small model learns them, and the other files are sound."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eightfold.models import load_decoder
from eightfold.train.config import load_config
from eightfold.train.loop import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "diffusion_lm"


def sums(*arguments):
    return subprocess.run(
        [sys.executable, EXAMPLE / "arithmetic.py", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def value_of(text):
    return sum(map(int, re.findall(r"[+-]?\d+", text)))


def test_the_configurations_read():
    text, tuned = load_config(EXAMPLE / "text.yaml"), load_config(EXAMPLE / "arithmetic.yaml")
    assert text.steps * text.batch_size * text.data.sequence_length >= 100_000_000
    assert text.objective == tuned.objective == "masked-diffusion"
    assert tuned.model.path == text.output
    assert tuned.diffusion.average == "answers"


def test_sums_are_worked_out(tmp_path):
    done = sums(tmp_path / "sums", "--train", 500, "--test", 50, "--terms", 2, 5)
    assert done.returncode == 0, done.stderr
    train_lines, test_lines = (records(tmp_path / "sums" / f"{name}.jsonl") for name in ("train", "test"))
    assert (len(train_lines), len(test_lines)) == (500, 50)
    assert len({line["prompt"] for line in train_lines + test_lines}) == 550
    for line in train_lines + test_lines:
        values = [value_of(step) for step in (line["prompt"] + line["completion"]).split("=")]
        assert len(set(values)) == 1
        assert 0 <= values[0] < 100


def test_too_few_sums(tmp_path):
    done = sums(tmp_path / "sums", "--train", 500, "--terms", 2, 2, "--largest", 9)
    assert done.returncode != 0
    assert done.stderr == "there are fewer than 1,500 such sums: ask for more terms\n"


@pytest.mark.parametrize("objective", ["masked-diffusion", "block-diffusion"])
def test_a_tiny_model_learns(tmp_path, objective):
    assert sums(tmp_path / "tiny", "--tiny", "--train", 400, "--test", 10, "--terms", 2, 2).returncode == 0
    config_file = tmp_path / "tiny" / "model" / "config.json"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "head_dim": 16}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | small))
    changes = [
        f"model.path={tmp_path}/tiny/model",
        f"data.path={tmp_path}/tiny/train.jsonl",
        "steps=60",
        "batch_size=8",
    ]
    changes += [f"output={tmp_path}/run", "optimizer.warmup_steps=5", "eval_every=0", "data.held_out=0.1", "device=cpu"]
    changes += [f"objective={objective}", "diffusion.block=8", "data.sequence_length=48"]
    result = train(load_config(EXAMPLE / "tiny.yaml", changes))
    assert result.held_out[60] < 0.7 * result.held_out[0]
    model, tokenizer = load_decoder(result.checkpoint)
    config = model.config
    assert (config.mask_token_id, config.shifted_logits) == (tokenizer.mask_token_id, False)
    assert config.attention_block == (0 if objective == "masked-diffusion" else 8)
    assert tokenizer.decode(tokenizer.encode("12+34=46")) == "12+34=46"
