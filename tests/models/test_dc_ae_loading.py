import json

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from dc_ae_models import CONFIGS, SMALL, random_model, random_peer
from eightfold.models import DCAEConfig, load_dc_ae, save_dc_ae
from eightfold.models.dc_ae_loading import build_dc_ae
from eightfold.models.dc_ae_names import efficientvit_name

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


# ---- Files ----


@torch.no_grad()
def test_diffusers_folder(config, tmp_path):
    peer = random_peer(config)
    peer.save_pretrained(tmp_path / "pipeline" / "vae")
    model = load_dc_ae(tmp_path / "pipeline")
    assert model.config == config
    assert not model.training
    save_dc_ae(model, tmp_path / "out")
    before, after = (load_file(folder / WEIGHTS) for folder in (tmp_path / "pipeline" / "vae", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = diffusers.AutoencoderDC.from_pretrained(tmp_path / "out")
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(images).sample, peer(images).sample)


def test_efficientvit_names(config, tmp_path):
    """Written from diffusers' names they are those that diffusers' own converter takes back; and they load."""
    peer = random_peer(config)
    model = build_dc_ae(config, peer.state_dict())
    save_dc_ae(model, tmp_path / "m", names="efficientvit")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored["encoder.stages.2.op_list.0.context_module.main.proj.conv.weight"].shape[2:] == (1, 1)
    again = load_dc_ae(tmp_path / "m" / "model.safetensors", config=config)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    save_dc_ae(load_dc_ae(tmp_path / "m"), tmp_path / "again", names="efficientvit")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "m" / "model.safetensors"
    ).read_bytes()

    if config is not SMALL:
        return  # the converter knows the released models' switches alone
    converted, theirs = convert_autoencoder_dc_checkpoint_to_diffusers(dict(stored)), peer.state_dict()
    assert converted.keys() == theirs.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in theirs.items())


@torch.no_grad()
def test_shards_and_dtypes(tmp_path):
    peer = random_peer(SMALL)
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_dc_ae(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())
    assert model.encode(torch.randn(0, 3, 8, 16)).shape == (0, 4, 2, 4)
    assert model.decode(torch.randn(0, 4, 2, 4)).shape == (0, 3, 8, 16)
    save_dc_ae(model, tmp_path / "narrow")
    kept = load_dc_ae(tmp_path / "narrow")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True))
    assert load_dc_ae(tmp_path / "narrow", dtype=torch.float32).encoder.conv_out.weight.dtype == torch.float32


def test_variant(tmp_path):
    peer = random_peer(SMALL)
    peer.bfloat16().save_pretrained(tmp_path, variant="bf16")
    model = load_dc_ae(tmp_path, variant="bf16")
    assert torch.equal(model.decoder.conv_in.weight, peer.decoder.conv_in.weight)
    with pytest.raises(FileNotFoundError, match=r"neither diffusion_pytorch_model.fp16.safetensors nor"):
        load_dc_ae(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="variant: expected None for a file, got 'bf16' with"):
        load_dc_ae(tmp_path / "diffusion_pytorch_model.bf16.safetensors", variant="bf16")


