"""Executable specification of every op in plain torch: slow, readable, public.

Each function has the name and the signature of its torch.ops.eightfold op.
"""

from eightfold.reference.activation import swiglu, swiglu_backward_quantize, swiglu_quantize
from eightfold.reference.attention import (
    attention,
    attention_backward,
    paged_attention,
    paged_attention_quantize,
    paged_next_rows_,
    paged_store_,
)
from eightfold.reference.block_attention import block_attention
from eightfold.reference.confidence import lm_head_confidence, uncover_
from eightfold.reference.conv import depthwise_glu, depthwise_glu_backward, depthwise_glu_quantize
from eightfold.reference.gemm import fp8_gemm, fp8_gemm_accumulate_, gemm
from eightfold.reference.linear_attention import (
    linear_attention,
    linear_attention_backward,
    linear_attention_quantize,
)
from eightfold.reference.loss import cross_entropy
from eightfold.reference.modulate import (
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_quantize,
    layer_norm_modulate,
    layer_norm_modulate_backward,
    layer_norm_modulate_quantize,
)
from eightfold.reference.norm import (
    add_rms_norm,
    add_rms_norm_quantize,
    rms_norm,
    rms_norm_backward,
    rms_norm_columns,
    rms_norm_quantize,
)
from eightfold.reference.optim import adamw_dre_, came8bit_, dre_dequantize, dre_quantize
from eightfold.reference.pixels import bias_silu, rms_norm_add
from eightfold.reference.quant import (
    dequantize,
    quantize,
    quantize_beside,
    quantize_both,
    quantize_stacked,
    requantize,
    transpose_codes,
)
from eightfold.reference.rope_cache import kv_round, rope_cache_write
from eightfold.reference.rotary import (
    rms_norm_rotary,
    rms_norm_rotary_backward,
    rotary,
    rotary_backward_quantize,
    rotary_tables,
)
from eightfold.reference.sampling import sample

__all__ = [
    "adamw_dre_",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "attention",
    "attention_backward",
    "bias_silu",
    "block_attention",
    "came8bit_",
    "cross_entropy",
    "depthwise_glu",
    "depthwise_glu_backward",
    "depthwise_glu_quantize",
    "dequantize",
    "dre_dequantize",
    "dre_quantize",
    "fp8_gemm",
    "fp8_gemm_accumulate_",
    "gated_residual_layer_norm_modulate",
    "gated_residual_layer_norm_modulate_quantize",
    "gemm",
    "kv_round",
    "layer_norm_modulate",
    "layer_norm_modulate_backward",
    "layer_norm_modulate_quantize",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_quantize",
    "lm_head_confidence",
    "paged_attention",
    "paged_attention_quantize",
    "paged_next_rows_",
    "paged_store_",
    "quantize",
    "quantize_beside",
    "quantize_both",
    "quantize_stacked",
    "requantize",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_backward",
    "rms_norm_columns",
    "rms_norm_quantize",
    "rms_norm_rotary",
    "rms_norm_rotary_backward",
    "rope_cache_write",
    "rotary",
    "rotary_backward_quantize",
    "rotary_tables",
    "sample",
    "swiglu",
    "swiglu_backward_quantize",
    "swiglu_quantize",
    "transpose_codes",
    "uncover_",
]
