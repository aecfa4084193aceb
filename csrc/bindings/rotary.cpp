// rotary and its tables, its backward pass fused with the casts, and both ways of it fused with the norm of heads: checks, allocation,
// dispatch.
#include "rotary/rotary.h"

#include "bindings/casts.h"
#include "rotary/rms_norm_rotary.h"
#include "rotary/rotary_backward.h"
#include "rotary/rotary_tables.h"

namespace eightfold::bindings {
namespace {

const float* table(const Tensor& t, const Tensor& x, const char* op, const char* argument) {
  check_same_device(t, x, op, argument);
  check_dtype(t, {ScalarType::Float}, op, argument);
  check_rank(t, 4, op, argument);
  const int64_t batch = t.size(0) == 1 ? 1 : x.size(0);
  check_shape(t, {batch, x.size(1), 1, x.size(3) / 2}, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<const float*>(t.data_ptr());
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const char* op = "rotary";
  check_rank(x, 4, op, "x");
  check_dtype(x, {ScalarType::BFloat16, ScalarType::Float}, op, "x");
  check_last_dim_contiguous(x, op, "x");
  EF_CHECK(x.size(3) % 2 == 0, op, ": x must have an even last dimension, got shape ", shape_of(x));
  Rotary args{};
  args.cos = table(cos, x, op, "cos");
  args.sin = table(sin, x, op, "sin");
  check_shape(sin, {cos.size(0), cos.size(1), 1, cos.size(3)}, op, "sin");
  Tensor y = empty(x.sizes(), x.scalar_type(), x);
  args.x = x.data_ptr();
  args.x_batch_stride = x.stride(0);
  args.x_token_stride = x.stride(1);
  args.x_head_stride = x.stride(2);
  args.y = y.data_ptr();
  args.dtype = dtype_of(x, op, "x");
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.heads = x.size(2);
  args.dim = x.size(3);
  args.table_batch_stride = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(3);
  args.inverse = inverse;
#ifdef EIGHTFOLD_WITH_CUDA
  if (x.is_cuda()) {
    OnDeviceOf device(x);
    rotary_sm90(args, current_stream(x));
    return y;
  }
#endif
  rotary_cpu(args);
  return y;
}

std::tuple<Tensor, Tensor> rotary_tables(const Tensor& frequency, const Tensor& positions) {
  const char* op = "rotary_tables";
  check_rank(frequency, 1, op, "frequency");
  check_dtype(frequency, {ScalarType::Float}, op, "frequency");
  check_contiguous(frequency, op, "frequency");
  check_same_device(positions, frequency, op, "positions");
  check_rank(positions, 2, op, "positions");
  check_dtype(positions, {ScalarType::Long}, op, "positions");
  check_contiguous(positions, op, "positions");
  const int64_t half = frequency.size(0);
  Tensor cos = empty({positions.size(0), positions.size(1), 1, half}, ScalarType::Float, frequency);
  Tensor sin = empty(cos.sizes(), ScalarType::Float, frequency);
  const RotaryAngles args{static_cast<const float*>(frequency.data_ptr()),
                          static_cast<const int64_t*>(positions.data_ptr()),
                          positions.numel(),
                          half,
                          static_cast<float*>(cos.data_ptr()),
                          static_cast<float*>(sin.data_ptr())};
  if (frequency.is_cpu()) rotary_tables_cpu(args);
#ifdef EIGHTFOLD_WITH_CUDA
  if (frequency.is_cuda()) {
    OnDeviceOf device(frequency);
    rotary_tables_sm90(args, current_stream(frequency));
  }
#endif
  return {std::move(cos), std::move(sin)};
}

using Gradient = RotaryBackward::Gradient;

Gradient gradient(const Tensor& t, const Tensor& dq, const char* argument) {
  const char* op = "rotary_backward_quantize";
  check_rank(t, 4, op, argument);
  check_dtype(t, {dq.scalar_type()}, op, argument);
  check_same_device(t, dq, op, argument);
  check_shape(t, {dq.size(0), dq.size(1), t.size(2), dq.size(3)}, op, argument);
  check_last_dim_contiguous(t, op, argument);
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.size(2)};
}

#ifdef EIGHTFOLD_WITH_CUDA
// What the fused kernel does not take: each step by its own kernel, the same bytes.
void separately(const RotaryBackward& op, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin) {
  const Tensor q = rotary(dq, cos, sin, true), k = rotary(dk, cos, sin, true);
  const Gradient& values = op.parts[2];
  const bool matrix = (values.heads == 1 || values.head_stride == op.dim) &&
                      (op.batch == 1 || values.batch_stride == op.tokens * values.token_stride);  // one stride from token to token
  const Tensor copy = matrix ? empty({0}, dv.scalar_type(), dv) : empty(dv.sizes(), dv.scalar_type(), dv);
  if (!matrix) TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), dv.get(), 0));
  const int64_t width = values.heads * op.dim;
  const quant::Parts parts{{q.data_ptr(), k.data_ptr(), matrix ? dv.data_ptr() : copy.data_ptr()},
                           {op.parts[0].heads * op.dim, op.parts[1].heads * op.dim, matrix ? values.token_stride : width},
                           {op.first(0), op.first(1), op.first(2)},
                           3,
                           op.dtype,
                           op.rows(),
                           op.cols()};
  void* stream = current_stream(dq);
  quant::quantize_beside_sm90(parts, op.row_codes, op.col_codes, stream);
  if (op.sums) column_sums_sm90(parts, op.sums, op.partials, stream);
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rotary_backward_quantize(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                                                            const Tensor& cos, const Tensor& sin, bool columns, bool bias) {
  const char* op = "rotary_backward_quantize";
  check_rank(dq, 4, op, "dq");
  check_dtype(dq, {ScalarType::BFloat16, ScalarType::Float}, op, "dq");
  EF_CHECK(dq.size(3) % 2 == 0, op, ": dq must have an even last dimension, got shape ", shape_of(dq));
  RotaryBackward args{};
  args.parts[0] = gradient(dq, dq, "dq");
  args.parts[1] = gradient(dk, dq, "dk");
  args.parts[2] = gradient(dv, dq, "dv");
  for (const auto& [t, name] : {std::pair{&dq, "dq"}, {&dk, "dk"}})
    EF_CHECK(t->size(2) * t->size(3) % 128 == 0, op, ": heads x dim of ", name, " must be a multiple of 128, got shape ", shape_of(*t));
  args.dtype = dtype_of(dq, op, "dq");
  args.batch = dq.size(0), args.tokens = dq.size(1), args.dim = dq.size(3);
  args.cos = table(cos, dq, op, "cos");
  args.sin = table(sin, dq, op, "sin");
  check_shape(sin, {cos.size(0), cos.size(1), 1, cos.size(3)}, op, "sin");
  args.table_batch_stride = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(3);

  const int64_t rows = args.rows(), cols = args.cols();
  RowCast by_row = empty_row_cast(rows, cols, dq);
  ColCast by_column = empty_col_cast(rows, cols, dq, columns);
  Tensor sums = empty({bias ? cols : 0}, ScalarType::Float, dq);
  const Tensor partials = empty({bias ? ceil_div(rows, kGroup) : 0, cols}, ScalarType::Float, dq);
  args.row_codes = by_row.view, args.col_codes = by_column.view;
  if (bias) args.sums = static_cast<float*>(sums.data_ptr()), args.partials = static_cast<float*>(partials.data_ptr());

  auto result = [&] {
    return std::tuple{std::move(by_row.codes), std::move(by_row.scales), std::move(by_column.codes), std::move(by_column.scales),
                      std::move(sums)};
  };
#ifdef EIGHTFOLD_WITH_CUDA
  if (dq.is_cuda()) {
    OnDeviceOf device(dq);
    if (rotary_backward_fits_sm90(args))
      rotary_backward_quantize_sm90(args, current_stream(dq));
    else
      separately(args, dq, dk, dv, cos, sin);
    return result();
  }
#endif
  rotary_backward_quantize_cpu(args);
  return result();
}

