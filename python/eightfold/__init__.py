"""eightfold: FP8 and efficient-generation kernels for torch.

Low-level ops (`quantize`, `fp8_gemm`, ...), drop-in layers (`eightfold.nn`), an optimizer with 8-bit states
(`eightfold.optim`), models and training loops built on them. `eightfold.reference` defines every op in plain torch.
"""

import importlib

from eightfold import ops, reference
from eightfold.ops import (
    LinearAttentionState,
    QuantizedTensor,
    attention,
    block_attention,
    build_info,
    fp8_gemm,
    fp8_gemm_accumulate_,
    linear_attention,
    linear_attention_packed,
    linear_attention_quantize,
    lm_head_confidence,
    paged_attention,
    paged_store_,
    quantize,
    quantize_both,
    requantize,
    rope_cache_write,
)

__version__ = "0.1.0"
__all__ = [
    "LinearAttentionState",
    "QuantizedTensor",
    "attention",
    "block_attention",
    "build_info",
    "fp8_gemm",
    "fp8_gemm_accumulate_",
    "linear_attention",
    "linear_attention_packed",
    "linear_attention_quantize",
    "lm_head_confidence",
    "nn",
    "ops",
    "optim",
    "paged_attention",
    "paged_store_",
    "quantize",
    "quantize_both",
    "reference",
    "requantize",
    "rope_cache_write",
]

_SUBPACKAGES = ("generate", "models", "nn", "optim", "train")  # imported at first use: a script of ops starts sooner


def __getattr__(name: str):
    if name in _SUBPACKAGES:
        return importlib.import_module(f"eightfold.{name}")
    raise AttributeError(f"module 'eightfold' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBPACKAGES])
