"""GRPO runs of a tiny model: one flow keeps every bit from rollout to training, rewards rise, runs resume or fail."""

import json

import pytest
import torch

from eightfold.train.report import read_log
from eightfold.train.rl.config import parse_rl_config
from eightfold.train.rl.loop import train_rl

VERIFIER = """
def vowels(item, completion, finish_reason):
    if item.get("trap") == "raise":
        raise ValueError("no idea")
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "verifier.py").write_text(VERIFIER)
    questions = ["Say a letter: ", "Another? ", "More of them, please: ", "x"]
    lines = [json.dumps({"question": q}) for q in questions]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def settings(task, model_folder, name="run", **changes):
    return {
        "model": {"path": str(model_folder), "precision": "fp8"},
        "task": {"path": str(task / "items.jsonl")},
        "reward": {"function": f"{task / 'verifier.py'}:vowels", "workers": 1},
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "rollout": {"cache_tokens": 1024, "page_size": 16},
        "optimizer": {"lr": 3e-3, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "steps": 3,
        "output": str(task / name),
        "device": "cpu",
        "tensorboard": False,
    } | changes


def test_the_unified_flow_keeps_every_bit_and_the_reward_rises(task, model_folder):
    result = train_rl(parse_rl_config(settings(task, model_folder, steps=25, samples_per_prompt=8)))
    records = result.records
    assert all(record["delta_logp_max"] == 0 for record in records)
    assert all(record["clip_fraction"] == 0 for record in records)
    first, last = (sum(r["reward_mean"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert last > first + 0.1
    assert records[0]["length_mean"] > 1
    assert records[0]["entropy"] > 1
    assert [record["step"] for record in read_log(task / "run" / "log.jsonl")] == list(range(1, 26))
    assert (task / "run" / "rewards.png").read_bytes().startswith(b"\x89PNG")
    assert (result.checkpoint / "model.safetensors").exists()


def test_a_rollout_in_fp8_of_a_policy_trained_in_bf16_is_another_policy(task, model_folder):
    changed = {"model": {"path": str(model_folder), "precision": "bf16"}}
    rollout = {"cache_tokens": 1024, "page_size": 16, "precision": "fp8"}
    corrected = {"correction": {"kind": "truncate", "cap": 2.0}}
    config = parse_rl_config(settings(task, model_folder, **changed, rollout=rollout, objective=corrected))
    records = train_rl(config).records
    assert all(record["delta_logp_max"] > 0 for record in records)
    assert all(record["probability_error"] > 1 for record in records)


def test_several_updates_micro_batches_and_a_reference(task, model_folder, weight_gradients):
    objective = {"kl_coefficient": 0.1, "clip_high": 0.28, "aggregation": "sequence_mean"}
    changes = {"updates_per_step": 2, "micro_batch_tokens": 40, "objective": objective}
    changes |= {"overlong": {"buffer": 3}, "advantage": {"dynamic_sampling": True}}
    records = train_rl(parse_rl_config(settings(task, model_folder, **changes))).records
    assert all(record["delta_logp_max"] == 0 for record in records)
    assert records[0]["reference_kl"] >= 0
    assert records[-1]["reference_kl"] > 0
    assert 0 < sum(weight_gradients) < len(weight_gradients)  # all but those of an update's first micro-batch


def test_a_resumed_run_repeats_the_uninterrupted_one(task, model_folder):
    whole = train_rl(parse_rl_config(settings(task, model_folder, "whole", steps=4))).records
    train_rl(parse_rl_config(settings(task, model_folder, "parts", steps=2)))
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train_rl(parse_rl_config(settings(task, model_folder, "parts", steps=4)))
    rest = train_rl(parse_rl_config(settings(task, model_folder, "parts", steps=4, resume="latest"))).records
    for expected, found in zip(whole[2:], rest, strict=True):
        for key in ("step", "loss", "reward_mean", "length_mean", "entropy", "grad_norm"):
            assert found[key] == expected[key]
    assert [record["step"] for record in read_log(task / "parts" / "log.jsonl")] == [1, 2, 3, 4]


def test_a_verifier_that_raises_is_a_counted_zero(task, model_folder, capfd):
    (task / "items.jsonl").write_text(json.dumps({"question": "q", "trap": "raise"}) + "\n")
    records = train_rl(parse_rl_config(settings(task, model_folder, steps=1))).records
    assert records[0]["verifier_failures"] == 16
    assert records[0]["reward_mean"] == 0
    assert "no idea" in capfd.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_samples(task, model_folder, monkeypatch):
    from eightfold.train.rl import loop

    def broken(*arguments):
        loss, meters = real(*arguments)
        return loss * float("nan"), meters

    real = loop.policy_loss
    monkeypatch.setattr(loop, "policy_loss", broken)
    with pytest.raises(ValueError, match=r"step 1: the loss is nan; the step's samples are in .*failed-step-1.json"):
        train_rl(parse_rl_config(settings(task, model_folder)))
    kept = json.loads((task / "run" / "failed-step-1.json").read_text())
    assert len(kept["samples"]) == 16
    assert {"prompt", "text", "tokens", "log_probs", "finish", "reward"} <= kept["samples"][0].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": {"max_tokens": 3}}, "expected a prompt of 1 to 3 tokens"),
        ({"rollout": {"cache_tokens": 16, "page_size": 16}}, "the cache has 1"),
        ({"resume": "latest"}, "no checkpoint to resume from"),
    ],
)
def test_what_a_user_can_mend(task, model_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        train_rl(parse_rl_config(settings(task, model_folder, **changes)))


def test_in_precision_shares_the_parameters(model_folder):
    from eightfold.models.loading import load_decoder

    model, _ = load_decoder(model_folder, "bf16", torch.float32, torch.device("cpu"))
    other = model.in_precision("fp8")
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    ids = torch.tensor([[1, 2, 3]])
    expected, _ = load_decoder(model_folder, "fp8", torch.float32, torch.device("cpu"))
    assert torch.equal(other(ids), expected(ids))
