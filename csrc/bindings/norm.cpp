// rms_norm, add_rms_norm, rms_norm_quantize, add_rms_norm_quantize, rms_norm_columns, rms_norm_backward: checks, allocation, dispatch.
#include "quant/norm.h"

#include "bindings/casts.h"

namespace eightfold::bindings {
namespace {

using namespace quant;  // the kernels

void check_weight(const Tensor& weight, const Tensor& x, const char* op) {
  check_dtype(weight, {ScalarType::BFloat16, ScalarType::Float}, op, "weight");
  check_same_device(weight, x, op, "weight");
  check_shape(weight, {x.size(1)}, op, "weight");
  check_contiguous(weight, op, "weight");
}

void check_rstd(const Tensor& rstd, const Tensor& x, const char* op) {
  check_same_device(rstd, x, op, "rstd");
  check_dtype(rstd, {ScalarType::Float}, op, "rstd");
  check_shape(rstd, {x.size(0)}, op, "rstd");
  check_contiguous(rstd, op, "rstd");
}

void check_norm_input(const Tensor& x, const Tensor& weight, const char* op, const char* argument) {
  check_rank(x, 2, op, argument);
  check_dtype(x, {ScalarType::BFloat16, ScalarType::Float}, op, argument);
  check_contiguous(x, op, argument);
  check_weight(weight, x, op);
  EF_CHECK(x.is_cpu() || x.size(1) <= kMaxNormCols, op, ": ", argument, " has ", x.size(1), " features; the CUDA kernel takes at most ",
           kMaxNormCols);
}

void check_like(const Tensor& t, const Tensor& x, const char* op, const char* argument) {
  check_same_device(t, x, op, argument);
  check_dtype(t, {x.scalar_type()}, op, argument);
  check_shape(t, {x.size(0), x.size(1)}, op, argument);
  check_contiguous(t, op, argument);
}

RmsNorm describe(const Tensor& x, const Tensor& weight, double eps, const char* op) {
  check_norm_input(x, weight, op, "x");
  EF_CHECK(eps >= 0, op, ": eps must not be negative, got ", eps);
  RmsNorm norm{};
  norm.x = x.data_ptr();
  norm.weight = weight.data_ptr();
  norm.dtype = dtype_of(x, op, "x");
  norm.weight_dtype = dtype_of(weight, op, "weight");
  norm.rows = x.size(0);
  norm.cols = x.size(1);
  norm.eps = static_cast<float>(eps);
  return norm;
}

void run(const RmsNorm& norm, const Tensor& x, const char* op) {
  if (norm.rows == 0) return;
  if (x.is_cpu()) return rms_norm_cpu(norm);
#if EIGHTFOLD_WITH_CUDA
  OnDeviceOf device(x);
  rms_norm_sm90(norm, current_stream(x));
#else
  fail(op, ": this build has no CUDA kernels");
#endif
}

Tensor empty_rstd(const Tensor& x, bool training) { return empty({training ? x.size(0) : 0}, ScalarType::Float, x); }

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool training) {
  RmsNorm norm = describe(x, weight, eps, "rms_norm");
  Tensor y = empty({norm.rows, norm.cols}, x.scalar_type(), x), rstd = empty_rstd(x, training);
  RowCast x_rows = empty_row_cast(norm.rows, norm.cols, x, training);
  norm.y = y.data_ptr();
  norm.x_rows = x_rows.view;
  if (training) norm.rstd = static_cast<float*>(rstd.data_ptr());
  run(norm, x, "rms_norm");
  return {std::move(y), std::move(x_rows.codes), std::move(x_rows.scales), std::move(rstd)};
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const char* op = "add_rms_norm";
  RmsNorm norm = describe(x, weight, eps, op);
  check_like(residual, x, op, "residual");
  Tensor sum = empty({norm.rows, norm.cols}, x.scalar_type(), x), y = empty({norm.rows, norm.cols}, x.scalar_type(), x);
  norm.residual = residual.data_ptr();
  norm.sum = sum.data_ptr();
  norm.y = y.data_ptr();
  run(norm, x, op);
  return {std::move(sum), std::move(y)};
}

struct Casts {
  RowCast y, x;
  ColCast y_cols;
  Tensor rstd;
};

Casts norm_and_cast(RmsNorm& norm, const Tensor& x, bool training, const char* op) {
  Casts out{empty_row_cast(norm.rows, norm.cols, x), empty_row_cast(norm.rows, norm.cols, x, training),
            empty_col_cast(norm.rows, norm.cols, x, training), empty_rstd(x, training)};
  norm.y_rows = out.y.view;
  norm.x_rows = out.x.view;
  norm.y_cols = out.y_cols.view;
  if (training) norm.rstd = static_cast<float*>(out.rstd.data_ptr());
  Tensor workspace = empty({training && !x.is_cpu() ? training_workspace(norm.rows, norm.cols) : 0}, ScalarType::Float, x);
  norm.workspace = static_cast<float*>(workspace.data_ptr());
  run(norm, x, op);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Tensor& weight, double eps,
                                                                                     bool training) {
  const char* op = "rms_norm_quantize";
  RmsNorm norm = describe(x, weight, eps, op);
  Casts out = norm_and_cast(norm, x, training, op);
  return {std::move(out.y.codes), std::move(out.y.scales), std::move(out.y_cols.codes), std::move(out.y_cols.scales),
          std::move(out.x.codes), std::move(out.x.scales), std::move(out.rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x, const Tensor& residual,
                                                                                                 const Tensor& weight, double eps,
                                                                                                 bool training) {
  const char* op = "add_rms_norm_quantize";
  RmsNorm norm = describe(x, weight, eps, op);
  check_like(residual, x, op, "residual");
  Tensor sum = empty({norm.rows, norm.cols}, x.scalar_type(), x);
  norm.residual = residual.data_ptr();
  norm.sum = sum.data_ptr();
  Casts out = norm_and_cast(norm, x, training, op);
  return {
      std::move(sum),         std::move(out.y.codes),  std::move(out.y.scales), std::move(out.y_cols.codes), std::move(out.y_cols.scales),
      std::move(out.x.codes), std::move(out.x.scales), std::move(out.rstd)};
}

std::tuple<Tensor, Tensor> rms_norm_columns(const Tensor& x_codes, const Tensor& x_scales, const Tensor& rstd, const Tensor& weight,
                                            ScalarType dtype) {
  const char* op = "rms_norm_columns";
  check_rank(x_codes, 2, op, "x_codes");
  const int64_t rows = x_codes.size(0), cols = x_codes.size(1);
  RmsNormColumns norm{};
  norm.x = row_codes_in(x_codes, x_scales, rows, cols, x_codes, op, "x_codes", "x_scales");
  check_rstd(rstd, x_codes, op);
  check_weight(weight, x_codes, op);
  EF_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, op, ": dtype must be bfloat16 or float32, got ", name_of(dtype));
  ColCast out = empty_col_cast(rows, cols, x_codes);
  norm.rstd = static_cast<const float*>(rstd.data_ptr());
  norm.weight = weight.data_ptr();
  norm.dtype = dtype == ScalarType::Float ? DType::f32 : DType::bf16;
  norm.weight_dtype = dtype_of(weight, op, "weight");
  norm.y_cols = out.view;
  if (x_codes.is_cpu()) {
    rms_norm_columns_cpu(norm);
  } else {
#if EIGHTFOLD_WITH_CUDA
    OnDeviceOf device(x_codes);
    rms_norm_columns_sm90(norm, current_stream(x_codes));
#else
    fail(op, ": this build has no CUDA kernels");
#endif
  }
  return {std::move(out.codes), std::move(out.scales)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& x_scales, const Tensor& rstd,
                                             const Tensor& weight, const std::optional<Tensor>& residual_grad) {
  const char* op = "rms_norm_backward";
  check_norm_input(dy, weight, op, "dy");
  int64_t rows = dy.size(0), cols = dy.size(1);
  RmsNormBackward norm{};
  if (x_scales) {
    norm.x_codes = row_codes_in(x, *x_scales, rows, cols, dy, op, "x", "x_scales");
  } else {
    check_like(x, dy, op, "x");
    norm.x = x.data_ptr();
  }
  check_rstd(rstd, dy, op);
  if (residual_grad) {
    check_like(*residual_grad, dy, op, "residual_grad");
    norm.residual_grad = residual_grad->data_ptr();
  }
  Tensor dx = empty({rows, cols}, dy.scalar_type(), dy), dweight = empty({cols}, ScalarType::Float, dy);
  Tensor partials = empty({backward_runs(rows, cols), cols}, ScalarType::Float, dy);
  norm.dy = dy.data_ptr();
  norm.rstd = static_cast<const float*>(rstd.data_ptr());
  norm.weight = weight.data_ptr();
  norm.dtype = dtype_of(dy, op, "dy");
  norm.weight_dtype = dtype_of(weight, op, "weight");
  norm.rows = rows;
  norm.cols = cols;
  norm.dx = dx.data_ptr();
  norm.dweight = static_cast<float*>(dweight.data_ptr());
  norm.partials = static_cast<float*>(partials.data_ptr());
  if (cols == 0) return {std::move(dx), std::move(dweight)};
  if (dy.is_cpu()) {
    rms_norm_backward_cpu(norm);
  } else {
#if EIGHTFOLD_WITH_CUDA
    OnDeviceOf device(dy);
    rms_norm_backward_sm90(norm, current_stream(dy));
#else
    fail(op, ": this build has no CUDA kernels");
#endif
  }
  return {std::move(dx), std::move(dweight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) {
  m.impl("rms_norm", EF_BOX(&rms_norm));
  m.impl("add_rms_norm", EF_BOX(&add_rms_norm));
  m.impl("rms_norm_quantize", EF_BOX(&rms_norm_quantize));
  m.impl("add_rms_norm_quantize", EF_BOX(&add_rms_norm_quantize));
  m.impl("rms_norm_columns", EF_BOX(&rms_norm_columns));
  m.impl("rms_norm_backward", EF_BOX(&rms_norm_backward));
}

#if EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) {
  m.impl("rms_norm", EF_BOX(&rms_norm));
  m.impl("add_rms_norm", EF_BOX(&add_rms_norm));
  m.impl("rms_norm_quantize", EF_BOX(&rms_norm_quantize));
  m.impl("add_rms_norm_quantize", EF_BOX(&add_rms_norm_quantize));
  m.impl("rms_norm_columns", EF_BOX(&rms_norm_columns));
  m.impl("rms_norm_backward", EF_BOX(&rms_norm_backward));
}
#endif

}  // namespace eightfold::bindings