def test_float16_is_refused(tmp_path):
    black = r"dtype: expected torch.bfloat16 or torch.float32, got torch.float16: float16 overflows in DC-AE"
    model = random_model(SMALL)
    save_dc_ae(model, tmp_path / "m")
    with pytest.raises(ValueError, match=black):
        load_dc_ae(tmp_path / "m", dtype=torch.float16)
    images = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images: expected torch.bfloat16 or torch.float32, got torch.float16"):
        model.encode(images.half())
    with pytest.raises(ValueError, match=r"parameters: expected torch.bfloat16 or torch.float32, got torch.float16"):
        model.half().encode(images)
    save_dc_ae(model, tmp_path / "half")
    with pytest.raises(ValueError, match=black):
        load_dc_ae(tmp_path / "half")
    assert load_dc_ae(tmp_path / "half", dtype=torch.float32).encoder.conv_out.weight.dtype == torch.float32


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a folder or a .safetensors file"):
        load_dc_ae(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        load_dc_ae(tmp_path)
    folder = save_dc_ae(random_model(SMALL), tmp_path / "m")
    tensors = load_file(folder / WEIGHTS)

    def rewritten(**changes):
        new = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
        save_file(new, folder / WEIGHTS)
        return folder

    third = "encoder.down_blocks.1.0.attn.to_k.weight"
    with pytest.raises(ValueError, match=f"m: missing 1 tensor: {third}$"):
        load_dc_ae(rewritten(**{third: None}))
    with pytest.raises(ValueError, match=r"m: unexpected 1 tensor: quant_conv.weight$"):
        load_dc_ae(rewritten(**{"quant_conv.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=rf"m: {third}: expected shape \(32, 32\), got \(32, 16\)$"):
        load_dc_ae(rewritten(**{third: torch.zeros(32, 16)}))
    with pytest.raises(ValueError, match=r"m: expected one dtype, got torch.bfloat16, torch.float32: give `dtype`"):
        load_dc_ae(rewritten(**{third: tensors[third].bfloat16()}))
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_dc_ae(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"m: neither {WEIGHTS} nor {WEIGHTS}.index.json is there"):
        load_dc_ae(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: "):
        load_dc_ae(folder)

    save_dc_ae(random_model(SMALL), tmp_path / "v", names="efficientvit")
    stored = load_file(tmp_path / "v" / "model.safetensors")
    gone = efficientvit_name("decoder.norm_out.weight", SMALL)
    del stored[gone]
    save_file(stored, tmp_path / "v" / "model.safetensors")
    with pytest.raises(ValueError, match=f"v: missing 1 tensor: {gone}$"):
        load_dc_ae(tmp_path / "v")
    with pytest.raises(ValueError, match="names: expected one of diffusers, efficientvit, got 'torch'"):
        save_dc_ae(random_model(SMALL), tmp_path / "t", names="torch")


# ---- config.json ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 0}, "latent_channels: expected a positive integer, got 0"),
        ({"encoder_block_types": "UNet"}, "encoder_block_types: expected one of ResBlock, .*, got 'UNet'"),
        ({"decoder_block_types": ("ResBlock",)}, "decoder_block_types: expected 3 entries"),
        ({"encoder_layers_per_block": (1, 0, 1)}, "encoder_layers_per_block: expected positive integers"),
        (
            {"decoder_qkv_multiscales": ((), (4,), ())},
            r"decoder_qkv_multiscales: expected lists of odd sizes, got \(4,",
        ),
        ({"decoder_block_out_channels": (16, 32)}, "decoder_block_types: expected 2 entries"),
        ({"encoder_block_out_channels": (24, 32, 32)}, "encoder_block_out_channels: .* got 24, 32"),
        (
            {"decoder_block_out_channels": (16, 16, 4)},
            "decoder_block_out_channels: expected at least attention_head_dim",
        ),
        ({"latent_channels": 5}, "encoder_out_shortcut: expected a last stage of a multiple of 5 channels"),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types: expected one of rms_norm, batch_norm"),
        ({"decoder_act_fns": ("silu", None, "silu")}, "decoder_act_fns: expected one of .*, got None"),
        ({"decoder_conv_act_fn": "tanh"}, "decoder_conv_act_fn: expected one of .*, got 'tanh'"),
        ({"downsample_block_type": "pool"}, "downsample_block_type: expected one of conv, pixel_unshuffle"),
        ({"upsample_block_type": "bicubic"}, "upsample_block_type: expected one of interpolate, pixel_shuffle"),
        ({"scaling_factor": 0}, "scaling_factor: expected a positive number, got 0"),
        ({"mid_block": 3}, "mid_block: not a field of AutoencoderDC, got 3"),
        ({"_class_name": "AutoencoderKL"}, "_class_name: expected 'AutoencoderDC', got 'AutoencoderKL'"),
    ],
)
def test_wrong_config(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        DCAEConfig.from_diffusers({**SMALL.to_diffusers(), **changes})
    assert "\n" not in str(caught.value)


def test_config_round_trip(config):
    stored = json.loads(json.dumps(config.to_diffusers()))
    assert DCAEConfig.from_diffusers({**stored, "_diffusers_version": "0.42.1", "_name_or_path": "x"}) == config
