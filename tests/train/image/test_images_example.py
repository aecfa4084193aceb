"""examples/images at a tiny size: compare.py runs every part, skips what is done and goes on; its arithmetic."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from eightfold.train import checkpoint, sections

from .conftest import draw_pictures

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "images"
MODULES = ("classifier", "experiment")
PARTS = ["precision", "frechet", "growth", "pruning", "best_of"]
SMALL = [
    "train.model.sizes.num_attention_heads=1",
    "train.device=cpu",
    "train.steps=4",
    "train.batch_size=4",
    "train.eval_every=2",
    "train.checkpoint_every=2",
    "growth.first_steps=2",
    "pruning.steps=2",
    "pruning.samples=2",
    "pruning.random=1",
    "sampling.pictures=48",
    "sampling.steps=2",
    "classifier.width=2",
    "classifier.epochs=1",
]


@pytest.fixture(scope="module")
def example():
    """Its two modules, by name; no other test finds them."""
    sys.path.insert(0, str(EXAMPLE))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(EXAMPLE))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder with the pictures and the output `out`, what the first run printed)."""
    folder = tmp_path_factory.mktemp("images")
    draw_pictures(folder / "pictures")
    return folder, compare(folder).stdout


def compare(folder, *overrides, code=0):
    command = [sys.executable, EXAMPLE / "compare.py", EXAMPLE / "tiny.yaml", *SMALL, *overrides]
    command += ["--data", folder / "pictures", "--output", folder / "out"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert ran.returncode == code, ran.stderr + ran.stdout
    return ran


def settings(example, config, *overrides):
    return sections.load(example["experiment"].Settings, EXAMPLE / config, ["train.data.path=pictures", *overrides])


@pytest.mark.parametrize("config", ["cifar10.yaml", "tiny.yaml"])
def test_the_configurations_read(example, tmp_path, config):
    read = settings(example, config)
    assert list(read.modes) == ["bf16", "fp8"]
    assert read.train.model.sizes.attention_head_dim in (32, 64, 128), "the op of linear attention takes these"
    assert read.train.ema.decay, "losses and pictures are those of the mean of the weights"
    example["experiment"].Experiment(read, tmp_path)


def test_every_part_is_run_and_measured(done):
    folder, printed = done
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert list(summary) == PARTS
    assert all(part["device"].startswith("CPU") for part in summary.values())
    precision, frechet, growth, pruning, best = (summary[name]["found"] for name in PARTS)
    assert list(precision) == ["bf16", "fp8"]
    for each in precision.values():
        assert list(each["curve"]) == ["0", "2", "4"]
        assert each["loss"] == each["curve"]["4"]
    assert precision["bf16"]["loss_against_first"] == 0
    assert precision["fp8"]["loss"] != precision["bf16"]["loss"]
    assert f"{precision['fp8']['loss_against_first']:+.2%}" in printed

    assert (frechet["features"], frechet["real"], frechet["generated"]) == (8, 5, 48)
    assert all(each["distance"] > 0 for each in frechet["modes"].values())

    assert growth["layers"] == [2, 4]
    assert list(growth["half_curve"]) == ["0", "2"]
    assert list(growth["curve"]) == ["2", "4"], "steps are counted on from those of the half"

    assert list(pruning["choices"]) == ["importance", "last", "random-0"]
    assert len(pruning["importance"]) == 4
    assert pruning["whole_loss"] == precision["bf16"]["loss"]
    kept = pruning["choices"]["importance"]["blocks"]
    assert sum(pruning["importance"][block] for block in kept) == sum(sorted(pruning["importance"])[2:])
    assert pruning["choices"]["last"]["blocks"] == [0, 1]

    assert [best[count]["prompts"] for count in ("1", "4", "16")] == [48, 12, 3]
    shares = [best[count]["judge_accuracy"] for count in ("1", "4", "16")]
    assert shares == sorted(shares), "a yes beats a no, whatever stands beside it"


def test_pictures_are_drawn(done):
    folder, _ = done
    with Image.open(folder / "out" / "curves.png") as curves:
        assert curves.size == (1320, 960)
    with Image.open(folder / "out" / "pictures.png") as sheet:
        rows = 7  # real, two of each mode, best of 4 and of 16
        assert sheet.height == 28 + rows * (64 + 4)


def test_the_same_command_trains_nothing_again(done):
    folder, _ = done
    before = (folder / "out" / "summary.json").read_text()
    printed = compare(folder).stdout
    assert [line for line in printed.splitlines() if ": done before" in line] == [
        f"{name}: done before" for name in PARTS
    ]
    assert (folder / "out" / "summary.json").read_text() == before


def test_other_settings_need_another_folder(done):
    folder, _ = done
    assert "holds an experiment of other settings" in compare(folder, "train.steps=6", code=2).stderr


def test_a_training_that_was_cut_off_goes_on(example, done, tmp_path):
    folder, _ = done
    changes = [*SMALL, f"train.data.path={folder / 'pictures'}", "train.keep_last=2"]
    experiment = example["experiment"].Experiment(settings(example, "tiny.yaml", *changes), tmp_path)
    run = experiment.mode("bf16")
    first, last = checkpoint.complete(run)
    weights = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    shutil.rmtree(last)
    assert experiment.mode("bf16") == run
    assert checkpoint.complete(run) == [first, last]
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == weights


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("growth.first_steps=60", "growth.first_steps: expected less than train.steps=60"),
        ("train.model.sizes.num_layers=3", "expected model.sizes with 4 layers or more"),
        ("train.data.buckets=true", "expected square pictures without an autoencoder"),
        ("train.ema.decay=0", "train.ema.decay: expected above 0"),
    ],
)
def test_settings_that_do_not_go_together(example, tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        example["experiment"].Experiment(settings(example, "tiny.yaml", change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_keys(example):
    with pytest.raises(ValueError, match=r"unknown key 'growth\.first'"):
        settings(example, "tiny.yaml", "growth.first=1")


def test_frechet_distance(example):
    distance, generator = example["classifier"].frechet_distance, torch.Generator().manual_seed(0)
    one, other = (torch.randn(200, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    other = other @ torch.randn(5, 5, generator=generator, dtype=torch.float64)
    moved = torch.arange(5.0, dtype=torch.float64)
    assert distance(one, one) == pytest.approx(0, abs=1e-9)
    assert distance(one, one + moved) == pytest.approx(30)
    c1, c2 = one.T.cov(), other.T.cov()
    shared = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()
    wanted = (one.mean(0) - other.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * shared
    assert distance(one, other) == pytest.approx(wanted.item())
    assert distance(one[:3], other) > 0, "fewer pictures than features"


def test_a_classifier_learns_colours(example, tmp_path):
    module, generator = example["classifier"], torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    pictures = torch.randint(0, 60, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    pictures[torch.arange(60), labels] += 120
    made = [module.train_classifier(pictures, labels, 3, 0, 4, 8, 16, 1e-2) for _ in range(2)]
    probabilities, features = module.look_at(made[0], pictures)
    assert (probabilities.argmax(-1) == labels).double().mean() > 0.9
    assert features.shape == (60, 16)
    module.save_classifier(made[1], tmp_path / "judge.safetensors")
    again = module.load_classifier(tmp_path / "judge.safetensors", 3, 4, "cpu")
    assert torch.equal(module.look_at(again, pictures)[0], probabilities), "the same seed gives the same one"


def test_what_the_parts_rest_on(example):
    module = example["experiment"]
    assert module.reaches({0: 3.0, 10: 2.0, 20: 1.0}, 1.5) == 15
    assert module.reaches({24: 1.0, 30: 0.5}, 1.5) == 24
    assert module.reaches({0: 3.0, 10: 2.0}, 1.5) is None
    assert module.recovered(1.0, 2.0, 1.25) == 0.75
    assert module.recovered(1.0, 0.9, 0.8) is None
    chosen = module.choices([0.4, 0.1, 0.3, 0.2], 2, 2)
    assert (chosen["importance"], chosen["last"]) == ([0, 2], [0, 1])
    assert all(len(set(chosen[name])) == 2 for name in ("random-0", "random-1"))
    # Of class 0: two no of which the second is less sure, a yes that is less sure of class 0 than that, another yes.
    probabilities = torch.tensor([[0.2, 0.8, 0.0], [0.45, 0.55, 0.0], [0.4, 0.3, 0.3], [0.6, 0.4, 0.0]])
    labels = torch.zeros(4, dtype=torch.int64)
    winners = [module.winner_among(range(*places), probabilities, labels) for places in ((0, 2), (0, 3), (0, 4))]
    assert winners == [1, 2, 3]
