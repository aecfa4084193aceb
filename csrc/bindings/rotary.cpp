// rotary and its backward pass fused with the casts: checks, allocation, dispatch.
#include "rotary/rotary.h"

#include "bindings/casts.h"
#include "rotary/rotary_backward.h"

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

template <class Library>
void register_all(Library& m) {
  m.impl("rotary", EF_BOX(&rotary));
  m.impl("rotary_backward_quantize", EF_BOX(&rotary_backward_quantize));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { register_all(m); }

#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { register_all(m); }
#endif

}  // namespace eightfold::bindings
