"""examples/pretrain at a tiny size: text is collected, two models start from one set of weights, and are compared."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from eightfold.train.config import load_config, parse_config
from eightfold.train.loop import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pretrain"
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALLER = {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 320}


def script(name, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLE / name, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_configuration_reads_100_million_tokens():
    config = load_config(EXAMPLE / "pretrain.yaml")
    assert config.steps * config.batch_size * config.data.sequence_length >= 100_000_000
    assert config.model.init == "random"
    from eightfold.models.config import DecoderConfig

    shape = DecoderConfig.from_hf(json.loads((EXAMPLE / "smollm2-135m.json").read_text()))
    assert (shape.num_hidden_layers, shape.hidden_size, shape.vocab_size) == (30, 576, 49152)


def test_from_text_to_curves(tmp_path):
    library = tmp_path / "library"
    library.mkdir()
    for number in range(12):
        (library / f"{number}.py").write_text("".join(f"def f{i}(x):\n    return x + {number}\n" for i in range(40)))
    (library / "again.py").write_text((library / "3.py").read_text())
    (library / "not_utf8.txt").write_bytes(b"\xff" * 500)
    (library / "minified.h").write_text("x" * 5000)
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(json.loads((EXAMPLE / "smollm2-135m.json").read_text()) | TINY | SMALLER))
    out = script("collect.py", tmp_path / "corpus", "--root", library, "--config", config)
    assert out.startswith("12 texts, ")
    (shard,) = (tmp_path / "corpus" / "text").iterdir()
    assert len(shard.read_text().splitlines()) == 12

    settings = yaml.safe_load((EXAMPLE / "pretrain.yaml").read_text())
    settings["data"] |= {"path": str(tmp_path / "corpus" / "text"), "cache": str(tmp_path / "tokens")}
    settings["data"] |= {"sequence_length": 32, "held_out": 0.1}
    settings["optimizer"]["warmup_steps"] = 2
    settings |= {"steps": 12, "batch_size": 4, "eval_every": 4, "eval_sequences": 4, "log_every": 2, "device": "cpu"}
    results = []
    for precision in ("bf16", "fp8"):
        settings["model"] |= {"path": str(tmp_path / "corpus" / "model"), "precision": precision}
        results.append(train(parse_config(settings | {"output": str(tmp_path / precision)})))
    assert all(sorted(result.held_out) == [0, 4, 8, 12] for result in results)
    assert abs(results[0].held_out[0] - results[1].held_out[0]) < 0.05  # the same weights, the same text
    assert all(result.held_out[12] < result.held_out[0] - 0.2 for result in results)
    assert results[0].tokens == 12 * 4 * 32
    assert len(list((tmp_path / "tokens").iterdir())) == 1

    out = script("compare.py", tmp_path / "bf16", tmp_path / "fp8", "--output", tmp_path / "curves.png")
    assert "gap: held out " in out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "curves.json").read_text())
    assert figures["runs"]["fp8"]["steps"] == 12
    gap = results[1].held_out[12] - results[0].held_out[12]
    assert abs(figures["gap"]["held_out_loss"] - gap) < 1e-9
