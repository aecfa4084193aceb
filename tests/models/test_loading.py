import errno
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from eightfold.models import Decoder, DecoderConfig, load_decoder, loading, save_decoder

TINY = DecoderConfig("llama", 320, 64, 160, 2, 4, 2, 16, bos_token_id=1, eos_token_id=2)


@pytest.fixture
def folder(saved, tmp_path):
    """A writable copy of a saved Llama."""
    return shutil.copytree(saved("llama")[1], tmp_path / "model")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- Hugging Face folders ----


@torch.no_grad()
def test_saved_folder_loads_in_transformers(saved, family, tmp_path):
    reference, source = saved(family)
    model, _ = load_decoder(source, precision="fp32")
    save_decoder(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(reference)
    assert again.dtype == torch.float32
    assert (again.config.bos_token_id, again.generation_config.eos_token_id) == (1, 2)
    assert again.config.tie_word_embeddings == reference.config.tie_word_embeddings
    ids = torch.randint(0, 320, (1, 20))
    torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)
    ours, _ = load_decoder(tmp_path / "out", precision="fp32")
    assert ours.config == model.config
    assert torch.equal(ours(ids), model(ids))


def test_bf16_round_trip_and_dtype_argument(tmp_path):
    model = Decoder(TINY).to(torch.bfloat16)
    save_decoder(model, tmp_path / "m")
    kept, _ = load_decoder(tmp_path / "m")
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in kept.parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True))
    wide, _ = load_decoder(tmp_path / "m", dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


@torch.no_grad()
def test_sharded_folder(saved, tmp_path):
    reference, _ = saved("llama")
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    model, _ = load_decoder(tmp_path, precision="fp32")
    ids = torch.randint(0, 320, (1, 9))
    torch.testing.assert_close(model(ids), reference(ids).logits, rtol=1e-5, atol=1e-5)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shards[1].name}: shard named in model.safetensors.index.json"):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: not a safetensors index"):
        load_decoder(tmp_path)


def test_tied_model_ignores_a_stored_head_and_stays_tied(saved, tmp_path):
    folder = shutil.copytree(saved("qwen2")[1], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(320, 64)}, folder / "model.safetensors")
    model, _ = load_decoder(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.any()


def test_absent_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a folder, a .gguf file or 'smollm2'"):
        load_decoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"x.gguf: no such file"):
        load_decoder(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        load_decoder(tmp_path)


def test_missing_weights_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load_decoder(folder)


def test_config_of_another_model(folder):
    edit_config(folder, model_type="mamba")
    with pytest.raises(ValueError, match=r"config.json: model_type: expected one of .*, dream, got 'mamba'"):
        load_decoder(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_damaged_config(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config.json: "):
        load_decoder(folder)


def test_missing_unexpected_and_misshapen_tensors(folder):
    edit_config(folder, num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"model: missing 18 tensors: model.layers.3.\S+, \S+, \S+ and 15 more"):
        load_decoder(folder)
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"model: unexpected 9 tensors: model.layers.2.\S+"):
        load_decoder(folder)
    edit_config(folder, num_hidden_layers=3, intermediate_size=96)
    with pytest.raises(ValueError, match=r"gate_proj.weight: expected shape \(96, 64\), got \(160, 64\)"):
        load_decoder(folder)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5])
