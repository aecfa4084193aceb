"""LLaDA's own layout of a folder (ML-GSAI/LLaDA; arXiv 2502.09992): its names in config.json and of the weights, to and
from those of the decoder. Dream's folders need no such maps: they have Qwen2's names.
"""

from __future__ import annotations

import re
from typing import Any

_NAMES = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
    "initializer_range": "init_std",
}
# What LLaDA's model is among those that its configuration can describe: the value written, and the values read (None:
# the key is absent or null, and the default of LLaDA's code for it is the value written).
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "block_type": ("llama", ("llama",)),
    "activation_type": ("silu", ("silu",)),
    "layer_norm_type": ("rms", ("rms",)),
    "rope": (True, (True,)),
    "rope_full_precision": (True, (True, None)),
    "layer_norm_with_affine": (True, (True, None)),
    "bias_for_layer_norm": (False, (False, None)),
    "include_bias": (False, (False,)),
    "include_qkv_bias": (False, (False, None)),
    "attention_layer_norm": (False, (False, None)),
    "input_emb_norm": (False, (False, None)),
    "scale_logits": (False, (False, None)),
    "alibi": (False, (False, None)),
    "block_group_size": (1, (1, None)),
}
_TOP = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_TOP_OF, _LAYER_OF = ({theirs: ours for ours, theirs in names.items()} for names in (_TOP, _LAYER))


def config_from_llada(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the decoder's names for sizes. ValueError, naming key and value, for what LLaDA's model is not."""
    for key, (_, allowed) in _FIXED.items():
        if config.get(key) not in allowed:
            raise ValueError(f"{key}: expected {allowed[0]!r} of a llada model, got {config.get(key)!r}")
    missing = [name for name in ("d_model", "n_layers", "n_heads", "mlp_hidden_size") if config.get(name) is None]
    if missing:
        raise ValueError(f"config: missing {', '.join(missing)}")
    values = {key: value for key, value in config.items() if key not in _NAMES and key not in _NAMES.values()}
    values |= {ours: config[theirs] for ours, theirs in _NAMES.items() if config.get(theirs) is not None}
    values.setdefault("rms_norm_eps", 1e-5)
    if config.get("multi_query_attention"):
        values.setdefault("num_key_value_heads", 1)
    if config.get("embedding_size"):  # rows of the embedding, where they are more than the tokens
        values["vocab_size"] = config["embedding_size"]
    return values


def config_to_llada(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's config.json `config` in LLaDA's names."""
    dropped = ("head_dim", "attention_bias", "mlp_bias", "hidden_act", "rope_scaling")
    values = {_NAMES.get(key, key): value for key, value in config.items() if key not in dropped}
    values |= {key: value for key, (value, _) in _FIXED.items()}
    return values | {"embedding_size": config["vocab_size"], "use_cache": False}


def llada_name(name: str) -> str:
    """LLaDA's name of the decoder's tensor `name` (a weight, or the scales of one)."""
    stem, _, leaf = name.rpartition(".")
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"model.transformer.blocks.{layer[1]}.{_LAYER[layer[2]]}.{leaf}"
    return f"{_TOP[stem]}.{leaf}"


def decoder_name(name: str) -> str | None:
    """The decoder's name of LLaDA's tensor `name`; None of a name that LLaDA does not have."""
    stem, _, leaf = name.rpartition(".")
    if layer := re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)", stem):
        part = _LAYER_OF.get(layer[2])
        return None if part is None else f"model.layers.{layer[1]}.{part}.{leaf}"
    return f"{_TOP_OF[stem]}.{leaf}" if stem in _TOP_OF else None
