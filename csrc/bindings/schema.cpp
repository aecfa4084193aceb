// Every op's schema. Codes are float8_e4m3fn and scales float32; layouts are those of python/eightfold/ops/layouts.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(eightfold, m) {
  // quant: casts alone
  m.def("quantize(Tensor x, int[] group, bool power_of_two=False) -> (Tensor codes, Tensor scales)");
  m.def("quantize_both(Tensor x, bool power_of_two=False) -> (Tensor codes, Tensor scales, Tensor col_codes, Tensor col_scales)");
  m.def("quantize_stacked(Tensor[] xs, bool transposed=False) -> (Tensor codes, Tensor scales)");
  m.def(
      "quantize_beside(Tensor[] xs, bool columns=True) -> (Tensor codes, Tensor scales, Tensor col_codes, Tensor "
      "col_scales)");
  m.def("dequantize(Tensor codes, Tensor scales, int[] group, ScalarType dtype) -> Tensor");
  m.def("requantize(Tensor codes, Tensor scales, bool power_of_two=False) -> (Tensor col_codes, Tensor col_scales)");
  m.def("transpose_codes(Tensor codes) -> Tensor");

  // quant: a norm or an activation, alone or fused with casts
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool training) -> (Tensor y, Tensor x_codes, Tensor x_scales, Tensor rstd)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor sum, Tensor y)");
  m.def(
      "rms_norm_quantize(Tensor x, Tensor weight, float eps, bool training) -> (Tensor codes, Tensor scales, Tensor col_codes, "
      "Tensor col_scales, Tensor x_codes, Tensor x_scales, Tensor rstd)");
  m.def(
      "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, bool training) -> (Tensor sum, Tensor codes, "
      "Tensor scales, Tensor col_codes, Tensor col_scales, Tensor x_codes, Tensor x_scales, Tensor rstd)");
  m.def(
      "rms_norm_columns(Tensor x_codes, Tensor x_scales, Tensor rstd, Tensor weight, ScalarType dtype) -> (Tensor col_codes, Tensor "
      "col_scales)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor? x_scales, Tensor rstd, Tensor weight, Tensor? residual_grad) -> (Tensor dx, "
      "Tensor dweight)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def(
      "swiglu_quantize(Tensor gate, Tensor up, bool training) -> (Tensor codes, Tensor scales, Tensor gate_codes, Tensor "
      "gate_scales, Tensor up_codes, Tensor up_scales)");
  m.def(
      "swiglu_backward_quantize(Tensor dh, Tensor gate_codes, Tensor gate_scales, Tensor up_codes, Tensor up_scales, bool "
      "beside=False) -> (Tensor dgate_codes, Tensor dgate_scales, Tensor dgate_col_codes, Tensor dgate_col_scales, Tensor dup_codes, "
      "Tensor dup_scales, "
      "Tensor dup_col_codes, Tensor dup_col_scales, Tensor h_col_codes, Tensor h_col_scales)");

  // LayerNorm and modulation by a sample's vectors, alone or after a gated residual
  m.def("layer_norm_modulate(Tensor x, Tensor scale, Tensor shift, float eps, bool training) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_modulate_quantize(Tensor x, Tensor scale, Tensor shift, float eps, bool training) -> (Tensor codes, Tensor scales, "
      "Tensor col_codes, Tensor col_scales, Tensor mean, Tensor rstd)");
  m.def(
      "gated_residual_layer_norm_modulate(Tensor x, Tensor branch, Tensor? gate, Tensor scale, Tensor shift, float eps, bool training) "
      "-> (Tensor r, Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "gated_residual_layer_norm_modulate_quantize(Tensor x, Tensor branch, Tensor? gate, Tensor scale, Tensor shift, float eps, bool "
      "training) -> (Tensor r, Tensor codes, Tensor scales, Tensor col_codes, Tensor col_scales, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_modulate_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor? residual_grad, Tensor? branch, "
      "Tensor? gate) -> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dscale, Tensor dshift)");

  // conv: images of channels-last pixels
  m.def("depthwise_glu(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def("depthwise_glu_quantize(Tensor x, Tensor weight, Tensor bias) -> (Tensor codes, Tensor scales)");
  m.def("depthwise_glu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("bias_silu(Tensor x, Tensor bias) -> Tensor");
  m.def("rms_norm_add(Tensor x, Tensor weight, Tensor bias, Tensor residual, float eps=1e-05) -> Tensor");

  // rotary position embedding
  m.def("rotary_tables(Tensor frequency, Tensor positions) -> (Tensor cos, Tensor sin)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor");
  m.def(
      "rotary_backward_quantize(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, bool columns=True, bool bias=False) -> (Tensor "
      "codes, Tensor scales, Tensor col_codes, Tensor col_scales, Tensor dbias)");
  m.def(
      "rms_norm_rotary(Tensor x, Tensor weight, float eps, Tensor cos, Tensor sin, bool training) -> (Tensor y, Tensor x_codes, Tensor "
      "x_scales, Tensor rstd)");
  m.def(
      "rms_norm_rotary_backward(Tensor dy, Tensor x_codes, Tensor x_scales, Tensor rstd, Tensor weight, Tensor cos, Tensor sin) -> "
      "(Tensor dx, Tensor dweight)");

  // attention: packed sequences, and a cache in pages
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor starts, int longest, float scale, bool causal=True, int block=1) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, int longest, float scale, "
      "bool causal=True, int block=1) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor pages, Tensor starts, "
      "Tensor lengths, int longest, float scale, bool causal=True, int block=1, bool settled=False) -> Tensor");
  m.def(
      "paged_attention_quantize(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor pages, Tensor "
      "starts, Tensor lengths, int longest, float scale, bool causal=True, int block=1, bool settled=False) -> (Tensor codes, Tensor "
      "scales)");
  m.def(
      "paged_store_(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor "
      "slots) -> ()");
  m.def(
      "rope_cache_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? "
      "k_scales, Tensor(d!)? v_scales, Tensor slots, Tensor? q_weight, Tensor? k_weight, float eps) -> Tensor");
  m.def(
      "paged_next_rows_(Tensor(a!) positions, Tensor tokens, Tensor active, Tensor pages, int page_size) -> (Tensor ids, Tensor at, Tensor "
      "slots, Tensor lengths)");
  m.def("kv_round(Tensor x) -> Tensor");

  // block_attention: a block of rows over a cache that it is written to
  m.def(
      "block_attention(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scales, Tensor(d!)? "
      "v_scales, Tensor at, Tensor lengths, float scale) -> Tensor");

  // linear_attention: q, k, v [batch, tokens, heads, dim]; a state's gradient is that of the one that came in
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? state=None, Tensor? normalizer=None, float "
      "eps=1e-15) -> (Tensor out, Tensor state_out, Tensor normalizer_out)");
  m.def(
      "linear_attention_quantize(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? state=None, Tensor? normalizer=None, "
      "float eps=1e-15) -> (Tensor codes, Tensor scales, Tensor state_out, Tensor normalizer_out)");
  m.def(
      "linear_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor state_out, Tensor normalizer_out, Tensor? "
      "key_mask=None, Tensor? dstate_out=None, Tensor? dnormalizer_out=None, float eps=1e-15) -> (Tensor dqkv, Tensor dstate, Tensor "
      "dnormalizer)");

  // loss
  m.def(
      "cross_entropy(Tensor logits, Tensor labels, bool training=False, ScalarType grad_dtype=bfloat16, Tensor? temperatures=None, "
      "Tensor? grad_output=None) -> (Tensor loss, Tensor grad)");

  // gemm: a @ b^T
  m.def(
      "fp8_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, int b_group_rows=128, Tensor? bias=None, ScalarType "
      "out_dtype=bfloat16, bool settled=False) -> Tensor");
  m.def("fp8_gemm_accumulate_(Tensor(a!) out, Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, int b_group_rows=128) -> ()");
  m.def("gemm(Tensor a, Tensor b, ScalarType out_dtype=float32) -> Tensor");

  // sampling
  m.def("sample(Tensor logits, Tensor seeds, Tensor positions, Tensor temperatures, Tensor top_k, Tensor top_p) -> Tensor");

  // confidence: the head's token and its probability; what a diffusion model's step uncovers
  m.def(
      "lm_head_confidence(Tensor hidden, Tensor? hidden_scales, Tensor weight, Tensor? weight_scales, Tensor? active=None, Tensor? "
      "forbidden=None, Tensor? temperatures=None, Tensor? seeds=None, Tensor? positions=None) -> (Tensor ids, Tensor confidence)");
  m.def(
      "uncover_(Tensor(a!) tokens, Tensor at, Tensor ids, Tensor confidence, Tensor(b!) left, int mask_id, float? threshold=None, float? "
      "factor=None, Tensor? counts=None, Tensor? eos_ids=None, Tensor(c!)? ended=None, bool last_too=False) -> ()");

  // optim: 8-bit states
  m.def("dre_quantize(Tensor x, int row_length) -> (Tensor codes, Tensor maxima, Tensor exponents)");
  m.def("dre_dequantize(Tensor codes, Tensor maxima, Tensor exponents, int row_length) -> Tensor");
  m.def(
      "adamw_dre_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] m_codes, Tensor(d!)[] m_maxima, "
      "Tensor(e!)[] m_exponents, Tensor(f!)[] v_codes, Tensor(g!)[] v_maxima, Tensor(h!)[] v_exponents, int[] row_lengths, int[] "
      "offsets, Tensor[] steps, Tensor lr, Tensor? grad_scale, float beta1, float beta2, float eps, float weight_decay, bool "
      "stochastic_states, int seed) -> ()");
  m.def(
      "came8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] m_scales, Tensor(d!)[] v_rows, Tensor(e!)[] v_cols, "
      "Tensor(f!)[] u_rows, Tensor(g!)[] u_cols, int[] offsets, Tensor[] steps, Tensor lr, Tensor? grad_scale, float beta1, float beta2, "
      "float beta3, float eps1, float eps2, float clip_threshold, float weight_decay, int seed) -> ()");
}
