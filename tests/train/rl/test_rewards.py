"""Verifiers in processes of their own: right rewards, and every way in which one can fail."""

import gc
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eightfold.train.rl.rewards import RewardOptions, VerifierPool, VerifierSource
from eightfold.train.rl.tasks import TaskOptions
from eightfold.train.rl.verifiers import MATH_VERIFY, REASONING_GYM, MathAnswer, extract_answer, reasoning_gym_dataset

VERIFIERS = '''
import math, os, re, signal, subprocess, sys, threading, time

def length(item, completion, finish_reason):
    return len(completion) / item["most"]

def fickle(item, completion, finish_reason):
    """What the completion says happens."""
    do, _, value = completion.partition(" ")
    if do == "reward":
        return float(value)
    if do == "return":
        return {"none": None, "text": "1", "list": [1], "true": True, "nan": math.nan, "inf": -math.inf}[value]
    if do == "raise":
        raise KeyError(value)
    if do == "exit":
        sys.exit(3)
    if do == "die":
        os._exit(int(value))
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "die_later":
        threading.Timer(0.05, os._exit, [0]).start()
        return 1
    if do == "sleep":
        time.sleep(float(value))
        return 1
    if do == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if do == "in_c":
        re.match("(a+)+$", "a" * 60 + "b")  # never lets another thread run
    if do == "with_child":
        child = subprocess.Popen(["sleep", "60"])
        with open(item["path"], "w") as out:
            out.write(f"{os.getpid()} {child.pid}")
        time.sleep(60)

def knows_torch(item, completion, finish_reason):
    return "torch" in sys.modules

def finished(item, completion, finish_reason):
    return finish_reason == "stop"
'''


@pytest.fixture
def verifiers(tmp_path):
    path = tmp_path / "my_verifiers.py"
    path.write_text(VERIFIERS)
    return path


@pytest.fixture
def fickle(verifiers):
    """A pool of one worker with half a second an item, and no process or descriptor left afterwards."""
    before = descriptors()
    with VerifierPool(VerifierSource(f"{verifiers}:fickle"), RewardOptions(workers=1, time_limit=0.5)) as pool:
        yield pool
        processes = [worker._process.pid for worker in pool._workers]
    assert processes
    assert not [process for process in processes if alive(process)]
    assert descriptors() == before


def descriptors():
    gc.collect()  # what earlier tests left in cycles
    return len(os.listdir("/proc/self/fd"))


