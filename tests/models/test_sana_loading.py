"""SANA checkpoints: diffusers folders and NVlabs files, both ways to the byte, and what is wrong with bad ones."""

import dataclasses
import errno
import json
import pickle

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from eightfold.models import files
from eightfold.models.sana import Sana, SanaConfig
from eightfold.models.sana_keys import config_of_nvlabs
from eightfold.models.sana_loading import build_sana, load_sana, sana_tensors, save_nvlabs, save_sana
from plain_sana import TINY

FULL = dataclasses.replace(TINY, qk_norm=True, guidance_embeds=True)
SINGLE = "diffusion_pytorch_model.safetensors"
# The names in NVlabs' files, of a model with all options and of one of its blocks.
NVLABS_MODEL = """
x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias t_embedder.mlp.2.weight
t_embedder.mlp.2.bias cfg_embedder.mlp.0.weight cfg_embedder.mlp.0.bias cfg_embedder.mlp.2.weight
cfg_embedder.mlp.2.bias t_block.1.weight t_block.1.bias y_embedder.y_proj.fc1.weight y_embedder.y_proj.fc1.bias
y_embedder.y_proj.fc2.weight y_embedder.y_proj.fc2.bias attention_y_norm.weight final_layer.scale_shift_table
final_layer.linear.weight final_layer.linear.bias"""
NVLABS_BLOCK = """
scale_shift_table attn.qkv.weight attn.q_norm.weight attn.k_norm.weight attn.proj.weight attn.proj.bias
cross_attn.q_linear.weight cross_attn.q_linear.bias cross_attn.kv_linear.weight cross_attn.kv_linear.bias
cross_attn.q_norm.weight cross_attn.k_norm.weight cross_attn.proj.weight cross_attn.proj.bias
mlp.inverted_conv.conv.weight mlp.inverted_conv.conv.bias mlp.depth_conv.conv.weight mlp.depth_conv.conv.bias
mlp.point_conv.conv.weight"""


def random_peer(config, **options):
    peer = SanaTransformer2DModel.from_config(config.to_diffusers(), **options)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_()
    return peer


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


@pytest.fixture
def folder(tmp_path):
    """A folder that diffusers wrote."""
    random_peer(TINY).save_pretrained(tmp_path / "peer")
    return tmp_path / "peer"


def edit(folder, drop=(), **tensors):
    content = {name: x for name, x in load_file(folder / SINGLE).items() if name not in drop}
    save_file({**content, **tensors}, folder / SINGLE)


# ---- diffusers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        FULL,
        dataclasses.replace(TINY, patch_size=2, interpolation_scale=2.0, out_channels=3, timestep_scale=0.5),
    ],
    ids=["plain", "full", "patches"],
)
@pytest.mark.parametrize("shard", [None, 20_000], ids=["one", "sharded"])
def test_diffusers_folder_round_trip(config, dtype, shard, tmp_path):
    peer = random_peer(config).to(dtype)
    peer.save_pretrained(tmp_path / "theirs", **({} if shard is None else {"max_shard_size": shard}))
    model = load_sana(tmp_path / "theirs")
    assert model.config == config
    assert all(p.requires_grad and p.data_ptr() % 16 == 0 for p in model.parameters())
    save_sana(model, tmp_path / "ours", **({} if shard is None else {"shard_bytes": shard}))
    for folder in ("theirs", "ours"):
        assert (len(list((tmp_path / folder).glob("*.safetensors"))) > 1) == (shard is not None)
    again = SanaTransformer2DModel.from_pretrained(tmp_path / "ours", torch_dtype=dtype)
    assert public(again.config) == public(peer.config)
    assert_same(dict(again.state_dict()), dict(peer.state_dict()))
    assert_same(dict(load_sana(tmp_path / "ours").state_dict()), dict(model.state_dict()))


def test_pipeline_folder_variant_and_dtype(tmp_path):
    peer = random_peer(TINY).to(torch.float16)
    peer.save_pretrained(tmp_path / "transformer", variant="fp16")
    model = load_sana(tmp_path, variant="fp16", dtype=torch.float32)
    assert_same(sana_tensors(model), {name: x.float() for name, x in peer.state_dict().items()})
    with pytest.raises(FileNotFoundError, match=f"transformer: neither {SINGLE} nor {SINGLE}.index.json is there"):
        load_sana(tmp_path)


