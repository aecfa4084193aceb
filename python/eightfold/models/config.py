"""DecoderConfig: the sizes and switches of a Llama, Qwen2, Qwen3, LLaDA or Dream decoder, from and to config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from eightfold.models.llada import config_from_llada, config_to_llada

AUTOREGRESSIVE_TYPES = ("llama", "qwen2", "qwen3")
MODEL_TYPES = (*AUTOREGRESSIVE_TYPES, "llada", "dream")
ROPE_TYPES = ("default", "linear", "llama3")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llada": "LLaDAModelLM",
    "dream": "DreamModel",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class DecoderConfig:
    """Field names are those of Hugging Face's config.json.

    `rope_scaling` is None or a dict with `rope_type` "linear" (`factor`) or "llama3" (`factor`, `low_freq_factor`,
    `high_freq_factor`, `original_max_position_embeddings`). `attention_bias` puts a bias on q, k, v and o in Llama and
    Qwen3; Qwen2 and Dream always have one on q, k and v and none on o, LLaDA has none.

    Of diffusion language models (Dream 7B: arXiv 2508.15487): `mask_token_id` stands for a token not known yet.
    `attention_block` is what a token sees: 0 its whole sequence, 1 itself and what is before it, n all blocks of n
    tokens up to the end of its own; None: 0 for LLaDA and Dream, else 1. `shifted_logits`: what stands for token i is
    predicted by row i - 1, as in a next-token model, not by row i; None: true for Dream, else false.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    attention_block: int | None = None
    shifted_logits: bool | None = None

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {self.model_type!r}")
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim"):
            _check_positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads ({self.num_key_value_heads}), "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary embedding), got {self.head_dim}")
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)
        for name, usual in _usual_attention(self.model_type).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        if not isinstance(self.attention_block, int) or self.attention_block < 0:
            raise ValueError(f"attention_block: expected 0 or a positive integer, got {self.attention_block!r}")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id: expected 0 to {self.vocab_size - 1}, got {self.mask_token_id!r}")
        if self.model_type == "llada":
            self._check_llada()

    def _check_llada(self) -> None:
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim: expected {self.hidden_size} / {self.num_attention_heads} of a llada model, "
                f"got {self.head_dim}"
            )
        for name, value in (
            ("attention_bias", self.attention_bias),
            ("mlp_bias", self.mlp_bias),
            ("rope_scaling", self.rope_scaling),
        ):
            if value:
                raise ValueError(f"{name}: a llada model has none, got {value!r}")

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type in ("qwen2", "dream")

    @property
    def output_bias(self) -> bool:
        return self.attention_bias and self.model_type not in ("qwen2", "dream")

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> DecoderConfig:
        """Reads the dict of a config.json, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`),
        of LLaDA or of Dream.

        Raises ValueError, naming the key and its value, for what this decoder does not compute: another model_type,
        activation, rope type, sliding-window attention, partial rotary embedding.
        """
        model_type = "dream" if config.get("model_type") == "Dream" else config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
        config = {**(config_from_llada(config) if model_type == "llada" else config), "model_type": model_type}
        missing = [name for name in _REQUIRED if config.get(name) is None]
        if missing:
            raise ValueError(f"config: missing {', '.join(missing)}")
        for name in _REQUIRED:
            _check_positive(name, config[name])
        _reject_unsupported(config)

        values = {f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None}
        heads = values["num_attention_heads"]
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_dim", 128 if model_type == "qwen3" else values["hidden_size"] // heads)
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        values["rope_theta"] = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
        values["rope_scaling"] = _normalise_rope(rope, values.get("max_position_embeddings", 2048))
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The dict of a config.json that transformers 4 and 5 both load; of "llada" and "dream" one that their own code
        loads. A diffusion model's three keys are written where they are not what its model_type says."""
        config = dataclasses.asdict(self)
        for name, usual in {"mask_token_id": None, **_usual_attention(self.model_type)}.items():
            if config[name] == usual:
                del config[name]
        config["architectures"] = [_ARCHITECTURES[self.model_type]]
        config["hidden_act"] = "silu"
        if self.model_type == "llada":
            return config_to_llada(config)
        if self.model_type in ("qwen2", "dream"):
            del config["attention_bias"]
        if self.model_type != "llama":
            del config["mlp_bias"]
            config["use_sliding_window"] = False
        if self.model_type == "dream":
            config["model_type"] = "Dream"
        return config


def _usual_attention(model_type: str) -> dict[str, Any]:
    return {"attention_block": int(model_type in AUTOREGRESSIVE_TYPES), "shifted_logits": model_type == "dream"}


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _reject_unsupported(config: dict[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act: expected 'silu', got {config['hidden_act']!r}")
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window: sliding-window attention is not supported, got True")
    other = set(config.get("layer_types") or []) - {"full_attention"}
    if other:
        raise ValueError(f"layer_types: expected only 'full_attention', got {sorted(other)[0]!r}")
    rope = config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor: expected 1, got {partial!r}")


def _normalise_rope(rope: dict[str, Any], max_positions: int) -> dict[str, Any] | None:
    rope = dict(rope)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    rope.pop("partial_rotary_factor", None)
    if kind == "default":
        return None
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", max_positions)
    return {"rope_type": kind, **rope}


def _check_rope_scaling(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type: expected one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    needed = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}[kind]
    for key in needed:
        if not isinstance(rope.get(key), (int, float)) or rope[key] <= 0:
            raise ValueError(f"rope_scaling[{key!r}]: expected a positive number for {kind}, got {rope.get(key)!r}")