Heads heads_of(const Tensor& x, const char* op, const char* argument) {
  check_rank(x, 4, op, argument);
  check_dtype(x, {ScalarType::BFloat16, ScalarType::Float}, op, argument);
  check_last_dim_contiguous(x, op, argument);
  EF_CHECK(x.size(3) % 2 == 0, op, ": ", argument, " must have an even last dimension, got shape ", shape_of(x));
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), dtype_of(x, op, argument), x.size(0), x.size(1), x.size(2), x.size(3)};
}

RotaryTables tables_of(const Tensor& cos, const Tensor& sin, const Tensor& x, const char* op) {
  RotaryTables tables{table(cos, x, op, "cos"), table(sin, x, op, "sin"), cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(3)};
  check_shape(sin, {cos.size(0), cos.size(1), 1, cos.size(3)}, op, "sin");
  return tables;
}

const void* head_weight(const Tensor& weight, const Tensor& x, const char* op) {
  check_dtype(weight, {ScalarType::BFloat16, ScalarType::Float}, op, "weight");
  check_same_device(weight, x, op, "weight");
  check_shape(weight, {x.size(3)}, op, "weight");
  check_contiguous(weight, op, "weight");
  EF_CHECK(x.is_cpu() || x.size(3) <= quant::kMaxNormCols, op, ": heads have ", x.size(3), " elements; the CUDA kernel takes at most ",
           quant::kMaxNormCols);
  return weight.data_ptr();
}