def test_other_epsilons_are_kept(tmp_path):
    config = dataclasses.replace(TINY, attention_eps=1e-8, cross_norm_eps=1e-6)
    assert load_sana(save_sana(Sana(config), tmp_path / "m")).config == config
    SanaTransformer2DModel.from_pretrained(tmp_path / "m")


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    old = Sana(TINY)
    save_sana(old, tmp_path / "m")
    save_nvlabs(old, tmp_path / "m.safetensors")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    for save, name in ((save_sana, "m"), (save_nvlabs, "m.safetensors")):
        with pytest.raises(OSError, match=rf"{name}: not saved: .*No space left on device"):
            save(Sana(TINY), tmp_path / name)
    assert_same(dict(load_sana(tmp_path / "m").state_dict()), dict(old.state_dict()))
    assert_same(dict(load_sana(tmp_path / "m.safetensors", config=TINY).state_dict()), dict(old.state_dict()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.safetensors"]


# ---- NVlabs ----


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_nvlabs_round_trip(suffix, tmp_path):
    model = build_sana(FULL, dict(random_peer(FULL).state_dict()))
    file = save_nvlabs(model, tmp_path / f"model{suffix}")
    stored = load_file(file) if suffix == ".safetensors" else torch.load(file)["state_dict"]
    blocks = [f"blocks.{i}.{name}" for i in range(2) for name in NVLABS_BLOCK.split()]
    assert sorted(stored) == sorted([*NVLABS_MODEL.split(), *blocks])
    again = load_sana(file, config=FULL)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_nvlabs_tensors_are_those_of_diffusers(tmp_path):
    peer = random_peer(FULL).state_dict()
    stored = sana_tensors(build_sana(FULL, dict(peer)), "nvlabs")
    for ours, names in {
        "blocks.1.attn.qkv.weight": [f"transformer_blocks.1.attn1.to_{x}.weight" for x in "qkv"],
        "blocks.1.cross_attn.kv_linear.bias": [f"transformer_blocks.1.attn2.to_{x}.bias" for x in "kv"],
        "blocks.0.mlp.point_conv.conv.weight": ["transformer_blocks.0.ff.conv_point.weight"],
        "cfg_embedder.mlp.2.weight": ["time_embed.guidance_embedder.linear_2.weight"],
        "t_embedder.mlp.0.weight": ["time_embed.timestep_embedder.linear_1.weight"],
        "final_layer.scale_shift_table": ["scale_shift_table"],
    }.items():
        assert torch.equal(stored[ours], torch.cat([peer[name] for name in names])), ours


def test_nvlabs_extras_are_left_out(tmp_path):
    model = Sana(TINY)
    extras = {name: torch.zeros(3) for name in ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight")}
    torch.save({**sana_tensors(model, "nvlabs"), **extras}, tmp_path / "bare.pth")
    assert_same(dict(load_sana(tmp_path / "bare.pth", config=TINY).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["0.6B", "1.6B", "1.6B-1.5", "4.8B"])
@pytest.mark.parametrize("guidance", [False, True])
def test_nvlabs_configuration_by_shapes(name, guidance):
    config = SanaConfig.named(name, guidance_embeds=guidance, attention_eps=1e-8, cross_norm_eps=1e-6)
    with torch.device("meta"):
        tensors = sana_tensors(Sana(config), "nvlabs")
    assert config_of_nvlabs(tensors, "file") == config


# ---- errors ----


def test_absent_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a folder, a .pth or a .safetensors file"):
        load_sana(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        load_sana(tmp_path)


def test_config_and_variant_where_they_have_no_place(folder, tmp_path):
    with pytest.raises(ValueError, match="config: expected None for a folder"):
        load_sana(folder, config=TINY)
    with pytest.raises(ValueError, match="variant: expected None for a file, got 'fp16'"):
        load_sana(save_nvlabs(Sana(TINY), tmp_path / "m.pth"), variant="fp16")


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "FluxTransformer2DModel"}', '{"in_channels": 0}'])
def test_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"peer/config.json: "):
        load_sana(folder)


def test_missing_and_unknown_tensors(folder):
    edit(folder, drop=["caption_norm.weight", "transformer_blocks.1.attn1.to_k.weight"])
    message = r"peer: missing 2 tensors: (transformer_blocks.1.attn1.to_k.weight|caption_norm.weight), "
    with pytest.raises(ValueError, match=message):
        load_sana(folder)
    edit(folder, **random_peer(TINY).state_dict(), **{"transformer_blocks.0.attn1.norm_q.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"peer: unexpected 1 tensor: transformer_blocks.0.attn1.norm_q.weight$"):
        load_sana(folder)


def test_wrong_latent_channels(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 32, "out_channels": 4}))
    message = r"peer: patch_embed.proj.weight: expected shape \(32, 32, 1, 1\), got \(32, 4, 1, 1\)"
    with pytest.raises(ValueError, match=message):
        load_sana(folder)


def test_truncated_weights(folder):
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{SINGLE}: truncated or not a safetensors file"):
        load_sana(folder)


def test_a_shard_that_is_missing(tmp_path):
    save_sana(Sana(TINY), tmp_path, shard_bytes=20_000)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"{first.name}: shard named in {SINGLE}.index.json is missing"):
        load_sana(tmp_path)


def test_damaged_nvlabs_files(tmp_path):
    file = save_nvlabs(Sana(TINY), tmp_path / "m.pth")
    content = file.read_bytes()
    junk = {"cut": content[: len(content) // 2], "empty": b"", "text": b"hello", "code": pickle.dumps(print)}
    for name, wrong in junk.items():
        (tmp_path / f"{name}.pth").write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"{name}.pth: truncated or not a file of tensors: [^\n]+$"):
            load_sana(tmp_path / f"{name}.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: expected a state dict, or one under 'state_dict'"):
        load_sana(tmp_path / "other.pth")


def test_nvlabs_suffix(tmp_path):
    for act in (lambda file: save_nvlabs(Sana(TINY), file), lambda file: file.touch() or load_sana(file)):
        with pytest.raises(ValueError, match=r"m.ckpt: expected a name that ends with .safetensors or .pth, .pt, .bin"):
            act(tmp_path / "m.ckpt")


def test_nvlabs_files_without_a_known_width(tmp_path):
    file = save_nvlabs(Sana(TINY), tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m.pth: width: expected 1152 or 2240, or a config .*, got 32"):
        load_sana(file)
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight: expected 4 dimensions, got no such tensor"):
        load_sana(tmp_path / "m.safetensors")


def test_missing_nvlabs_tensors_have_nvlabs_names(tmp_path):
    tensors = sana_tensors(Sana(TINY), "nvlabs")
    del tensors["blocks.1.attn.qkv.weight"]
    torch.save(tensors, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m.pth: missing 1 tensor: blocks.1.attn.qkv.weight$"):
        load_sana(tmp_path / "m.pth", config=TINY)
