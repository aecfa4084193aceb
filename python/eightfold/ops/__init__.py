"""Public functions over torch.ops.eightfold.*, one module a family."""

from eightfold.ops import _library
from eightfold.ops._fallback import kernels_run_on
from eightfold.ops.activation import swiglu, swiglu_backward_quantize, swiglu_quantize
from eightfold.ops.attention import attention, paged_attention, paged_attention_quantize, paged_next_rows_, paged_store_
from eightfold.ops.block_attention import block_attention
from eightfold.ops.confidence import lm_head_confidence, uncover_
from eightfold.ops.conv import depthwise_glu, depthwise_glu_backward, depthwise_glu_quantize
from eightfold.ops.gemm import fp8_gemm, fp8_gemm_accumulate_, gemm, gemm_plan
from eightfold.ops.linear_attention import (
    LinearAttentionState,
    linear_attention,
    linear_attention_packed,
    linear_attention_quantize,
)
from eightfold.ops.loss import cross_entropy
from eightfold.ops.modulate import (
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_quantize,
    layer_norm_modulate,
    layer_norm_modulate_backward,
    layer_norm_modulate_quantize,
)
from eightfold.ops.norm import (
    add_rms_norm,
    add_rms_norm_quantize,
    rms_norm,
    rms_norm_backward,
    rms_norm_columns,
    rms_norm_quantize,
)
from eightfold.ops.optim import adamw_dre_, came8bit_, dre_dequantize, dre_quantize
from eightfold.ops.pixels import bias_silu, rms_norm_add
from eightfold.ops.quant import (
    QuantizedTensor,
    quantize,
    quantize_beside,
    quantize_both,
    quantize_stacked,
    requantize,
    transpose,
)
from eightfold.ops.rope_cache import kv_round, rope_cache_write
from eightfold.ops.rotary import (
    rms_norm_rotary,
    rms_norm_rotary_backward,
    rotary,
    rotary_backward_quantize,
    rotary_tables,
)
from eightfold.ops.sampling import sample

build_info = _library.build_info

__all__ = [
    "LinearAttentionState",
    "QuantizedTensor",
    "adamw_dre_",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "attention",
    "bias_silu",
    "block_attention",
    "build_info",
    "came8bit_",
    "cross_entropy",
    "depthwise_glu",
    "depthwise_glu_backward",
    "depthwise_glu_quantize",
    "dre_dequantize",
    "dre_quantize",
    "fp8_gemm",
    "fp8_gemm_accumulate_",
    "gated_residual_layer_norm_modulate",
    "gated_residual_layer_norm_modulate_quantize",
    "gemm",
    "gemm_plan",
    "kernels_run_on",
    "kv_round",
    "layer_norm_modulate",
    "layer_norm_modulate_backward",
    "layer_norm_modulate_quantize",
    "linear_attention",
    "linear_attention_packed",
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
    "transpose",
    "uncover_",
]