def alive(process):
    """Whether there is such a process, other than a dead one that waits for its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(process, patience=10.0):
    end = time.monotonic() + patience
    while alive(process) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(process)


def ask(pool, *completions, **item):
    return pool.score((item, completion, "stop") for completion in completions)


def test_rewards_come_in_the_order_of_submission(verifiers):
    completions = ["x" * (7 * number % 50) for number in range(200)]
    with VerifierPool(VerifierSource(f"{verifiers}:length"), RewardOptions(workers=3)) as pool:
        for _ in range(2):
            found = ask(pool, *completions, most=50)
            assert [verdict.reward for verdict in found] == [len(completion) / 50 for completion in completions]
        assert not pool.failures
        assert pool.first_failure is None
        assert pool.collect() == []


def test_module_path(verifiers, monkeypatch):
    monkeypatch.syspath_prepend(str(verifiers.parent))
    with VerifierPool(VerifierSource("my_verifiers:finished"), RewardOptions(workers=1)) as pool:
        found = pool.score([({}, "a", "stop"), ({}, "a", "length")])
    assert [verdict.reward for verdict in found] == [1.0, 0.0]


def test_workers_start_without_torch(verifiers):
    with VerifierPool(VerifierSource(f"{verifiers}:knows_torch"), RewardOptions(workers=1)) as pool:
        assert ask(pool, "")[0].reward == 0


@pytest.mark.parametrize(
    ("completion", "failure", "message"),
    [
        ("raise here", "raised", r"KeyError: 'here' \(.*my_verifiers\.py:15\)"),
        ("exit", "raised", "SystemExit: 3"),
        ("return none", "raised", "ValueError: expected a number as reward, got None"),
        ("return text", "raised", "expected a number as reward, got '1'"),
        ("return list", "raised", r"expected a number as reward, got \[1\]"),
        ("return nan", "raised", "expected a finite reward, got nan"),
        ("return inf", "raised", "expected a finite reward, got -inf"),
        ("reward 1.5", "out of range", "expected a reward from 0 to 1, got 1.5"),
        ("reward -1", "out of range", "expected a reward from 0 to 1, got -1"),
        ("die 7", "died", r"its process ended \(exit status 7\)"),
        ("kill", "died", r"its process ended \(killed by SIGKILL\)"),
        ("sleep 60", "time limit", "took more than the limit of 0.5 s"),
        ("stubborn", "time limit", "took more than the limit of 0.5 s"),
        ("in_c", "time limit", "took more than the limit of 0.5 s"),
    ],
)
def test_failures_give_zero_and_are_counted(fickle, completion, failure, message):
    start = time.monotonic()
    before, failed, after = ask(fickle, "reward 0.5", completion, "return true")
    assert time.monotonic() - start < 30
    assert (before.reward, after.reward) == (0.5, 1.0)
    assert (failed.reward, failed.failure) == (0.0, failure)
    assert re.search(message, failed.message)
    assert "\n" not in failed.message
    assert fickle.failures == {failure: 1}
    assert fickle.first_failure.endswith(f"fickle: {failure}: {failed.message}")


def test_first_failure_is_kept(fickle):
    ask(fickle, "raise first", "return nan", "raise third")
    assert "KeyError: 'first'" in fickle.first_failure
    assert fickle.failures == {"raised": 3}


def test_kill_reaches_what_a_verifier_started(fickle, tmp_path):
    note = tmp_path / "processes"
    assert ask(fickle, "with_child", path=str(note))[0].failure == "time limit"
    worker, child = map(int, note.read_text().split())
    assert gone(worker)
    assert gone(child)


def test_worker_that_dies_idle_costs_no_request(fickle):
    assert ask(fickle, "die_later")[0].reward == 1
    gone(fickle._workers[0]._process.pid)
    assert ask(fickle, "reward 0.25")[0].reward == 0.25
    assert not fickle.failures


def test_late_answer_is_late_though_nobody_looked(fickle):
    fickle.submit({}, "sleep 0.7", "stop")
    time.sleep(1.2)
    assert fickle.collect()[0].failure == "time limit"


def test_hanging_items_do_not_hold_up_others(verifiers):
    options = RewardOptions(workers=2, time_limit=0.5)
    with VerifierPool(VerifierSource(f"{verifiers}:fickle"), options) as pool:
        found = ask(pool, "sleep 60", *["reward 1"] * 20, "sleep 60")
    assert [verdict.reward for verdict in found] == [0, *[1] * 20, 0]
    assert pool.failures == {"time limit": 2}


def test_workers_end_with_a_parent_that_was_killed(verifiers, tmp_path):
    note = tmp_path / "processes"
    program = (
        "from eightfold.train.rl.rewards import *\n"  # and no guard around what a main script does
        f"pool = VerifierPool(VerifierSource({str(verifiers) + ':fickle'!r}), RewardOptions(time_limit=100))\n"
        f"pool.score([({{'path': {str(note)!r}}}, 'with_child', 'stop')])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        end = time.monotonic() + 60
        while not (note.exists() and len(note.read_text().split()) == 2) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    worker, child = map(int, note.read_text().split())
    assert gone(worker)
    assert gone(child)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("absent.py:f", r"absent\.py:f: ValueError: absent\.py: no such file"),
        ("{file}:lenght", r"has no function 'lenght' \(did you mean 'length'\?\)"),
        ("{file}:VALUE", "has no function 'VALUE'"),
        ("no_such_package.rewards:f", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("{broken}:f", "SyntaxError"),
        ("{leaving}:f", "SystemExit: 1"),
        ("{dying}:f", r"its process ended while loading it \(exit status 4\)"),
    ],
)
def test_verifier_that_cannot_be_loaded(verifiers, tmp_path, target, message):
    files = {"broken": "def f(:", "leaving": "import sys; sys.exit(1)", "dying": "import os; os._exit(4)"}
    paths = {name: tmp_path / f"{name}.py" for name in files}
    for name, text in files.items():
        paths[name].write_text(text)
    before = descriptors()
    with pytest.raises(ValueError, match=message) as error:
        VerifierPool(VerifierSource(target.format(file=verifiers, **paths)), RewardOptions(workers=2))
    assert "\n" not in str(error.value)
    assert descriptors() == before


def test_closed_pool(verifiers):
    pool = VerifierPool(VerifierSource(f"{verifiers}:length"), RewardOptions(workers=1))
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        pool.submit({}, "", "stop")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"function": "score"}, r"function: expected package\.module:function or .*, got 'score'"),
        ({"extraction": "first"}, "extraction: expected one of tag, last_line, last_number, whole, got 'first'"),
        ({"workers": 0}, "workers: expected 1 or more, got 0"),
        ({"time_limit": 0}, "time_limit: expected more than 0 seconds, got 0"),
        ({"time_limit": math.inf}, "time_limit: expected a finite number, got inf"),
        ({"low": 1.0}, r"high: expected more than low=1\.0, got 1\.0"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(ValueError, match=message):
        RewardOptions(**values)


@pytest.mark.parametrize(
    ("extraction", "completion", "answer"),
    [
        ("tag", "so <answer>1</answer>, no: <answer>\n 2 </answer>.", "2"),
        ("tag", "2", None),
        ("last_line", "a\nb \n\n", "b"),
        ("last_line", "", None),
        ("last_number", "12 and -3,456.50, so", "-3456.50"),
        ("last_number", "none", None),
        ("whole", " all of it\n", "all of it"),
    ],
)
def test_extraction(extraction, completion, answer):
    assert extract_answer(completion, extraction) == answer


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = TaskOptions(name="chain_sum", options={"max_terms": 3})
    item = reasoning_gym_dataset("chain_sum", task.options, seed=5, size=10)[7]
    right = f"Let me see. <answer>{item['answer']}</answer>"
    with VerifierPool(VerifierSource.of(RewardOptions(), task), RewardOptions(workers=1, time_limit=30)) as pool:
        found = ask(pool, right, "<answer>wrong</answer>", str(item["answer"]), **item)
    assert [verdict.reward for verdict in found] == [1.0, 0.0, 0.0]
    assert not pool.failures


def test_gsm8k_answers():
    pytest.importorskip("math_verify")
    source = VerifierSource.of(RewardOptions(), TaskOptions(path="gsm8k.jsonl"))
    with VerifierPool(source, RewardOptions(workers=1, time_limit=30)) as pool:
        answer = "She sells 1,000 + 234 eggs.\n#### 1,234"
        completions = [
            "so\n#### 1234",
            r"It is \boxed{1234}.",
            "The answer is 1,234.",
            "<answer>1234</answer>",
            "1235",
            "",
        ]
        found = ask(pool, *completions, answer=answer)
        assert [verdict.reward for verdict in found] == [1, 1, 1, 1, 0, 0]
        assert not pool.failures
        assert ask(pool, "1", answer="")[0].failure == "raised"
        assert "field 'answer': math-verify finds no answer in ''" in pool.first_failure


def test_users_function_goes_before_the_task(verifiers):
    options = RewardOptions(function=f"{verifiers}:length")
    assert VerifierSource.of(options, TaskOptions(name="chain_sum")) == VerifierSource(f"{verifiers}:length")


def test_absent_packages_are_named_with_their_version(monkeypatch):
    requirements = (
        (Path(__file__).parents[3] / "requirements.txt").read_text().replace("[antlr4-13-2]", "").splitlines()
    )
    assert {REASONING_GYM, MATH_VERIFY} <= set(requirements)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install reasoning-gym==0\.1\.25"):
        reasoning_gym_dataset("chain_sum", {}, 0, 1)
    with pytest.raises(ImportError, match=r"pip install math-verify==0\.9\.0"):
        MathAnswer("answer")
