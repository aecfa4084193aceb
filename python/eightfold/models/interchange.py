"""DeepSeek-style FP8 checkpoints, as transformers (FineGrainedFP8), vLLM and SGLang read them: the linear weights of
the layers as E4M3 codes [N, K], and beside each `<name>_scale_inv`, float32 [ceil(N / 128), ceil(K / 128)], what the
codes of a block are multiplied with. (DeepSeek-V3's release, README_WEIGHTS.md; transformers, finegrained_fp8.py.)

Written codes and scales are those that the forward products use, and quantising what was read gives them again, if it
was read as float32. The largest magnitude m of a block has the code 448 and the scale s = fl(m / 448), so what is read
has the largest magnitude fl(448 s), and fl(fl(448 s) / 448) = s. For (448 = 7 * 64, u the last place of s) 7 s lies
within 3.5 u of m / 64: where floats there are 8 u apart, fl(7 s) is m / 64 itself; where 4 u, fl(7 s) is within 2 u of
7 s, so its seventh within u / 2 of s. Codes return because two roundings move a quotient by 2^-23 of itself, and E4M3's
midpoints are 2^-5 away. Blocks under the quantiser's floor have its scale both times.

Scales made otherwise (another quantiser's, powers of two) need not return: their weights are read to the same values,
which the quantiser then gives scales of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from eightfold.models.decoder import Decoder
from eightfold.ops.layouts import ceil_div

Format = Literal["fp8", "bf16"]
FORMATS = ("fp8", "bf16")
SCALE = "_scale_inv"
CODES = torch.float8_e4m3fn
BLOCK = [128, 128]
QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": BLOCK,
    "modules_to_not_convert": ["lm_head"],
}
_SCALE_DTYPES = (torch.float32, torch.bfloat16)  # Qwen3's releases store bfloat16


def in_format(model: Decoder, tensors: dict[str, torch.Tensor], format: Format) -> dict[str, torch.Tensor]:
    """`tensors` (the model's state dict) as they are stored: for "bf16" all bfloat16; for "fp8" the weights of the
    layers' linears as codes and scales, the rest bfloat16.

    Raises ValueError naming `format`, or a weight that holds NaN or Inf: no code stands for it.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    linears = {f"model.{name}.weight" for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    stored = {}
    for name, tensor in tensors.items():
        if format == "bf16" or name not in linears:
            stored[name] = tensor.to(torch.bfloat16)
            continue
        # float16, which the quantiser does not take, widens exactly.
        source = tensor if tensor.dtype == torch.bfloat16 else tensor.float()
        codes, scales = torch.ops.eightfold.quantize(source, BLOCK)
        if not scales.isfinite().all():
            raise ValueError(f"{name}: expected finite weights, got NaN or Inf")
        stored[name], stored[name + SCALE] = codes.contiguous(), scales.contiguous()
    return stored


def check_quantization(quantization: Any, file: Path) -> None:
    """Raises ValueError unless the `quantization_config` of the config.json `file` is the one read here."""
    if not isinstance(quantization, dict):
        raise ValueError(f"{file}: quantization_config: expected an object, got {quantization!r}")
    for key in ("quant_method", "weight_block_size", "activation_scheme", "fmt"):
        # As in transformers, the scheme and the format have defaults.
        default = QUANTIZATION[key] if key in ("activation_scheme", "fmt") else None
        if quantization.get(key, default) != QUANTIZATION[key]:
            raise ValueError(
                f"{file}: quantization_config.{key}: expected {QUANTIZATION[key]!r}, got {quantization.get(key)!r}"
            )


def dequantized(tensors: dict[str, torch.Tensor], file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`tensors` with each weight of codes replaced by codes * scales (in float32, rounded once to `dtype`), without
    the scales. Raises ValueError naming `file`, where they are from, and the tensor that is absent, or of another shape
    or dtype than its partner asks for."""
    weights = {name for name, tensor in tensors.items() if tensor.dtype == CODES}
    for name in tensors:
        if name.endswith(SCALE) and name.removesuffix(SCALE) not in weights:
            partner = tensors.get(name.removesuffix(SCALE))
            got = "none" if partner is None else partner.dtype
            raise ValueError(f"{file}: {name.removesuffix(SCALE)}: expected {CODES} for its scales {name}, got {got}")
    plain = {}
    for name, tensor in tensors.items():
        if name in weights:
            plain[name] = _dequantized(name, tensor, tensors.get(name + SCALE), file).to(dtype)
        elif not name.endswith(SCALE):
            plain[name] = tensor
    return plain


def _dequantized(name: str, codes: torch.Tensor, scales: torch.Tensor | None, file: Path) -> torch.Tensor:
    if scales is None:
        raise ValueError(f"{file}: {name + SCALE}: missing: the scales of {name} ({codes.dtype})")
    shape = tuple(ceil_div(size, 128) for size in codes.shape)
    if codes.dim() != 2 or tuple(scales.shape) != shape:
        raise ValueError(
            f"{file}: {name + SCALE}: expected shape {shape} for {tuple(codes.shape)}, got {tuple(scales.shape)}"
        )
    if scales.dtype not in _SCALE_DTYPES:
        raise ValueError(f"{file}: {name + SCALE}: expected float32 or bfloat16, got {scales.dtype}")
    return torch.ops.eightfold.dequantize(codes, scales.float(), BLOCK, torch.float32)