#ifdef EIGHTFOLD_WITH_CUDA
// What the fused kernels do not take: each step by its own kernel, the same bits.
void separately(const RmsNormRotary& op, const Tensor& x) {
  void* stream = current_stream(x);
  const bool dense = x.is_contiguous();
  const Tensor copy = dense ? empty({0}, x.scalar_type(), x) : empty(x.sizes(), x.scalar_type(), x);
  if (!dense) TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), x.get(), 0));
  const Tensor normed = empty(x.sizes(), x.scalar_type(), x);
  quant::RmsNorm norm{};
  norm.x = dense ? x.data_ptr() : copy.data_ptr();
  norm.weight = op.weight, norm.dtype = op.x.dtype, norm.weight_dtype = op.weight_dtype;
  norm.rows = op.x.rows(), norm.cols = op.x.dim, norm.eps = op.eps;
  norm.y = normed.data_ptr(), norm.x_rows = op.x_rows, norm.rstd = op.rstd;
  quant::rms_norm_sm90(norm, stream);
  const int64_t token = op.x.heads * op.x.dim;
  const Heads from{normed.data_ptr(), op.x.tokens * token, token, op.x.dim, op.x.dtype, op.x.batch, op.x.tokens, op.x.heads, op.x.dim};
  rotary_sm90(rotary_of(from, op.tables, op.y, false), stream);
}

void separately(const RmsNormRotaryBackward& op, const Tensor& dy) {
  const Tensor rotated_back = empty(dy.sizes(), dy.scalar_type(), dy);
  rotary_sm90(rotary_of(op.dy, op.tables, rotated_back.data_ptr(), true), current_stream(dy));
  quant::rms_norm_backward_sm90(op.norm(rotated_back.data_ptr()), current_stream(dy));
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_rotary(const Tensor& x, const Tensor& weight, double eps, const Tensor& cos,
                                                           const Tensor& sin, bool training) {
  const char* op = "rms_norm_rotary";
  RmsNormRotary args{};
  args.x = heads_of(x, op, "x");
  args.tables = tables_of(cos, sin, x, op);
  args.weight = head_weight(weight, x, op), args.weight_dtype = dtype_of(weight, op, "weight");
  EF_CHECK(eps >= 0, op, ": eps must not be negative, got ", eps);
  args.eps = static_cast<float>(eps);
  const int64_t rows = args.x.rows();
  Tensor y = empty(x.sizes(), x.scalar_type(), x), rstd = empty({training ? rows : 0}, ScalarType::Float, x);
  RowCast x_rows = empty_row_cast(rows, args.x.dim, x, training);
  args.y = y.data_ptr(), args.x_rows = x_rows.view;
  if (training) args.rstd = static_cast<float*>(rstd.data_ptr());
  if (rows > 0 && x.is_cpu()) rms_norm_rotary_cpu(args);
#ifdef EIGHTFOLD_WITH_CUDA
  if (rows > 0 && x.is_cuda()) {
    OnDeviceOf device(x);
    rms_norm_rotary_fits_sm90(args) ? rms_norm_rotary_sm90(args, current_stream(x)) : separately(args, x);
  }
#endif
  return {std::move(y), std::move(x_rows.codes), std::move(x_rows.scales), std::move(rstd)};
}

std::tuple<Tensor, Tensor> rms_norm_rotary_backward(const Tensor& dy, const Tensor& x_codes, const Tensor& x_scales, const Tensor& rstd,
                                                    const Tensor& weight, const Tensor& cos, const Tensor& sin) {
  const char* op = "rms_norm_rotary_backward";
  RmsNormRotaryBackward args{};
  args.dy = heads_of(dy, op, "dy");
  args.tables = tables_of(cos, sin, dy, op);
  args.weight = head_weight(weight, dy, op), args.weight_dtype = dtype_of(weight, op, "weight");
  const int64_t rows = args.dy.rows(), dim = args.dy.dim;
  args.x_codes = row_codes_in(x_codes, x_scales, rows, dim, dy, op, "x_codes", "x_scales");
  check_same_device(rstd, dy, op, "rstd");
  check_dtype(rstd, {ScalarType::Float}, op, "rstd");
  check_shape(rstd, {rows}, op, "rstd");
  check_contiguous(rstd, op, "rstd");
  Tensor dx = empty(dy.sizes(), dy.scalar_type(), dy), dweight = empty({dim}, ScalarType::Float, dy);
  const Tensor partials = empty({quant::backward_runs(rows, dim), dim}, ScalarType::Float, dy);
  args.rstd = static_cast<const float*>(rstd.data_ptr());
  args.dx = dx.data_ptr(), args.dweight = static_cast<float*>(dweight.data_ptr());
  args.partials = static_cast<float*>(partials.data_ptr());
  if (dy.is_cpu()) rms_norm_rotary_backward_cpu(args);
#ifdef EIGHTFOLD_WITH_CUDA
  if (dy.is_cuda()) {
    OnDeviceOf device(dy);
    rms_norm_rotary_backward_fits_sm90(args) ? rms_norm_rotary_backward_sm90(args, current_stream(dy)) : separately(args, dy);
  }
#endif
  return {std::move(dx), std::move(dweight)};
}

template <class Library>
void register_all(Library& m) {
  m.impl("rotary", EF_BOX(&rotary));
  m.impl("rotary_tables", EF_BOX(&rotary_tables));
  m.impl("rotary_backward_quantize", EF_BOX(&rotary_backward_quantize));
  m.impl("rms_norm_rotary", EF_BOX(&rms_norm_rotary));
  m.impl("rms_norm_rotary_backward", EF_BOX(&rms_norm_rotary_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { register_all(m); }

#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { register_all(m); }
#endif

}  // namespace eightfold::bindings
