"""Reading GGUF files of Llama, Qwen2 and Qwen3 models: metadata to DecoderConfig, tensors dequantised to fp32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eightfold.models.config import AUTOREGRESSIVE_TYPES, DecoderConfig
from eightfold.models.rotary import inverse_frequencies

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def read_gguf(path: Path) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """Configuration and fp32 tensors under Hugging Face names. Raises ValueError with one line that names the file."""
    try:
        reader = _open(path)
        config = _config(reader)
        return config, _tensors(reader, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _open(path: Path):
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"not a GGUF file: expected it to begin with b'GGUF', got {magic!r}")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        if "appears to be version" in str(error):
            raise ValueError(f"GGUF version is not supported: {error}") from None
        raise ValueError(f"GGUF file is cut off or damaged ({path.stat().st_size} bytes): {error}") from None


def _config(reader) -> DecoderConfig:
    def get(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    arch = get("general.architecture")
    if arch not in AUTOREGRESSIVE_TYPES:
        raise ValueError(f"GGUF architecture: expected one of {', '.join(AUTOREGRESSIVE_TYPES)}, got {arch!r}")

    def need(key: str) -> Any:
        value = get(f"{arch}.{key}")
        if value is None:
            raise ValueError(f"GGUF metadata: missing {arch}.{key}")
        return value

    if get(f"{arch}.expert_count", 0):
        raise ValueError(f"GGUF {arch}.expert_count: mixtures of experts are not supported, got {need('expert_count')}")
    shapes = {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError("missing token_embd.weight")
    heads, hidden = need("attention.head_count"), need("embedding_length")
    head_dim = get(f"{arch}.attention.key_length") or hidden // heads
    rotated = get(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(f"GGUF {arch}.rope.dimension_count: expected the head size {head_dim}, got {rotated}")
    config = {
        "model_type": arch,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get(f"{arch}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": arch != "qwen2" and "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
    }
    scaling = get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": get(f"{arch}.rope.scaling.factor")}
    if _ROPE_FACTORS in shapes:
        factors = next(t.data for t in reader.tensors if t.name == _ROPE_FACTORS)
        config["rope_scaling"] = _llama3_scaling(config, np.asarray(factors, dtype=np.float32))
    return DecoderConfig.from_hf(config)


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama3_scaling(config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """GGUF stores llama3 scaling as one divisor per frequency; finds the parameters that give these divisors."""
    rope = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = inverse_frequencies(DecoderConfig.from_hf({**config, "rope_scaling": None}))
    for context in (8192, 4096, 16384, 32768):
        rope["original_max_position_embeddings"] = context
        scaled = inverse_frequencies(DecoderConfig.from_hf({**config, "rope_scaling": rope}))
        if factors.shape == tuple(plain.shape) and np.allclose((plain / scaled).numpy(), factors, rtol=1e-4):
            return rope
    raise ValueError(f"GGUF {_ROPE_FACTORS}: not the divisors of llama3 scaling (largest {factors.max():g})")


def _tensors(reader, config: DecoderConfig) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        try:
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            raise ValueError(f"{tensor.name}: cannot dequantise type {tensor.tensor_type.name}") from None
        name, value = _hf_name(tensor.name), torch.from_numpy(values)
        if config.model_type == "llama" and ".attn_q." in tensor.name:
            value = _pair_halves(value, config.num_attention_heads)
        if config.model_type == "llama" and ".attn_k." in tensor.name:
            value = _pair_halves(value, config.num_key_value_heads)
        tensors[name] = value
    return tensors


def _hf_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor; a name that is not known stays, to be reported as unexpected."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        part = _BLOCK.get(match[2])
        return name if part is None else f"model.layers.{match[1]}.{part}.{kind}"
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else name


def _pair_halves(value: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF's llama rows rotate neighbours (0, 1), (2, 3), ...; ours rotate element i with i + head_dim / 2."""
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(value.shape).contiguous()