def test_truncated_safetensors(folder, share):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated or not a safetensors file") as caught:
        load_decoder(folder)
    assert "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    old = Decoder(TINY)
    save_decoder(old, tmp_path / "m")

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loading, "save_file", full)
    with pytest.raises(OSError, match=r"m: not saved: \[Errno 28\] No space left on device"):
        save_decoder(Decoder(TINY), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    kept, _ = load_decoder(tmp_path / "m")
    assert torch.equal(kept.lm_head.weight, old.lm_head.weight)


def test_saving_replaces_a_model_and_nothing_else(tmp_path):
    save_decoder(Decoder(TINY), tmp_path / "m")
    new = Decoder(TINY)
    save_decoder(new, tmp_path / "m")
    kept, _ = load_decoder(tmp_path / "m")
    assert torch.equal(kept.lm_head.weight, new.lm_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ValueError, match="photos: expected a new name, an empty folder or a saved model"):
        save_decoder(new, tmp_path / "photos")


# ---- GGUF ----

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path, model, arch=None, skip=(), extra=None, metadata=None):
    """Writes a transformers model as llama.cpp's converter does: Llama's q and k rows in neighbouring pairs."""
    c, arch = model.config, arch or model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "context_length": c.max_position_embeddings,
        "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.key_length": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        **(metadata or {}),
    }
    for key, value in values.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{arch}.{key}", value)
    tensors = dict(extra or {})
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            index, part = stem.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{index}.{GGUF_NAMES[part]}"
        else:
            target = GGUF_NAMES[stem]
        if c.model_type == "llama" and target.endswith(("attn_q", "attn_k")):
            heads = c.num_attention_heads if target.endswith("attn_q") else c.num_key_value_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        tensors[f"{target}.{kind}"] = value.numpy()
    for name, value in tensors.items():
        if name not in skip:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(loading, "load_tokenizer", lambda path: None)


def rope_divisors(config):
    """What llama.cpp's converter stores for llama3 scaling."""
    scaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    return (plain / scaled).numpy().astype(np.float32)


@torch.no_grad()
def test_gguf_equals_transformers(saved, family, tmp_path, no_tokenizer):
    reference, _ = saved(family)
    extra, metadata = {}, {}
    if family == "llama3-head-dim":
        extra["rope_freqs.weight"] = rope_divisors(reference.config)
    if family == "llama-linear-tied":
        metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    file = write_gguf(tmp_path / "m.gguf", reference, extra=extra, metadata=metadata)
    model, _ = load_decoder(file, precision="fp32")
    ids = torch.randint(0, 320, (1, 20))
    torch.testing.assert_close(model(ids), reference(ids).logits, rtol=1e-5, atol=1e-5)
    save_decoder(model, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9999])
def test_gguf_cut_off(saved, tmp_path, share):
    file = write_gguf(tmp_path / "m.gguf", saved("llama")[0])
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"m.gguf: GGUF file is cut off or damaged \(\d+ bytes\)") as caught:
        load_decoder(file)
    assert "\n" not in str(caught.value)


def test_not_a_gguf_file(tmp_path):
    for content in (b"", b"PK\x03\x04 a zip file"):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=r"m.gguf: not a GGUF file: expected it to begin with b'GGUF', got b'"):
            load_decoder(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(64))
    with pytest.raises(ValueError, match=r"m.gguf: GGUF version is not supported: .*version 9"):
        load_decoder(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gemma3"}, "GGUF architecture: expected one of llama, qwen2, qwen3, got 'gemma3'"),
        ({"metadata": {"expert_count": 8}}, "GGUF llama.expert_count: mixtures of experts .* got 8"),
        ({"metadata": {"block_count": None}}, "GGUF metadata: missing llama.block_count"),
        ({"metadata": {"rope.dimension_count": 8}}, "rope.dimension_count: expected the head size 16, got 8"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "rope_type: expected one of default, linear, llama3, got 'yarn'"),
        ({"skip": ["token_embd.weight"]}, "missing token_embd.weight"),
        ({"skip": ["blk.1.ffn_up.weight"]}, "missing 1 tensor: model.layers.1.mlp.up_proj.weight"),
        ({"extra": {"blk.0.ssm_a": np.ones(4, np.float32)}}, "unexpected 1 tensor: blk.0.ssm_a"),
        ({"extra": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "rope_freqs.weight: not the divisors of llama3"),
    ],
)
def test_unsupported_gguf_is_named(saved, tmp_path, options, message):
    file = write_gguf(tmp_path / "m.gguf", saved("llama")[0], **options)
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
        load_decoder(file)
