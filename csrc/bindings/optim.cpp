// optim: argument checks, allocation and dispatch of the ops with 8-bit states.
#include "bindings/common.h"
#include "optim/adamw_dre.h"
#include "optim/came8bit.h"
#include "optim/dre_states.h"

namespace eightfold::bindings {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMaxGroups = 2147483647;

int64_t groups_per_row(int64_t row_length) { return ceil_div(row_length, kDreGroup); }

int64_t rows_of(const Tensor& t, int64_t row_length, const char* op, const char* argument) {
  EF_CHECK(row_length >= 1, op, ": row_length must be at least 1, got ", row_length);
  EF_CHECK(t.numel() % row_length == 0, op, ": ", argument, " of shape ", shape_of(t), " does not split into rows of row_length ",
           row_length);
  int64_t rows = t.numel() / row_length;
  EF_CHECK(rows * groups_per_row(row_length) <= kMaxGroups, op, ": ", argument, " has more than ", kMaxGroups, " groups of 128");
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> dre_quantize(const Tensor& x, int64_t row_length) {
  constexpr const char* op = "dre_quantize";
  check_dtype(x, {ScalarType::Float, ScalarType::BFloat16}, op, "x");
  check_contiguous(x, op, "x");
  int64_t rows = rows_of(x, row_length, op, "x"), per_row = groups_per_row(row_length);
  Tensor codes = empty(x.sizes(), ScalarType::Float8_e4m3fn, x);
  Tensor maxima = empty({rows, per_row}, ScalarType::Float, x), exponents = empty({rows, per_row}, ScalarType::Byte, x);
  if (rows == 0) return {std::move(codes), std::move(maxima), std::move(exponents)};
  auto* codes_data = static_cast<uint8_t*>(codes.data_ptr());
  auto* maxima_data = static_cast<float*>(maxima.data_ptr());
  auto* exponents_data = static_cast<uint8_t*>(exponents.data_ptr());
  DType type = dtype_of(x, op, "x");
#ifdef EIGHTFOLD_WITH_CUDA
  if (x.is_cuda()) {
    OnDeviceOf device(x);
    dre_quantize_cuda(x.data_ptr(), type, rows, row_length, codes_data, maxima_data, exponents_data, current_stream(x));
    return {std::move(codes), std::move(maxima), std::move(exponents)};
  }
#endif
  dre_quantize_cpu(x.data_ptr(), type, rows, row_length, codes_data, maxima_data, exponents_data);
  return {std::move(codes), std::move(maxima), std::move(exponents)};
}

Tensor dre_dequantize(const Tensor& codes, const Tensor& maxima, const Tensor& exponents, int64_t row_length) {
  constexpr const char* op = "dre_dequantize";
  check_dtype(codes, {ScalarType::Float8_e4m3fn}, op, "codes");
  check_contiguous(codes, op, "codes");
  int64_t rows = rows_of(codes, row_length, op, "codes"), per_row = groups_per_row(row_length);
  check_dtype(maxima, {ScalarType::Float}, op, "maxima");
  check_dtype(exponents, {ScalarType::Byte}, op, "exponents");
  for (auto [t, name] : {std::pair(&maxima, "maxima"), std::pair(&exponents, "exponents")}) {
    check_shape(*t, {rows, per_row}, op, name);
    check_same_device(*t, codes, op, name);
    check_contiguous(*t, op, name);
  }
  Tensor out = empty(codes.sizes(), ScalarType::Float, codes);
  if (rows == 0) return out;
  auto* codes_data = static_cast<const uint8_t*>(codes.data_ptr());
  auto* maxima_data = static_cast<const float*>(maxima.data_ptr());
  auto* exponents_data = static_cast<const uint8_t*>(exponents.data_ptr());
  auto* out_data = static_cast<float*>(out.data_ptr());
#ifdef EIGHTFOLD_WITH_CUDA
  if (codes.is_cuda()) {
    OnDeviceOf device(codes);
    dre_dequantize_cuda(codes_data, maxima_data, exponents_data, rows, row_length, out_data, current_stream(codes));
    return out;
  }
#endif
  dre_dequantize_cpu(codes_data, maxima_data, exponents_data, rows, row_length, out_data);
  return out;
}

constexpr const char* kAdamw = "adamw_dre_";
constexpr const char* kCame = "came8bit_";
constexpr ScalarType kF32 = ScalarType::Float, kBf16 = ScalarType::BFloat16, kU8 = ScalarType::Byte, kE4m3 = ScalarType::Float8_e4m3fn;

// Checks of an op over lists: all that belongs to params[0]'s device.
struct Lists {
  const char* op;
  size_t count;
  const Tensor& like;
  bool is_cpu = like.is_cpu();
  int32_t index = like.get_device_index();

  // Contiguous, `numel` elements, on that device, dtype one of two.
  void check(const Tensors& list, size_t i, const char* name, int64_t numel, ScalarType type, ScalarType other) const {
    const Tensor& t = list[i];
    const ScalarType own = t.scalar_type();
    bool typed = own == type || own == other;
    EF_CHECK(typed, op, ": ", name, "[", i, "] must be ", name_of(type), type == other ? "" : " or ", type == other ? "" : name_of(other),
             ", got ", name_of(t.scalar_type()));
    EF_CHECK(t.numel() == numel, op, ": ", name, "[", i, "] must have ", numel, " elements, got shape ", shape_of(t));
    EF_CHECK(t.is_contiguous(), op, ": ", name, "[", i, "] must be contiguous, got shape ", shape_of(t), " with strides ", strides_of(t));
    bool same = t.get_device_index() == index && t.is_cpu() == is_cpu;
    EF_CHECK(same, op, ": ", name, "[", i, "] is on ", device_of(t), " but params[0] is on ", device_of(like));
  }
  void check(const Tensors& list, size_t i, const char* name, int64_t numel, ScalarType type) const {
    check(list, i, name, numel, type, type);
  }

  const float* scalar(const Tensor& t, const char* name) const {
    check_dtype(t, {kF32}, op, name);
    EF_CHECK(t.numel() == 1, op, ": ", name, " must have one element, got shape ", shape_of(t));
    check_same_device(t, like, op, name);
    return static_cast<const float*>(t.data_ptr());
  }
};

void check_length(size_t length, size_t expected, const char* op, const char* name) {
  EF_CHECK(length == expected, op, ": ", name, " must have one entry for each of the ", expected, " params, got ", length);
}

void check_beta(double beta, const char* op, const char* name) {
  EF_CHECK(beta >= 0 && beta < 1, op, ": ", name, " must be at least 0 and below 1, got ", beta);
}

template <class T>
T* data(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

void adamw_dre_(const Tensors& params, const Tensors& grads, const Tensors& masters, const Tensors& m_codes, const Tensors& m_maxima,
                const Tensors& m_exponents, const Tensors& v_codes, const Tensors& v_maxima, const Tensors& v_exponents,
                const std::vector<int64_t>& row_lengths, const std::vector<int64_t>& offsets, const Tensors& steps, const Tensor& lr,
                const std::optional<Tensor>& grad_scale, double beta1, double beta2, double eps, double weight_decay,
                bool stochastic_states, int64_t seed) {
  const size_t count = params.size();
  check_length(grads.size(), count, kAdamw, "grads");
  check_length(masters.size(), count, kAdamw, "masters");
  check_length(m_codes.size(), count, kAdamw, "m_codes");
  check_length(m_maxima.size(), count, kAdamw, "m_maxima");
  check_length(m_exponents.size(), count, kAdamw, "m_exponents");
  check_length(v_codes.size(), count, kAdamw, "v_codes");
  check_length(v_maxima.size(), count, kAdamw, "v_maxima");
  check_length(v_exponents.size(), count, kAdamw, "v_exponents");
  check_length(row_lengths.size(), count, kAdamw, "row_lengths");
  check_length(offsets.size(), count, kAdamw, "offsets");
  check_length(steps.size(), count, kAdamw, "steps");
  check_beta(beta1, kAdamw, "beta1");
  check_beta(beta2, kAdamw, "beta2");
  if (count == 0) return;

  const Tensor& like = params[0];
  const Lists lists{kAdamw, count, like};
  AdamwOptions options{lists.scalar(lr, "lr"),
                       grad_scale ? lists.scalar(*grad_scale, "grad_scale") : nullptr,
                       beta1,
                       beta2,
                       eps,
                       weight_decay,
                       stochastic_states,
                       static_cast<uint64_t>(seed)};
  std::vector<AdamwTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = params[i].numel(), row_length = row_lengths[i];
    EF_CHECK(row_length >= 1 && numel % row_length == 0, kAdamw, ": row_lengths[", i, "] = ", row_length,
             " must be at least 1 and divide the ", numel, " elements of params[", i, "]");
    EF_CHECK(offsets[i] >= 0, kAdamw, ": offsets[", i, "] must not be negative, got ", offsets[i]);
    const int64_t rows = numel / row_length, groups = rows * groups_per_row(row_length);
    EF_CHECK(groups <= kMaxGroups, kAdamw, ": params[", i, "] has more than ", kMaxGroups, " groups of 128");
    lists.check(params, i, "params", numel, kF32, kBf16);
    lists.check(grads, i, "grads", numel, kF32, kBf16);
    const bool mastered = masters[i].numel() != 0;
    if (mastered) lists.check(masters, i, "masters", numel, kF32);
    lists.check(m_codes, i, "m_codes", numel, kE4m3);
    lists.check(v_codes, i, "v_codes", numel, kE4m3);
    lists.check(m_maxima, i, "m_maxima", groups, kF32);
    lists.check(v_maxima, i, "v_maxima", groups, kF32);
    lists.check(m_exponents, i, "m_exponents", groups, kU8);
    lists.check(v_exponents, i, "v_exponents", groups, kU8);
    lists.check(steps, i, "steps", 1, kF32);
    if (numel == 0) continue;
    tensors.push_back({params[i].data_ptr(), grads[i].data_ptr(), mastered ? static_cast<float*>(masters[i].data_ptr()) : nullptr,
                       static_cast<uint8_t*>(m_codes[i].data_ptr()), static_cast<uint8_t*>(v_codes[i].data_ptr()),
                       static_cast<float*>(m_maxima[i].data_ptr()), static_cast<float*>(v_maxima[i].data_ptr()),
                       static_cast<uint8_t*>(m_exponents[i].data_ptr()), static_cast<uint8_t*>(v_exponents[i].data_ptr()),
                       static_cast<const float*>(steps[i].data_ptr()), rows, row_length, offsets[i],
                       params[i].scalar_type() == kF32 ? DType::f32 : DType::bf16,
                       grads[i].scalar_type() == kF32 ? DType::f32 : DType::bf16});
  }
  if (tensors.empty()) return;
#ifdef EIGHTFOLD_WITH_CUDA
  if (like.is_cuda()) {
    OnDeviceOf device(like);
    adamw_dre_cuda(tensors.data(), static_cast<int64_t>(tensors.size()), options, current_stream(like));
    return;
  }
#endif
  adamw_dre_cpu(tensors.data(), static_cast<int64_t>(tensors.size()), options);
}

void came8bit_(const Tensors& params, const Tensors& grads, const Tensors& m, const Tensors& m_scales, const Tensors& v_rows,
               const Tensors& v_cols, const Tensors& u_rows, const Tensors& u_cols, const std::vector<int64_t>& offsets,
               const Tensors& steps, const Tensor& lr, const std::optional<Tensor>& grad_scale, double beta1, double beta2, double beta3,
               double eps1, double eps2, double clip_threshold, double weight_decay, int64_t seed) {
  const size_t count = params.size();
  for (auto [list, name] :
       {std::pair(&grads, "grads"), std::pair(&m, "m"), std::pair(&m_scales, "m_scales"), std::pair(&v_rows, "v_rows"),
        std::pair(&v_cols, "v_cols"), std::pair(&u_rows, "u_rows"), std::pair(&u_cols, "u_cols"), std::pair(&steps, "steps")})
    check_length(list->size(), count, kCame, name);
  check_length(offsets.size(), count, kCame, "offsets");
  check_beta(beta1, kCame, "beta1");
  check_beta(beta2, kCame, "beta2");
  check_beta(beta3, kCame, "beta3");
  for (auto [value, name] : {std::pair(eps1, "eps1"), std::pair(eps2, "eps2"), std::pair(clip_threshold, "clip_threshold")})
    EF_CHECK(value >= 1e-36, kCame, ": ", name, " must be at least 1e-36, got ", value);
  if (count == 0) return;

  const Tensor& like = params[0];
  const Lists lists{kCame, count, like};
  CameOptions options{lists.scalar(lr, "lr"),
                      grad_scale ? lists.scalar(*grad_scale, "grad_scale") : nullptr,
                      beta1,
                      beta2,
                      beta3,
                      eps1,
                      eps2,
                      clip_threshold,
                      weight_decay,
                      static_cast<uint64_t>(seed)};
  std::vector<CameTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = params[i].numel(), cols = v_cols[i].numel(), rows = cols ? numel / cols : 0;
    EF_CHECK(offsets[i] >= 0, kCame, ": offsets[", i, "] must not be negative, got ", offsets[i]);
    EF_CHECK(cols == 0 || rows * cols == numel, kCame, ": v_cols[", i, "] must have no elements or a number that divides the ", numel,
             " of params[", i, "], got ", cols);
    EF_CHECK(rows < 0x7FFFFFFF && cols < 0x7FFFFFFF, kCame, ": params[", i, "] of ", rows, " rows and ", cols, " columns is too large");
    const bool quantized = m[i].scalar_type() == kU8;
    lists.check(params, i, "params", numel, kF32, kBf16);
    lists.check(grads, i, "grads", numel, kF32, kBf16);
    lists.check(m, i, "m", numel, kU8, kF32);
    lists.check(m_scales, i, "m_scales", quantized ? 2 * ceil_div(numel, kCameBlock) : 0, kF32);
    lists.check(v_rows, i, "v_rows", cols ? rows : numel, kF32);
    lists.check(v_cols, i, "v_cols", cols, kF32);
    lists.check(u_rows, i, "u_rows", rows, kF32);
    lists.check(u_cols, i, "u_cols", cols, kF32);
    lists.check(steps, i, "steps", 1, kF32);
    EF_CHECK(cols || !quantized || numel == 0, kCame, ": m[", i, "] must be float32 where v_cols[", i, "] has no elements, got uint8");
    if (numel == 0) continue;
    tensors.push_back({params[i].data_ptr(), grads[i].data_ptr(), m[i].data_ptr(), data<float>(m_scales[i]), data<float>(v_rows[i]),
                       data<float>(v_cols[i]), data<float>(u_rows[i]), data<float>(u_cols[i]),
                       static_cast<const float*>(steps[i].data_ptr()), cols ? rows : 1, cols ? cols : numel, offsets[i],
                       params[i].scalar_type() == kF32 ? DType::f32 : DType::bf16,
                       grads[i].scalar_type() == kF32 ? DType::f32 : DType::bf16});
  }
  if (tensors.empty()) return;
  const int64_t amount = static_cast<int64_t>(tensors.size());
#ifdef EIGHTFOLD_WITH_CUDA
  if (like.is_cuda()) {
    OnDeviceOf device(like);
    const CamePlan plan = came8bit_plan(tensors.data(), amount);
    Tensor scratch = empty({plan.scratch_floats}, kF32, like);
    came8bit_cuda(plan, options, static_cast<float*>(scratch.data_ptr()), current_stream(like));
    return;
  }
#endif
  came8bit_cpu(tensors.data(), amount, options);
}

}  // namespace
}  // namespace eightfold::bindings

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) {
  m.impl("dre_quantize", EF_BOX(&eightfold::bindings::dre_quantize));
  m.impl("dre_dequantize", EF_BOX(&eightfold::bindings::dre_dequantize));
  m.impl("adamw_dre_", EF_BOX(&eightfold::bindings::adamw_dre_));
  m.impl("came8bit_", EF_BOX(&eightfold::bindings::came8bit_));
}

#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) {
  m.impl("dre_quantize", EF_BOX(&eightfold::bindings::dre_quantize));
  m.impl("dre_dequantize", EF_BOX(&eightfold::bindings::dre_dequantize));
  m.impl("adamw_dre_", EF_BOX(&eightfold::bindings::adamw_dre_));
  m.impl("came8bit_", EF_BOX(&eightfold::bindings::came8bit_));
}
#endif
