"""Rollout by another engine: a server in this process draws, the trainer weighs its tokens; each fault is one line."""

import json
import math
import socket
import subprocess
import sys

import pytest
import torch
import yaml

from completions_server import serving
from eightfold.generate.requests import Request
from eightfold.generate.text import SamplingOptions
from eightfold.models.loading import load_decoder
from eightfold.train.report import read_log
from eightfold.train.rl.config import parse_rl_config
from eightfold.train.rl.loop import train_rl
from eightfold.train.rl.remote import EngineOptions, ReloadOptions, RemoteRollout

VERIFIER = """
def vowels(item, completion, finish_reason):
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
"""


@pytest.fixture
def settings(tmp_path, model_folder):
    (tmp_path / "verifier.py").write_text(VERIFIER)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in ("Say: ", "More: ")))
    return {
        "model": {"path": str(model_folder), "precision": "fp8"},
        "task": {"path": str(tmp_path / "items.jsonl")},
        "reward": {"function": f"{tmp_path / 'verifier.py'}:vowels", "workers": 1},
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "optimizer": {"lr": 3e-3, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "steps": 2,
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "tensorboard": False,
    }


def requests(**changes):
    one = {"prompt": [5, 6, 7], "max_tokens": 8, "options": SamplingOptions(1.0), "samples": 3}
    one |= {"stop_ids": frozenset([0])} | changes
    return [Request(seed=1, **one), Request(seed=2, **one)]


@pytest.mark.parametrize("style", ["vllm", "ids"])
@pytest.mark.parametrize("together", [None, 2])
def test_ids_and_log_probabilities_are_the_engines(model_folder, style, together):
    model, _ = load_decoder(model_folder, "fp8")
    with serving(model_folder, style=style) as (url, engine):
        groups = RemoteRollout(EngineOptions(url, "tiny", samples_per_request=together), 272).generate(requests())
    assert [len(group) for group in groups] == [3, 3]
    assert sorted(body["n"] for body in engine.bodies) == ([3, 3] if together is None else [1, 1, 2, 2])
    seeds = [body["seed"] for body in engine.bodies]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    first = min(engine.bodies, key=lambda body: body["n"] != (together or 3))
    assert first["prompt"] == [5, 6, 7]
    assert (first["temperature"], first["top_k"], first["top_p"], first["min_p"]) == (1.0, -1, 1.0, 0.0)
    for group in groups:
        for found in group:
            # The trainer's own bits: the server computes as it does, and JSON keeps every one.
            again = model.token_log_probs(*_packed([5, 6, 7], found.tokens))
            assert again.tolist() == found.log_probs


def _packed(prompt, tokens):
    ids = torch.tensor([*prompt, *tokens[:-1]])
    rows = torch.arange(len(prompt) - 1, len(ids))
    return (
        ids,
        torch.tensor([0, len(ids)], dtype=torch.int32),
        len(ids),
        rows,
        torch.tensor(tokens),
        torch.ones(len(rows)),
    )


def test_strings_to_stop_at(model_folder):
    _, tokenizer = load_decoder(model_folder)
    asked = requests(stop=("a", "e", "1", "x"), max_tokens=60, samples=4)
    with serving(model_folder) as (url, engine):
        groups = RemoteRollout(EngineOptions(url, "tiny"), 272, tokenizer).generate(asked)
    assert engine.bodies[0]["stop"] == ["a", "e", "1", "x"]
    assert any(found.finish == "stop" and found.tokens[-1] != 0 for group in groups for found in group)


def test_a_run_whose_engine_is_never_told_goes_stale(settings, model_folder, capfd):
    with serving(model_folder) as (url, engine):
        settings["rollout"] = {"engine": {"url": url, "model": "tiny"}}
        config = parse_rl_config(settings)
        assert (config.objective.correction.kind, config.objective.correction.cap) == ("truncate", 2.0)
        records = train_rl(config).records
    assert records[0]["delta_logp_max"] == 0  # the same model, as yet
    assert records[1]["delta_logp_max"] > 1e-3
    assert [record["engine_age"] for record in records] == [0, 1]
    assert not engine.reloads
    assert len(engine.bodies) == 4


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_an_engine_that_is_told_follows(settings, model_folder, tmp_path, format):
    calls = {"/update_weights_from_disk": {"model_path": "{folder}"}, "/reset": {"paths": ["{folder}/x"], "n": 1}}
    far = {}
    for told in (False, True):
        with serving(model_folder) as (url, engine):
            reload = {"calls": calls, "format": format, "every": 2} if told else None
            settings["rollout"] = {"engine": {"url": url, "model": "tiny", "reload": reload}}
            settings |= {"steps": 3, "output": str(tmp_path / str(told))}
            records = train_rl(parse_rl_config(settings)).records
        far[told] = records[2]["delta_logp_mean"]
    folder = str(tmp_path / "True" / "engine")
    assert (
        engine.reloads
        == [("/update_weights_from_disk", {"model_path": folder}), ("/reset", {"paths": [f"{folder}/x"], "n": 1})] * 2
    )
    assert [record["engine_age"] for record in records] == [0, 1, 0]
    assert far[True] < 0.3 * far[False]


def test_a_resumed_run_tells_the_engine_first(settings, model_folder):
    with serving(model_folder) as (url, engine):
        settings["rollout"] = {"engine": {"url": url, "model": "tiny", "reload": {}}}
        train_rl(parse_rl_config(settings | {"steps": 1}))
        records = train_rl(parse_rl_config(settings | {"resume": "latest"})).records
    assert len(engine.reloads) == 2
    assert [record["engine_age"] for record in records] == [0]


def test_two_processes_share_an_engine(settings, model_folder, tmp_path):
    path = tmp_path / "settings.yaml"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with serving(model_folder) as (url, engine):
        settings["rollout"] = {"engine": {"url": url, "model": "tiny", "reload": {"format": "fp8"}}}
        path.write_text(yaml.safe_dump(settings))
        run = [*launch, "-m", "eightfold.cli", "rl", str(path)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert len(engine.reloads) == 2  # the first process alone asks for it
        assert len(engine.bodies) == 4
        engine.status = 500
        settings["output"] += "-again"
        path.write_text(yaml.safe_dump(settings))
        done = subprocess.run(run, capture_output=True, text=True, timeout=200)
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [record["engine_age"] for record in records] == [0, 0]
    assert all(record["delta_logp_mean"] < 1e-2 for record in records)
    assert done.returncode != 0
    assert "update_weights_from_disk: HTTP 500: out of memory" in done.stderr


def test_the_mode_says_so(settings, model_folder, monkeypatch):
    from eightfold.train.rl import loop

    modes = []
    monkeypatch.setattr(loop, "plot_rewards", lambda path, runs: modes.extend(runs))
    with serving(model_folder) as (url, _):
        settings |= {"rollout": {"engine": {"url": url, "model": "tiny"}}, "steps": 1}
        train_rl(parse_rl_config(settings))
    assert modes == ["fp8 training, rollout by another engine, TIS"]


def first(change):
    return lambda answer: change(answer["choices"][0])


def no_log_probs(choice):
    choice["logprobs"]["token_logprobs"] = None


def log_prob(value):
    def change(choice):
        choice["logprobs"]["token_logprobs"][0] = value

    return change


def token(value):
    def change(choice):
        choice["logprobs"]["tokens"][-1] = value

    return change


def no_tokens(choice):
    choice["logprobs"] = {"tokens": [], "token_logprobs": []}


FAULTS = {
    "choices": (lambda a: a["choices"].pop(), r"expected 3 choices \(n\), got 2"),
    "nothing": (lambda a: a.clear(), r"expected a list of choices, got \{\}"),
    "no log-probs": (first(no_log_probs), "expected logprobs.token_logprobs of . tokens, got none"),
    "short": (first(lambda c: c["logprobs"]["token_logprobs"].pop()), "of 8 tokens, got 7"),
    "nan": (first(log_prob(math.nan)), "expected finite log-probabilities, got nan"),
    "inf": (first(log_prob(-math.inf)), "expected finite log-probabilities, got -inf"),
    "null": (first(log_prob(None)), "expected finite log-probabilities, got None"),
    "minus infinity": (first(log_prob(-9999.0)), r"expected finite log-probabilities, got -9999\.0"),
    "positive": (first(log_prob(0.5)), r"expected finite log-probabilities, got 0\.5"),
    "no id": (first(token("a")), "it returns no token ids"),
    "alien id": (first(token("token_id:272")), "expected token ids of 0 to 271, got 272: another model?"),
    "fractions": (first(lambda c: c.update(token_ids=[1.0])), "it returns no token ids"),
    "no tokens": (first(no_tokens), "expected 1 to max_tokens=8 tokens, got 0"),
    "prompt": (first(lambda c: c.update(prompt_token_ids=[1])), r"it answers another prompt: \[1\] for \[5, 6, 7\]"),
    "finish": (first(lambda c: c.update(finish_reason="abort")), "finish_reason stop or length, got 'abort'"),
    "stop": (first(lambda c: c.update(finish_reason="stop")), "a completion stopped, but its last token, "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_one_line(model_folder, fault):
    spoil, message = FAULTS[fault]
    with serving(model_folder) as (url, engine):
        engine.spoil = spoil
        with pytest.raises(ValueError, match=message) as error:
            RemoteRollout(EngineOptions(url, "tiny"), 272).generate(requests(stop_ids=frozenset()))
    assert str(error.value).startswith(f"rollout.engine {url}/v1/completions: ")
    assert "\n" not in str(error.value)


def test_text_alone_is_refused(settings, model_folder):
    with serving(model_folder, style="text") as (url, _):
        settings["rollout"] = {"engine": {"url": url, "model": "tiny"}}
        with pytest.raises(
            ValueError, match=r"it returns no token ids .* return_token_ids or return_tokens_as_token_ids"
        ):
            train_rl(parse_rl_config(settings))


def test_no_connection_errors_and_silence(model_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ValueError, match=f"^rollout.engine {url}/v1/completions: Connection refused$"):
        RemoteRollout(EngineOptions(url, "tiny"), 272).generate(requests())
    with serving(model_folder) as (url, engine):
        engine.status = 500
        with pytest.raises(ValueError, match=r"/v1/completions: HTTP 500: out of memory$"):
            RemoteRollout(EngineOptions(url, "tiny"), 272).generate(requests())
        engine.status, engine.delay = 200, 1.0
        with pytest.raises(ValueError, match=r"no answer for 0.2 s \(timeout\)$"):
            RemoteRollout(EngineOptions(url, "tiny", timeout=0.2), 272).generate(requests())


def test_a_reload_that_fails_ends_the_run(settings, model_folder, tmp_path):
    calls = {"/update_weights_from_disk": {"model_path": "{folder}/elsewhere"}}
    with serving(model_folder) as (url, _):
        settings["rollout"] = {"engine": {"url": url, "model": "tiny", "reload": {"calls": calls}}}
        with pytest.raises(ValueError, match="/update_weights_from_disk: weights were not loaded: no such model"):
            train_rl(parse_rl_config(settings))


def test_the_key_comes_from_the_environment(model_folder, monkeypatch):
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    with serving(model_folder) as (url, engine):
        options = EngineOptions(url, "tiny", api_key_variable="ENGINE_KEY")
        with pytest.raises(ValueError, match="the environment variable ENGINE_KEY is not set"):
            RemoteRollout(options, 272)
        monkeypatch.setenv("ENGINE_KEY", "secret")
        RemoteRollout(options, 272).generate(requests())
    assert set(engine.keys) == {"Bearer secret"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"correction": {"kind": "none"}}}, "objective.correction.kind: expected truncate or mask"),
        ({"rollout": {"precision": "fp8"}}, "key 'rollout': precision=fp8: with an engine its own precision counts"),
        ({"rollout": {"temperature": 0.7}}, r"temperature=0\.7: expected 1 unless engine.log_probs_at_temperature"),
        ({"engine": {"url": "localhost:8000"}}, "key 'rollout.engine': url: expected http://host:port"),
        ({"engine": {"url": "http://h:1/v1"}}, "url: expected the address without /v1"),
        ({"engine": {"timeout": 0}}, "timeout: expected more than 0 seconds"),
        ({"engine": {"key": "x"}}, r"unknown key 'rollout\.engine\.key'.*; allowed in 'rollout\.engine': api_key_var"),
        ({"engine": {"reload": {"calls": {"x": {}}}}}, "calls: expected one path or more, each from /"),
        ({"engine": {"reload": {"every": 0}}}, "every: expected 1 or more, got 0"),
        ({"engine": {"reload": {"format": "int8"}}}, r"'rollout\.engine\.reload\.format'"),
    ],
)
def test_configurations_that_are_refused(settings, changes, message):
    engine = {"url": "http://h:1", "model": "m"} | changes.get("engine", {})
    settings |= {"objective": changes.get("objective", {})}
    settings["rollout"] = {"engine": engine} | changes.get("rollout", {})
    with pytest.raises(ValueError, match=message) as error:
        parse_rl_config(settings)
    assert "\n" not in str(error.value)


def test_configurations_that_are_kept(settings):
    engine = {"url": "http://h:1", "model": "m", "log_probs_at_temperature": True, "reload": {"format": "fp8"}}
    settings["rollout"] = {"engine": engine, "temperature": 0.7}
    settings["objective"] = {"clip_high": 0.28, "correction": {"cap": 3.0}}
    config = parse_rl_config(settings)
    assert (config.objective.clip_high, config.objective.correction.kind) == (0.28, "truncate")
    assert config.objective.correction.cap == 3.0
    assert config.rollout.engine.reload == ReloadOptions(format="fp8")
    assert parse_rl_config(config.model_dump(mode="json")) == config
    settings["objective"]["correction"] = {"kind": "mask", "cap": 3.0, "floor": 0.3}
    assert parse_rl_config(settings).objective.correction.kind == "mask"
