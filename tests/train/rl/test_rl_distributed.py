"""Two processes on the CPU (gloo, FSDP2) roll out and train as one does; a checkpoint of theirs goes on in one."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from eightfold.train import checkpoint
from eightfold.train.report import read_log
from eightfold.train.rl.config import parse_rl_config
from eightfold.train.rl.loop import train_rl

VERIFIER = """
def vowels(item, completion, finish_reason):
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
"""

# Gradients are cast to FP8 in groups of 128 tokens, and each process's tokens are groups of their own. So from the
# first update on weights differ by a share of the learning rate, and a token near a tie is drawn otherwise: of a
# step's 96, one alone moves the mean reward by 0.01.
FIRST_NORM, NORM, ENTROPY, LOSS, REWARD = 1e-3, 0.15, 0.01, 1e-3, 0.03


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory, make_model):
    """Shards of two processes: of q, o and the SwiGLU block whole groups of 128 rows, of k and v half a group."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
    return make_model(tmp_path_factory.mktemp("wide") / "tiny", **sizes, num_key_value_heads=2)


@pytest.fixture
def settings(tmp_path, wide_model):
    (tmp_path / "verifier.py").write_text(VERIFIER)
    questions = ["Say a letter: ", "Another? ", "More of them, please: ", "x"]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    return {
        "model": {"path": str(wide_model), "precision": "fp8"},
        "task": {"path": str(tmp_path / "items.jsonl")},
        "reward": {"function": f"{tmp_path / 'verifier.py'}:vowels", "workers": 1},
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "rollout": {"cache_tokens": 1024, "page_size": 16},
        "optimizer": {"lr": 1e-4, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "steps": 5,
        "checkpoint_every": 3,
        "output": str(tmp_path / "two"),
        "device": "cpu",
        "tensorboard": False,
    }


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RL = ("-m", "eightfold.cli", "rl")


def torchrun(tmp_path, settings, program=RL, fails=False):
    """`eightfold rl` in two processes; its standard error."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = subprocess.run([*LAUNCHER, *program, str(path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


def test_two_processes_equal_one(settings, tmp_path):
    settings["model"] |= {"fp8_head": True, "fp8_cache": True}
    one = train_rl(parse_rl_config(settings | {"output": str(tmp_path / "one")})).records
    errors = torchrun(tmp_path, settings)
    two = read_log(tmp_path / "two" / "log.jsonl")
    assert [record["step"] for record in two] == [1, 2, 3, 4, 5]
    assert errors.count("step 5/5: reward") == 1  # the first process alone prints
    for key in ("reward_mean", "reward_std", "length_mean", "length_max", "truncation_rate"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-12), key
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=FIRST_NORM)
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["delta_logp_max"] == 0
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=LOSS)
        assert theirs["entropy"] == pytest.approx(mine["entropy"], rel=ENTROPY)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=NORM)
        assert theirs["reward_mean"] == pytest.approx(mine["reward_mean"], abs=REWARD)

    # The third step's checkpoint goes on in one process, which draws what the two drew.
    folder = checkpoint.folder_of(tmp_path / "two", 3)
    assert len(checkpoint.read_state(folder)["random"]) == 2
    more = train_rl(parse_rl_config(settings | {"output": str(tmp_path / "more"), "resume": str(folder)})).records
    assert [record["step"] for record in more] == [4, 5]
    assert more[0]["reward_mean"] == pytest.approx(two[3]["reward_mean"], rel=1e-12)
    assert more[1]["reward_mean"] == pytest.approx(two[4]["reward_mean"], abs=REWARD)


def test_shares_of_unequal_size_a_reference_and_a_foreign_rollout(settings, tmp_path):
    """Groups are dropped, so that the processes have not the same number of micro-batches; two updates a step, of the
    samples that one process would take for each."""
    settings |= {"steps": 3, "updates_per_step": 2, "micro_batch_tokens": 24, "samples_per_prompt": 3}
    settings |= {"advantage": {"dynamic_sampling": True}, "overlong": {"buffer": 3}}
    settings["objective"] = {"kl_coefficient": 0.1, "aggregation": "sequence_mean", "clip_high": 0.28}
    settings["model"]["precision"] = "bf16"
    settings["rollout"]["precision"] = "fp8"
    one = train_rl(parse_rl_config(settings | {"output": str(tmp_path / "one")})).records
    torchrun(tmp_path, settings)
    two = read_log(tmp_path / "two" / "log.jsonl")
    assert 0 < one[0]["groups_dropped"] < 1
    for key in ("reward_mean", "groups_dropped", "entropy", "delta_logp_max", "delta_logp_mean", "clip_fraction"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-5), key
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=LOSS)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=NORM)
        assert theirs["reward_mean"] == pytest.approx(mine["reward_mean"], abs=REWARD)


GATHER = """
import os
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
import torch.distributed as dist
from eightfold import quantize
from eightfold.train import distributed
from eightfold.train.rl.sharing import gathered_codes

whole = DTensor.full_tensor
def counted(self):
    global gathered
    gathered += 1
    return whole(self)
DTensor.full_tensor = counted

with distributed.start("cpu") as world:
    mesh = dist.init_device_mesh("cpu", (2,))
    for rows, in_codes in ((512, True), (255, True), (256, True), (384, False), (128, False), (1, False)):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(rows)
            weight, gathered = torch.randn(rows, 208, dtype=dtype), 0
            codes, scales = gathered_codes(distribute_tensor(weight, mesh, [Shard(0)]))
            expected = quantize(weight, (128, 128))
            assert codes.dtype == expected.codes.dtype and codes.shape == weight.shape
            assert torch.equal(codes.view(torch.uint8), expected.codes.view(torch.uint8)), rows
            assert torch.equal(scales, expected.scales), rows
            assert gathered == (not in_codes), rows
os._exit(0)  # as cli.script does, and for its reason
"""


def test_gathered_codes_are_those_of_the_whole_weight(settings, tmp_path):
    """And where shards are whole groups, nothing but codes and scales travels."""
    (tmp_path / "gather.py").write_text(GATHER)
    torchrun(tmp_path, settings, [str(tmp_path / "gather.py")])


def test_an_error_of_one_process_ends_both_and_is_said_once(settings, tmp_path):
    settings["rollout"]["cache_tokens"] = 48
    questions = ["x", "x", "x" * 60, "x"]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    errors = torchrun(tmp_path, settings, fails=True)
    assert errors.count("the cache has 3") == 1
    errors = torchrun(tmp_path, settings | {"prompts_per_step": 3}, fails=True)
    assert errors.count("eightfold: prompts_per_step=3 cannot be shared by 2 processes") == 1


BROKEN = """
import os, sys
from eightfold import cli
from eightfold.train.rl import loop
real = loop.policy_loss
def broken(*arguments):
    loss, meters = real(*arguments)
    return loss * float("nan" if os.environ["RANK"] == "1" else "1"), meters
loop.policy_loss = broken
sys.argv.insert(1, "rl")
sys.exit(cli.script())
"""


def test_a_loss_of_one_process_that_is_no_number_stops_both(settings, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    errors = torchrun(tmp_path, settings, [str(tmp_path / "broken.py")], fails=True)
    assert errors.count("step 1: the loss is nan; the step's samples are in") == 1
    kept = json.loads((tmp_path / "two" / "failed-step-1.json").read_text())
    assert len(kept["samples"]) == 16
    assert len({sample["prompt"] for sample in kept["samples"]}) == 4


def test_interrupt_leaves_a_checkpoint(settings, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings | {"steps": 100000, "checkpoint_every": 0}))
    process = subprocess.Popen([*LAUNCHER, *RL, str(path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not read_log(tmp_path / "two" / "log.jsonl"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    folder = checkpoint.find(tmp_path / "two", "latest")
    step = checkpoint.read_state(folder)["step"]
    assert errors.count(f"eightfold: interrupted after step {step}; go on with resume=latest") == 1
    more = settings | {"output": str(tmp_path / "more"), "resume": str(folder), "steps": step + 1}
    assert [record["step"] for record in train_rl(parse_rl_config(more)).records] == [step + 1]
