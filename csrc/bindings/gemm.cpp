// fp8_gemm, fp8_gemm_accumulate_ and gemm: every check of both devices, allocation, dispatch.
#include "bindings/gemm.h"

namespace eightfold::bindings {
namespace {

const uint8_t* codes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.data_ptr()); }

// Codes [rows, k], k contiguous, rows at multiples of 16 bytes.
void check_codes(const Tensor& t, const char* op, const char* argument) {
  check_rank(t, 2, op, argument);
  check_dtype(t, {ScalarType::Float8_e4m3fn}, op, argument);
  check_last_dim_contiguous(t, op, argument);
  EF_CHECK(t.size(0) <= 1 || t.size(1) == 0 || (t.stride(0) >= t.size(1) && t.stride(0) % 16 == 0), op, ": ", argument,
           " must have rows at a multiple of 16 bytes from each other, got shape ", shape_of(t), " with strides ", strides_of(t));
  check_aligned(t, 16, op, argument);
}

int64_t row_stride(const Tensor& t) { return t.size(0) > 1 && t.size(1) > 0 ? t.stride(0) : round_up(t.size(1) > 0 ? t.size(1) : 1, 16); }

// Scales [rows, groups] with rows contiguous and a leading dimension that is a multiple of 4 (layouts.py, groups (1, 128) and, transposed,
// (128, 1)).
void check_row_scales(const Tensor& t, int64_t rows, int64_t groups, const char* op, const char* argument) {
  check_shape(t, {rows, groups}, op, argument);
  bool rows_contiguous = rows <= 1 || t.stride(0) == 1;
  bool padded = groups <= 1 || (t.stride(1) >= rows && t.stride(1) % 4 == 0);
  EF_CHECK(rows_contiguous && padded, op, ": ", argument,
           " must have stride 1 along its rows and a multiple of 4 along its groups, got shape ", shape_of(t), " with strides ",
           strides_of(t));
}

int64_t group_stride(const Tensor& t) { return t.size(1) > 1 ? t.stride(1) : round_up(t.size(0) > 0 ? t.size(0) : 1, 4); }

}  // namespace

Fp8GemmArgs fp8_gemm_operands(const Tensor& a, const Tensor& a_scales, const Tensor& b, const Tensor& b_scales, int64_t b_group_rows,
                              const char* op, const OperandNames& names) {
  check_codes(a, op, names.a);
  check_codes(b, op, names.b);
  EF_CHECK(b_group_rows == 1 || b_group_rows == 128, op, ": b_group_rows must be 1 or 128, got ", b_group_rows);
  int64_t m = a.size(0), n = b.size(0), k = a.size(1), groups = ceil_div(k, 128);
  EF_CHECK(b.size(1) == k, op, ": ", names.a, " and ", names.b, " must have the same second dimension, got shapes ", shape_of(a), " and ",
           shape_of(b));
  EF_CHECK(b_group_rows == 1 || n % 16 == 0, op, ": ", names.b, " must have a multiple of 16 rows with b_group_rows 128, got shape ",
           shape_of(b));
  check_dtype(a_scales, {ScalarType::Float}, op, names.a_scales);
  check_dtype(b_scales, {ScalarType::Float}, op, names.b_scales);
  check_row_scales(a_scales, m, groups, op, names.a_scales);
  if (b_group_rows == 1) {
    check_row_scales(b_scales, n, groups, op, names.b_scales);
  } else {
    check_shape(b_scales, {ceil_div(n, 128), groups}, op, names.b_scales);
    check_contiguous(b_scales, op, names.b_scales);
  }
  check_aligned(a_scales, 16, op, names.a_scales);
  check_aligned(b_scales, b_group_rows == 1 ? 16 : 4, op, names.b_scales);
  check_same_device(a_scales, a, op, names.a_scales);
  check_same_device(b, a, op, names.b);
  check_same_device(b_scales, a, op, names.b_scales);
  Fp8GemmArgs args{};
  args.a = codes_of(a);
  args.a_scales = static_cast<const float*>(a_scales.data_ptr());
  args.b = codes_of(b);
  args.b_scales = static_cast<const float*>(b_scales.data_ptr());
  args.m = m;
  args.n = n;
  args.k = k;
  args.lda = row_stride(a);
  args.ldb = row_stride(b);
  args.ld_a_scales = group_stride(a_scales);
  args.ld_b_scales = b_group_rows == 1 ? group_stride(b_scales) : groups;
  args.b_group_rows = static_cast<int>(b_group_rows);
  return args;
}

namespace {

// Rows [rows, k], k contiguous, each starting at a multiple of 16 bytes.
void check_rows(const Tensor& t, int64_t elements_of_16_bytes, const char* op, const char* argument) {
  check_last_dim_contiguous(t, op, argument);
  EF_CHECK(t.size(0) <= 1 || t.size(1) == 0 || (t.stride(0) >= t.size(1) && t.stride(0) % elements_of_16_bytes == 0), op, ": ", argument,
           " must have rows at a multiple of 16 bytes from each other, got shape ", shape_of(t), " with strides ", strides_of(t));
  check_aligned(t, 16, op, argument);
}

}  // namespace

