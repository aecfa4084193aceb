"""examples/rl: its configurations are read, and compare.py runs modes and seeds, skips, resumes, and sums up."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eightfold.train.report import read_log
from eightfold.train.rl.config import load_rl_config
from eightfold.train.rl.tasks import load_task

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "rl"
VERIFIER = """
def vowels(item, completion, finish_reason):
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
"""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_read_and_fit_their_caches(path):
    config = load_rl_config(path)
    item = load_task(config.task, config.seed, config.reward.function is None).item(0)
    assert item["question"]
    size, prompt = config.rollout.page_size, 128
    pages = -(-(prompt + config.max_new_tokens) // size)
    together = min(config.rollout.sequences, config.prompts_per_step * config.samples_per_prompt)
    assert together * pages <= config.rollout.cache_tokens // size, "sequences would have to wait for pages"


def test_counting_rewards_what_comes_in_order():
    path = EXAMPLES / "counting.py"
    spec = importlib.util.spec_from_file_location("counting", path)
    counting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counting)
    item = {"first": 98, "last": 102}
    for completion, share in ((" 99, 100, 101, 102", 1.0), (" 99, 100, 102", 0.5), ("", 0.0), ("100, 101", 0.0)):
        assert counting.reward(item, completion, "stop") == share
    assert counting.reward(item, " 99, 100, 101, 102, 103, 104", "length") == 1.0
    printed = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed == (EXAMPLES / "counting.jsonl").read_text()


@pytest.fixture
def config(tmp_path, model_folder):
    (tmp_path / "verifier.py").write_text(VERIFIER)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in ("Say: ", "More: ")))
    settings = {
        "model": {"path": str(model_folder)},
        "task": {"path": str(tmp_path / "items.jsonl")},
        "reward": {"function": f"{tmp_path / 'verifier.py'}:vowels", "workers": 1},
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "rollout": {"cache_tokens": 1024, "page_size": 16},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "device": "cpu",
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def command(config, *arguments):
    return [sys.executable, str(EXAMPLES / "compare.py"), str(config), *map(str, arguments)]


def compare(config, *arguments, code=0):
    done = subprocess.run(command(config, *arguments), capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def test_two_modes_are_compared_once(config, tmp_path):
    out = tmp_path / "out"
    asked = ("steps=2", "--output", out, "--modes", "bf16", "mixed", "--seeds", 3, "--jobs", 2)
    done = compare(config, *asked)
    assert "bf16-3: ended" in done.stdout
    assert "mixed-3: ended" in done.stdout
    rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [(row["mode"], row["seed"], row["step"]) for row in rows] == [
        (mode, 3, step) for mode in ("bf16", "mixed") for step in (1, 2)
    ]
    assert {"reward", "delta_logp_max", "delta_logp_mean", "k3", "length"} <= rows[0].keys()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["config"]["optimizer"]["name"] == "adamw"
    bf16, mixed = summary["modes"]["bf16"], summary["modes"]["mixed"]
    assert bf16["delta_logp_max"] < mixed["delta_logp_max"]
    assert mixed["reward_start"] == pytest.approx(rows[2]["reward"])
    assert mixed["reward_last"] == pytest.approx((rows[2]["reward"] + rows[3]["reward"]) / 2)
    assert (out / "rewards.png").read_bytes().startswith(b"\x89PNG")

    again = compare(config, *asked)
    assert "started" not in again.stdout
    assert f"{mixed['reward_last']:.3f}" in again.stdout
    other = compare(config, "steps=3", *asked[1:], code=2)
    assert "bf16-3: holds a run of other settings; choose another --output" in other.stderr


def test_an_interrupted_comparison_goes_on(config, tmp_path):
    asked = ("steps=30", "--output", tmp_path / "out", "--modes", "unified", "--seeds", 0)
    log = tmp_path / "out" / "unified-0" / "log.jsonl"
    with subprocess.Popen(command(config, *asked), stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not read_log(log) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=100)[1]
    assert process.returncode == 130
    assert "the same command goes on" in errors
    done = len(read_log(log))
    assert 0 < done < 30
    kept = log.read_text().splitlines()[:done]
    compare(config, *asked)
    assert [record["step"] for record in read_log(log)] == list(range(1, 31))
    assert log.read_text().splitlines()[:done] == kept
    assert not (log.parent / "checkpoints").exists()


def test_a_run_that_fails_is_named(config, tmp_path):
    asked = ("steps=1", "prompt.max_tokens=1", "--output", tmp_path / "out", "--modes", "bf16", "--seeds", 0)
    done = compare(config, *asked, code=1)
    assert "bf16-0: failed: eightfold: item " in done.stdout
    assert "optimiser" in compare(config, "optimiser.lr=1", *asked, code=2).stderr
