"""Growth keeps the output of the kept blocks exactly; pruning finds the blocks that do nothing."""

import dataclasses
import json

import pytest
import torch

from eightfold import cli
from eightfold.models.sana_loading import load_sana, save_sana
from eightfold.train.image.growth import grow, with_blocks
from eightfold.train.image.loop import model_folder
from eightfold.train.image.model import load_image_model, save_image_model
from eightfold.train.image.prune import most_important, prune, watch_blocks
from eightfold.train.report import read_log
from small_image_model import image_model, inputs


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_grown_model_computes_what_its_kept_blocks_do(precision, qk_norm):
    sana = image_model(precision, num_layers=4, qk_norm=qk_norm).sana
    grown = grow(sana, 7)
    assert grown.config == dataclasses.replace(sana.config, num_layers=7)
    kept = with_blocks(sana, [0, 1])
    with torch.no_grad():
        assert torch.equal(grown(**inputs(sana)), kept(**inputs(sana)))
        assert not torch.equal(grown(**inputs(sana)), sana(**inputs(sana)))
        assert torch.equal(grow(sana, 6, keep=4)(**inputs(sana)), sana(**inputs(sana)))


def test_new_blocks_can_learn():
    sana = image_model("fp32").sana
    grown = grow(sana, 5, keep=3, seed=1)
    grown(**inputs(sana)).square().mean().backward()
    for block in grown.transformer_blocks[3:]:
        for last in (block.attn1.to_out, block.attn2.to_out, block.ff.conv_point):
            assert last.weight.grad.abs().max() > 0
        assert block.ff.conv_depth.weight.std().item() == pytest.approx(0.2, rel=0.1)
        assert block.attn1.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(p.requires_grad and p.is_leaf for p in grown.parameters())
    one, other = (grow(sana, 5, keep=3, seed=seed).transformer_blocks[4].attn1.qkv.weight for seed in (1, 2))
    assert torch.equal(one, grown.transformer_blocks[4].attn1.qkv.weight)
    assert not torch.equal(one, other)
    with torch.no_grad():
        grown.patch_embed.weight.zero_()
    assert sana.patch_embed.weight.any()  # a copy


def test_growth_and_pruning_refuse_depths():
    sana = image_model("fp32").sana
    for layers, keep, message in ((3, 3, "layers: expected more than the 3 blocks"), (9, 4, "keep: expected 1 to")):
        with pytest.raises(ValueError, match=message):
            grow(sana, layers, keep)
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"layers: expected 1 to 2, as the model has 3, got {layers}"):
            prune(sana, [1.0, 2.0, 3.0], layers)
    with pytest.raises(ValueError, match="importance: expected one number for each of 3 blocks, got 1"):
        prune(sana, [1.0], 1)


def plant_identities(sana, blocks):
    with torch.no_grad():
        for number in blocks:
            block = sana.transformer_blocks[number]
            for last in (block.attn1.to_out, block.attn2.to_out, block.ff.conv_point):
                for parameter in last.parameters():
                    parameter.zero_()


@torch.no_grad()
def test_pruning_finds_planted_identities():
    sana = image_model("fp32", num_layers=6).sana
    plant_identities(sana, (1, 4))
    want = sana(**inputs(sana))
    with watch_blocks(sana) as seen, pytest.raises(ValueError, match="expected the model to compute something"):
        seen.values()
    with watch_blocks(sana) as seen:
        sana(**inputs(sana))
        sana(**inputs(sana, seed=1))
    importance = seen.values()
    assert max(importance[1], importance[4]) < 1e-6
    assert min(importance[0], importance[2], importance[3], importance[5]) > 1e-4
    pruned = prune(sana, importance, 4)
    assert torch.equal(pruned(**inputs(sana)), want)
    sana(**inputs(sana))
    assert seen.values() == importance  # nothing is watched any more


@torch.no_grad()
def test_importance_is_one_minus_the_mean_cosine():
    sana = image_model("fp32", num_layers=2).sana
    streams = []
    for block in sana.transformer_blocks:
        block.register_forward_hook(
            lambda _, given, out: streams.append([sana.compute.add(*given[:2]), sana.compute.add(*out)])
        )
    with watch_blocks(sana) as seen:
        sana(**inputs(sana))
    for (before, after), got in zip(streams, seen.values(), strict=True):
        dots = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert got == pytest.approx(1 - dots.mean().item(), abs=1e-6)


def test_most_important():
    assert most_important([0.3, 0.1, 0.5, 0.1], 2) == [0, 2]
    assert most_important([0.3, 0.1, 0.5, 0.1], 3) == [0, 1, 2]  # of equals the first


# ---- commands ----


def test_grow_and_prune_on_folders(tmp_path, capsys):
    model = image_model("fp32", num_layers=3)
    save_image_model(model, tmp_path / "model")
    assert (
        cli.main(["sana", "grow", str(tmp_path / "model"), str(tmp_path / "grown"), "--layers", "5", "--keep", "3"])
        == 0
    )
    assert "the first 3 of 3 blocks and 2 new ones" in capsys.readouterr().out
    grown = load_image_model(tmp_path / "grown", "fp32")
    with torch.no_grad():
        assert torch.equal(grown.sana(**inputs(model.sana)), model.sana(**inputs(model.sana)))
    assert torch.equal(grown.captions.classes, model.captions.classes)
    options = ["--layers", "3", "--samples", "4", "--batch", "3", "--steps", "3", "--precision", "fp32"]
    assert cli.main(["sana", "prune", str(tmp_path / "grown"), str(tmp_path / "pruned"), *options]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.endswith("removed")] == ["3", "4"]
    pruned = load_image_model(tmp_path / "pruned", "fp32")
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_grown_model_is_trained_by_the_file_that_trained_the_first(tmp_path, capsys, settings):
    (tmp_path / "config.yaml").write_text(json.dumps({**settings, "steps": 1}))  # JSON is YAML
    train = ["sana", "train", str(tmp_path / "config.yaml")]
    assert cli.main(train) == 0
    folders = [str(tmp_path / "run"), str(tmp_path / "grown")]
    assert cli.main(["sana", "grow", *folders, "--layers", "3", "--keep", "2"]) == 0
    assert cli.main([*train, "--model", folders[1], "--output", str(tmp_path / "second")]) == 0
    assert load_image_model(model_folder(tmp_path / "second")).config.num_layers == 3
    records = [read_log(tmp_path / run / "log.jsonl") for run in ("run", "second")]
    mean = [record["mean_held_out_loss"] for record in records[0] if "mean_held_out_loss" in record]
    assert records[1][0]["held_out_loss"] == pytest.approx(mean[-1], rel=1e-6)


def test_a_model_without_captions_grows_too(tmp_path, capsys):
    sana = image_model("fp32").sana
    save_sana(sana, tmp_path / "model")
    assert cli.main(["sana", "grow", str(tmp_path / "model"), str(tmp_path / "grown"), "--layers", "4"]) == 0
    assert load_sana(tmp_path / "grown", "fp32").config.num_layers == 4
    assert cli.main(["sana", "prune", str(tmp_path / "model"), str(tmp_path / "p"), "--layers", "1"]) == cli.USER_ERROR
    assert "embeddings.safetensors: no such file" in capsys.readouterr().err
    assert cli.main(["sana", "grow", str(tmp_path / "absent"), str(tmp_path / "g"), "--layers", "4"]) == cli.USER_ERROR