GemmArgs gemm_operands(const Tensor& a, const Tensor& b, const char* op, const OperandNames& names) {
  check_rank(a, 2, op, names.a);
  check_rank(b, 2, op, names.b);
  if (a.is_cuda())
    check_dtype(a, {ScalarType::BFloat16}, op, (std::string(names.a) + " (on CUDA)").c_str());
  else
    check_dtype(a, {ScalarType::BFloat16, ScalarType::Float}, op, names.a);
  EF_CHECK(b.scalar_type() == a.scalar_type(), op, ": ", names.b, " must have the dtype of ", names.a, ", ", name_of(a.scalar_type()),
           ", got ", name_of(b.scalar_type()));
  check_same_device(b, a, op, names.b);
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  EF_CHECK(b.size(1) == k, op, ": ", names.a, " and ", names.b, " must have the same second dimension, got shapes ", shape_of(a), " and ",
           shape_of(b));
  EF_CHECK(k % 8 == 0, op, ": the second dimension of ", names.a, " and ", names.b, " must be a multiple of 8, got ", k);
  EF_CHECK(n % 8 == 0, op, ": ", names.b, " must have a multiple of 8 rows, got shape ", shape_of(b));
  const int64_t unit = a.scalar_type() == ScalarType::Float ? 4 : 8;
  check_rows(a, unit, op, names.a);
  check_rows(b, unit, op, names.b);
  const auto stride = [](const Tensor& t) { return t.size(0) > 1 && t.size(1) > 0 ? t.stride(0) : t.size(1); };
  GemmArgs args{};
  args.a = a.data_ptr();
  args.b = b.data_ptr();
  args.type = dtype_of(a, op, names.a);
  args.m = m;
  args.n = n;
  args.k = k;
  args.lda = stride(a);
  args.ldb = stride(b);
  return args;
}

namespace {

void launch(const Fp8GemmArgs& args, const Tensor& a) {
  if (args.m == 0 || args.n == 0) return;
#if defined(EIGHTFOLD_WITH_CUDA)
  if (a.is_cuda()) {
    OnDeviceOf device(a);
    return fp8_gemm_sm90(args, current_stream(a));
  }
#endif
  fp8_gemm_cpu(args);
}

Tensor fp8_gemm(const Tensor& a, const Tensor& a_scales, const Tensor& b, const Tensor& b_scales, int64_t b_group_rows,
                const std::optional<Tensor>& bias, ScalarType out_dtype, bool settled) {
  const char* op = "fp8_gemm";
  Fp8GemmArgs args = fp8_gemm_operands(a, a_scales, b, b_scales, b_group_rows, op);
  args.settled = settled;
  EF_CHECK(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Float, op, ": out_dtype must be bfloat16 or float32, got ",
           name_of(out_dtype));
  if (bias) {
    check_dtype(*bias, {ScalarType::Float, ScalarType::BFloat16}, op, "bias");
    check_shape(*bias, {args.n}, op, "bias");
    check_contiguous(*bias, op, "bias");
    check_same_device(*bias, a, op, "bias");
    args.bias = bias->data_ptr();
    args.bias_type = dtype_of(*bias, op, "bias");
  }
  Tensor out = empty({args.m, args.n}, out_dtype, a);
  args.out = out.data_ptr();
  args.out_type = dtype_of(out, op, "out");
  args.ldo = args.n;
  launch(args, a);
  return out;
}

void fp8_gemm_accumulate_(const Tensor& out, const Tensor& a, const Tensor& a_scales, const Tensor& b, const Tensor& b_scales,
                          int64_t b_group_rows) {
  const char* op = "fp8_gemm_accumulate_";
  Fp8GemmArgs args = fp8_gemm_operands(a, a_scales, b, b_scales, b_group_rows, op);
  check_dtype(out, {ScalarType::Float, ScalarType::BFloat16}, op, "out");
  EF_CHECK(out.scalar_type() == ScalarType::Float || b_group_rows == 1, op, ": out must be float32 with b_group_rows ", b_group_rows,
           ", got ", name_of(out.scalar_type()));
  check_shape(out, {args.m, args.n}, op, "out");
  check_contiguous(out, op, "out");
  check_aligned(out, 16, op, "out");
  check_same_device(out, a, op, "out");
  args.out = out.data_ptr();
  args.out_type = dtype_of(out, op, "out");
  args.ldo = args.n;
  args.accumulate = true;
  launch(args, a);
}

Tensor gemm(const Tensor& a, const Tensor& b, ScalarType out_dtype) {
  const char* op = "gemm";
  GemmArgs args = gemm_operands(a, b, op);
  EF_CHECK(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Float, op, ": out_dtype must be float32 or bfloat16, got ",
           name_of(out_dtype));
  Tensor out = empty({args.m, args.n}, out_dtype, a);
  args.out = out.data_ptr();
  args.out_type = dtype_of(out, op, "out");
  args.ldo = args.n;
#if defined(EIGHTFOLD_WITH_CUDA)
  if (a.is_cuda()) {
    OnDeviceOf device(a);
    if (args.m > 0 && args.n > 0) gemm_sm90(args, current_stream(a));
    return out;
  }
#endif
  gemm_cpu(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) {
  m.impl("fp8_gemm", EF_BOX(&fp8_gemm));
  m.impl("fp8_gemm_accumulate_", EF_BOX(&fp8_gemm_accumulate_));
  m.impl("gemm", EF_BOX(&gemm));
}

#if defined(EIGHTFOLD_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) {
  m.impl("fp8_gemm", EF_BOX(&fp8_gemm));
  m.impl("fp8_gemm_accumulate_", EF_BOX(&fp8_gemm_accumulate_));
  m.impl("gemm", EF_BOX(&gemm));
}
#endif

}  // namespace eightfold::bindings
