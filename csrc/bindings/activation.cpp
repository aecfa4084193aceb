// swiglu, swiglu_quantize, swiglu_backward_quantize: checks, allocation, dispatch.
#include "bindings/casts.h"
#include "quant/swiglu.h"

namespace eightfold::bindings {
namespace {

using namespace quant;  // the kernels

void check_matrix(const Tensor& t, const char* op, const char* argument) {
  check_rank(t, 2, op, argument);
  check_dtype(t, {ScalarType::BFloat16, ScalarType::Float}, op, argument);
  check_last_dim_contiguous(t, op, argument);
  EF_CHECK(t.stride(0) >= t.size(1) || t.size(0) <= 1, op, ": ", argument, " must have rows that do not overlap, got shape ", shape_of(t),
           " with strides ", strides_of(t));
}

SwigluForward describe(const Tensor& gate, const Tensor& up, const char* op) {
  check_matrix(gate, op, "gate");
  check_same_device(up, gate, op, "up");
  check_dtype(up, {gate.scalar_type()}, op, "up");
  check_shape(up, {gate.size(0), gate.size(1)}, op, "up");
  check_matrix(up, op, "up");
  SwigluForward swiglu{};
  swiglu.gate = gate.data_ptr();
  swiglu.up = up.data_ptr();
  swiglu.gate_ld = gate.stride(0);
  swiglu.up_ld = up.stride(0);
  swiglu.dtype = dtype_of(gate, op, "gate");
  swiglu.rows = gate.size(0);
  swiglu.cols = gate.size(1);
  return swiglu;
}

void run(const SwigluForward& swiglu, const Tensor& gate, const char* op) {
  if (swiglu.rows == 0 || swiglu.cols == 0) return;
  if (gate.is_cpu()) return swiglu_cpu(swiglu);
#if EIGHTFOLD_WITH_CUDA
  OnDeviceOf device(gate);
  swiglu_sm90(swiglu, current_stream(gate));
#else
  fail(op, ": this build has no CUDA kernels");
#endif
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  SwigluForward swiglu = describe(gate, up, "swiglu");
  Tensor y = empty({swiglu.rows, swiglu.cols}, gate.scalar_type(), gate);
  swiglu.y = y.data_ptr();
  run(swiglu, gate, "swiglu");
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> swiglu_quantize(const Tensor& gate, const Tensor& up, bool training) {
  SwigluForward swiglu = describe(gate, up, "swiglu_quantize");
  RowCast h = empty_row_cast(swiglu.rows, swiglu.cols, gate);
  RowCast gate_out = empty_row_cast(swiglu.rows, swiglu.cols, gate, training);
  RowCast up_out = empty_row_cast(swiglu.rows, swiglu.cols, gate, training);
  swiglu.h = h.view;
  swiglu.gate_out = gate_out.view;
  swiglu.up_out = up_out.view;
  run(swiglu, gate, "swiglu_quantize");
  return {std::move(h.codes),         std::move(h.scales),     std::move(gate_out.codes),
          std::move(gate_out.scales), std::move(up_out.codes), std::move(up_out.scales)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> swiglu_backward_quantize(
    const Tensor& dh, const Tensor& gate_codes, const Tensor& gate_scales, const Tensor& up_codes, const Tensor& up_scales, bool beside) {
  const char* op = "swiglu_backward_quantize";
  check_matrix(dh, op, "dh");
  int64_t rows = dh.size(0), cols = dh.size(1);
  EF_CHECK(!beside || cols % kGroup == 0, op, ": dh must have a multiple of ", kGroup, " columns for dgate and dup beside each other, got ",
           "shape ", shape_of(dh));
  SwigluBackward swiglu{};
  swiglu.gate = row_codes_in(gate_codes, gate_scales, rows, cols, dh, op, "gate_codes", "gate_scales");
  swiglu.up = row_codes_in(up_codes, up_scales, rows, cols, dh, op, "up_codes", "up_scales");
  const int64_t width = beside ? 2 * cols : cols;
  RowCast dgate = empty_row_cast(rows, width, dh), dup = empty_row_cast(rows, cols, dh, !beside);
  ColCast dgate_cols = empty_col_cast(rows, width, dh), dup_cols = empty_col_cast(rows, cols, dh, !beside);
  ColCast h_cols = empty_col_cast(rows, cols, dh);
  swiglu.beside = beside;
  if (beside) {
    dup.view = dgate.view;
    dup.view.codes += cols;
    dup.view.scales += cols / kGroup * dup.view.scale_ld;
    dup_cols.view = dgate_cols.view;
    dup_cols.view.codes += cols * dup_cols.view.code_ld;
    dup_cols.view.scales += cols;
  }
  swiglu.dh = dh.data_ptr();
  swiglu.dh_ld = dh.stride(0);
  swiglu.dtype = dtype_of(dh, op, "dh");
  swiglu.rows = rows;
  swiglu.cols = cols;
  swiglu.dgate_rows = dgate.view;
  swiglu.dup_rows = dup.view;
  swiglu.dgate_cols = dgate_cols.view;
  swiglu.dup_cols = dup_cols.view;
  swiglu.h_cols = h_cols.view;
  if (rows > 0 && cols > 0) {
    if (dh.is_cpu()) {
      swiglu_backward_quantize_cpu(swiglu);
    } else {
#if EIGHTFOLD_WITH_CUDA
      OnDeviceOf device(dh);
      swiglu_backward_quantize_sm90(swiglu, current_stream(dh));
#else
      fail(op, ": this build has no CUDA kernels");
#endif
    }
  }
  return {std::move(dgate.codes),  std::move(dgate.scales), std::move(dgate_cols.codes), std::move(dgate_cols.scales),
          std::move(dup.codes),    std::move(dup.scales),   std::move(dup_cols.codes),   std::move(dup_cols.scales),
          std::move(h_cols.codes), std::move(h_cols.scales)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) {
  m.impl("swiglu", EF_BOX(&swiglu));
  m.impl("swiglu_quantize", EF_BOX(&swiglu_quantize));
  m.impl("swiglu_backward_quantize", EF_BOX(&swiglu_backward_quantize));
}

#if EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) {
  m.impl("swiglu", EF_BOX(&swiglu));
  m.impl("swiglu_quantize", EF_BOX(&swiglu_quantize));
  m.impl("swiglu_backward_quantize", EF_BOX(&swiglu_backward_quantize));
}
#endif

}  // namespace eightfold::bindings
