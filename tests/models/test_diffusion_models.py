"""LLaDA and Dream folders, written here as their own code lays them out, and attention that is not causal."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from eightfold.models import Decoder, DecoderConfig, load_decoder, save_decoder

LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 96,
    "vocab_size": 120,
    "embedding_size": 128,
    "max_sequence_length": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "mask_token_id": 110,
    "eos_token_id": 111,
    "pad_token_id": 111,
    "weight_tying": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "mlp_ratio": 4,
}
DREAM = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "max_position_embeddings": 64,
    "mask_token_id": 120,
    "eos_token_id": 121,
    "pad_token_id": 121,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


def llada_tensors():
    """Random weights under LLaDA's names."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 0.3) + (len(shape) == 1)

    top = {"wte": random(128, 64), "ln_f": random(64), "ff_out": random(128, 64)}
    tensors = {f"model.transformer.{name}.weight": tensor for name, tensor in top.items()}
    for layer in range(2):
        part = {"attn_norm": random(64), "ff_norm": random(64), "attn_out": random(64, 64), "q_proj": random(64, 64)}
        part |= {"k_proj": random(32, 64), "v_proj": random(32, 64), "ff_proj": random(96, 64)}
        part |= {"up_proj": random(96, 64), "ff_out": random(64, 96)}
        tensors |= {f"model.transformer.blocks.{layer}.{name}.weight": tensor for name, tensor in part.items()}
    return tensors


def llada_logits(tensors, ids):
    """LLaDA's forward pass, in plain torch: every token sees every other."""

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * tensors[name]

    def rotate(x):
        angle = torch.arange(x.shape[-2])[:, None] / 500000.0 ** (torch.arange(0, 16, 2) / 16)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin

    x = tensors["model.transformer.wte.weight"][ids]
    for layer in range(2):
        at = f"model.transformer.blocks.{layer}."
        weight = {name: tensors[f"{at}{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_out")}
        y = norm(x, f"{at}attn_norm.weight")
        q, k, v = (
            (y @ weight[name].T).unflatten(-1, (-1, 16)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        mixed = (rotate(q) @ rotate(k).transpose(-1, -2) / 4).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).flatten(2) @ weight["attn_out"].T
        y = norm(x, f"{at}ff_norm.weight")
        hidden = F.silu(y @ tensors[f"{at}ff_proj.weight"].T) * (y @ tensors[f"{at}up_proj.weight"].T)
        x = x + hidden @ weight["ff_out"].T
    return norm(x, "model.transformer.ln_f.weight") @ tensors["model.transformer.ff_out.weight"].T


def write_folder(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def llada(tmp_path):
    return write_folder(tmp_path / "llada", LLADA, llada_tensors())


@pytest.fixture
def dream(tmp_path):
    """A Dream folder and transformers' Qwen2 of the same weights."""
    torch.manual_seed(5)
    sizes = {key: value for key, value in DREAM.items() if key not in ("model_type", "architectures", "mask_token_id")}
    model = transformers.Qwen2ForCausalLM._from_config(transformers.Qwen2Config(**sizes), attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return write_folder(tmp_path / "dream", DREAM, dict(model.state_dict())), model.eval()


IDS = torch.randint(0, 128, (2, 13), generator=torch.Generator().manual_seed(1))


def same_tensors(one, two):
    one, two = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def test_llada(llada, tmp_path):
    model, _ = load_decoder(llada, "fp32")
    config = model.config
    assert (config.vocab_size, config.head_dim, config.rope_theta) == (128, 16, 500000.0)
    assert (config.mask_token_id, config.attention_block, config.shifted_logits) == (110, 0, False)
    torch.testing.assert_close(model(IDS), llada_logits(llada_tensors(), IDS), rtol=1e-4, atol=1e-4)

    saved = save_decoder(model, tmp_path / "saved")
    same_tensors(llada, saved)
    written = json.loads((saved / "config.json").read_text())
    assert {key: written[key] for key in LLADA if key not in ("vocab_size", "mlp_ratio")} == {
        key: value for key, value in LLADA.items() if key not in ("vocab_size", "mlp_ratio")
    }
    assert load_decoder(saved, "fp32")[0].config == config
    assert (saved / "model.safetensors").read_bytes() == (llada / "model.safetensors").read_bytes()


@torch.no_grad()
def test_dream(dream, tmp_path):
    folder, reference = dream
    model, _ = load_decoder(folder, "fp32")
    config = model.config
    assert (config.model_type, config.mask_token_id) == ("dream", 120)
    assert (config.attention_block, config.shifted_logits) == (0, True)
    expected = reference(IDS, attention_mask=torch.zeros(2, 1, 13, 13)).logits
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)

    saved = save_decoder(model, tmp_path / "saved")
    same_tensors(folder, saved)
    written = json.loads((saved / "config.json").read_text())
    assert {key: written[key] for key in DREAM} == DREAM
    assert load_decoder(saved, "fp32")[0].config == config


def test_an_own_diffusion_model_keeps_its_switches(tmp_path):
    plain = DecoderConfig("llama", 128, 64, 96, 1, 4, 2, 16)
    assert (plain.attention_block, plain.shifted_logits, plain.mask_token_id) == (1, False, None)
    assert not {"attention_block", "shifted_logits", "mask_token_id"} & plain.to_hf().keys()
    config = dataclasses.replace(plain, attention_block=0, shifted_logits=True, mask_token_id=7)
    saved = save_decoder(Decoder(config, "fp32"), tmp_path / "m")
    assert load_decoder(saved)[0].config == config


def test_fp8_folder_of_llada(tmp_path):
    """Codes and scales stand under LLaDA's names, and are read again."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig("llada", 128, 128, 256, 1, 1, 1, 128, mask_token_id=3), "fp32")
    saved = save_decoder(model, tmp_path / "m", format="fp8")
    names = load_file(saved / "model.safetensors").keys()
    assert "model.transformer.blocks.0.ff_out.weight_scale_inv" in names
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["model.transformer.ff_out"]
    again, _ = load_decoder(saved, "fp32")
    assert (again.config, again.lm_head.weight.dtype) == (model.config, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llada_moe"}, "model_type: expected one of llama, qwen2, qwen3, llada, dream, got 'llada_moe'"),
        ({"d_model": None}, "config: missing d_model"),
        ({"block_type": "sequential"}, "block_type: expected 'llama' of a llada model, got 'sequential'"),
        ({"layer_norm_type": None}, "layer_norm_type: expected 'rms' of a llada model, got None"),
        ({"include_qkv_bias": True}, "include_qkv_bias: expected False of a llada model, got True"),
        ({"mask_token_id": 128}, "mask_token_id: expected 0 to 127, got 128"),
        ({"n_heads": 5}, "head_dim: expected 64 / 5 of a llada model, got 12"),
        ({"attention_block": -1}, "attention_block: expected 0 or a positive integer, got -1"),
    ],
)
def test_configurations_that_are_refused(llada, changes, message):
    (llada / "config.json").write_text(json.dumps({**LLADA, "n_kv_heads": None, **changes}))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        load_decoder(llada)


def test_weights_of_another_architecture(llada, dream):
    folder, _ = dream
    (folder / "config.json").write_text(json.dumps(LLADA))
    with pytest.raises(ValueError, match=r"dream: unexpected 27 tensors: .* and 24 more, of a llada model") as error:
        load_decoder(folder)
    assert "\n" not in str(error.value)
    (llada / "config.json").write_text(json.dumps({**LLADA, "n_layers": 3}))
    with pytest.raises(ValueError, match=r"llada: missing 9 tensors: model.transformer.blocks.2.attn_norm.weight"):
        load_decoder(llada)
    (llada / "config.json").write_text(json.dumps({**LLADA, "mlp_hidden_size": 32}))
    with pytest.raises(ValueError, match=r"blocks.0.ff_proj.weight: expected shape \(32, 64\), got \(96, 64\)"):
        load_decoder(llada)


# ---- attention ----

TINY = DecoderConfig("llama", 64, 32, 64, 2, 4, 2, 16)


def decoder(block):
    torch.manual_seed(2)
    model = Decoder(dataclasses.replace(TINY, attention_block=block), "fp32")
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def seen(model, ids, **options):
    """bool [T, T]: whether the hidden state of row i depends on token j."""
    before = model.hidden(ids, **options)[0]
    changed = []
    for j in range(ids.shape[1]):
        other = ids.clone()
        other[0, j] = (other[0, j] + 1) % 64
        changed.append((model.hidden(other, **options)[0] - before).abs().amax(dim=1) > 1e-7)
    return torch.stack(changed, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1, 3, 4])
def test_what_a_token_sees(block):
    ids = torch.randint(0, 64, (1, 10), generator=torch.Generator().manual_seed(4))
    documents = torch.tensor([[5, 5, 5, 5, 2, 2, 2, 2, 2, 2]])
    index = torch.arange(10)

    def visible(index, together):
        return together & (torch.ones_like(together) if block == 0 else index // block <= index[:, None] // block)

    model = decoder(block)
    assert torch.equal(seen(model, ids), visible(index, torch.ones(10, 10, dtype=torch.bool)))
    restarted, together = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5]), documents == documents.T
    assert torch.equal(seen(model, ids, document_ids=documents), visible(restarted, together))


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1, 3])
def test_packed_sequences_equal_documents(block):
    ids = torch.randint(0, 64, (1, 10), generator=torch.Generator().manual_seed(4))
    model = decoder(block)
    packed = model.packed_hidden(ids[0], torch.tensor([0, 4, 10], dtype=torch.int32), 6)
    documents = torch.tensor([[0] * 4 + [1] * 6])
    torch.testing.assert_close(packed, model.hidden(ids, document_ids=documents)[0], rtol=1e-5, atol=1e-5)
    alone = torch.cat([model.hidden(ids[:, :4])[0], model.hidden(ids[:, 4:])[0]])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_block_causal_over_a_cache():
    """Whole blocks after what is cached: the same as all at once."""
    ids = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(4))
    model = decoder(4)
    cache = model.new_cache(1, 12)
    parts = [model.hidden(part, cache=cache) for part in ids.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(ids), rtol=1e-5, atol=1e-5)


def test_gradients_of_bidirectional_attention():
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(4))
    model = decoder(0)
    documents = torch.tensor([[0] * 7, [0] * 3 + [1] * 4])
    model.loss(ids, ids, document_ids=documents).backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = [model.loss(part, part, reduction="sum") for part in (ids[:1], ids[1:, :3], ids[1:, 3:])]
    (sum(alone) / 14).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=2e-5, msg=name)
