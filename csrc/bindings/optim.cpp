// optim: argument checks, allocation and dispatch of the ops with 8-bit states.
#include "bindings/common.h"
#include "optim/adamw_dre.h"
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

struct Place {
  const Tensor& like;
  bool is_cpu = like.is_cpu();
  int32_t index = like.get_device_index();
};

// Contiguous, `numel` elements, on the device of `place`, dtype one of two.
void check_entry(const Tensors& list, size_t i, const char* name, int64_t numel, const Place& place, ScalarType type, ScalarType other) {
  const Tensor& t = list[i];
  const ScalarType own = t.scalar_type();
  bool typed = own == type || own == other;
  EF_CHECK(typed, kAdamw, ": ", name, "[", i, "] must be ", name_of(type), type == other ? "" : " or ", type == other ? "" : name_of(other),
           ", got ", name_of(t.scalar_type()));
  EF_CHECK(t.numel() == numel, kAdamw, ": ", name, "[", i, "] must have ", numel, " elements, got shape ", shape_of(t));
  EF_CHECK(t.is_contiguous(), kAdamw, ": ", name, "[", i, "] must be contiguous, got shape ", shape_of(t), " with strides ", strides_of(t));
  bool same = t.get_device_index() == place.index && t.is_cpu() == place.is_cpu;
  EF_CHECK(same, kAdamw, ": ", name, "[", i, "] is on ", device_of(t), " but params[0] is on ", device_of(place.like));
}

void check_length(size_t length, size_t expected, const char* name) {
  EF_CHECK(length == expected, kAdamw, ": ", name, " must have one entry for each of the ", expected, " params, got ", length);
}

const float* scalar_data(const Tensor& t, const char* name, const Tensor& like) {
  check_dtype(t, {ScalarType::Float}, kAdamw, name);
  EF_CHECK(t.numel() == 1, kAdamw, ": ", name, " must have one element, got shape ", shape_of(t));
  check_same_device(t, like, kAdamw, name);
  return static_cast<const float*>(t.data_ptr());
}

void check_beta(double beta, const char* name) {
  EF_CHECK(beta >= 0 && beta < 1, kAdamw, ": ", name, " must be at least 0 and below 1, got ", beta);
}

void adamw_dre_(const Tensors& params, const Tensors& grads, const Tensors& masters, const Tensors& m_codes, const Tensors& m_maxima,
                const Tensors& m_exponents, const Tensors& v_codes, const Tensors& v_maxima, const Tensors& v_exponents,
                const std::vector<int64_t>& row_lengths, const std::vector<int64_t>& offsets, const Tensors& steps, const Tensor& lr,
                const std::optional<Tensor>& grad_scale, double beta1, double beta2, double eps, double weight_decay,
                bool stochastic_states, int64_t seed) {
  const size_t count = params.size();
  check_length(grads.size(), count, "grads");
  check_length(masters.size(), count, "masters");
  check_length(m_codes.size(), count, "m_codes");
  check_length(m_maxima.size(), count, "m_maxima");
  check_length(m_exponents.size(), count, "m_exponents");
  check_length(v_codes.size(), count, "v_codes");
  check_length(v_maxima.size(), count, "v_maxima");
  check_length(v_exponents.size(), count, "v_exponents");
  check_length(row_lengths.size(), count, "row_lengths");
  check_length(offsets.size(), count, "offsets");
  check_length(steps.size(), count, "steps");
  check_beta(beta1, "beta1");
  check_beta(beta2, "beta2");
  if (count == 0) return;

  const Tensor& like = params[0];
  AdamwOptions options{scalar_data(lr, "lr", like),
                       grad_scale ? scalar_data(*grad_scale, "grad_scale", like) : nullptr,
                       beta1,
                       beta2,
                       eps,
                       weight_decay,
                       stochastic_states,
                       static_cast<uint64_t>(seed)};
  std::vector<AdamwTensor> tensors;
  tensors.reserve(count);
  const Place place{like};
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = params[i].numel(), row_length = row_lengths[i];
    constexpr ScalarType f32 = ScalarType::Float, bf16 = ScalarType::BFloat16, u8 = ScalarType::Byte, e4m3 = ScalarType::Float8_e4m3fn;
    EF_CHECK(row_length >= 1 && numel % row_length == 0, kAdamw, ": row_lengths[", i, "] = ", row_length,
             " must be at least 1 and divide the ", numel, " elements of params[", i, "]");
    EF_CHECK(offsets[i] >= 0, kAdamw, ": offsets[", i, "] must not be negative, got ", offsets[i]);
    const int64_t rows = numel / row_length, groups = rows * groups_per_row(row_length);
    EF_CHECK(groups <= kMaxGroups, kAdamw, ": params[", i, "] has more than ", kMaxGroups, " groups of 128");
    check_entry(params, i, "params", numel, place, f32, bf16);
    check_entry(grads, i, "grads", numel, place, f32, bf16);
    const bool mastered = masters[i].numel() != 0;
    if (mastered) check_entry(masters, i, "masters", numel, place, f32, f32);
    check_entry(m_codes, i, "m_codes", numel, place, e4m3, e4m3);
    check_entry(v_codes, i, "v_codes", numel, place, e4m3, e4m3);
    check_entry(m_maxima, i, "m_maxima", groups, place, f32, f32);
    check_entry(v_maxima, i, "v_maxima", groups, place, f32, f32);
    check_entry(m_exponents, i, "m_exponents", groups, place, u8, u8);
    check_entry(v_exponents, i, "v_exponents", groups, place, u8, u8);
    check_entry(steps, i, "steps", 1, place, f32, f32);
    if (numel == 0) continue;
    tensors.push_back({params[i].data_ptr(), grads[i].data_ptr(), mastered ? static_cast<float*>(masters[i].data_ptr()) : nullptr,
                       static_cast<uint8_t*>(m_codes[i].data_ptr()), static_cast<uint8_t*>(v_codes[i].data_ptr()),
                       static_cast<float*>(m_maxima[i].data_ptr()), static_cast<float*>(v_maxima[i].data_ptr()),
                       static_cast<uint8_t*>(m_exponents[i].data_ptr()), static_cast<uint8_t*>(v_exponents[i].data_ptr()),
                       static_cast<const float*>(steps[i].data_ptr()), rows, row_length, offsets[i],
                       params[i].scalar_type() == f32 ? DType::f32 : DType::bf16,
                       grads[i].scalar_type() == f32 ? DType::f32 : DType::bf16});
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

}  // namespace
}  // namespace eightfold::bindings

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) {
  m.impl("dre_quantize", EF_BOX(&eightfold::bindings::dre_quantize));
  m.impl("dre_dequantize", EF_BOX(&eightfold::bindings::dre_dequantize));
  m.impl("adamw_dre_", EF_BOX(&eightfold::bindings::adamw_dre_));
}

#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) {
  m.impl("dre_quantize", EF_BOX(&eightfold::bindings::dre_quantize));
  m.impl("dre_dequantize", EF_BOX(&eightfold::bindings::dre_dequantize));
  m.impl("adamw_dre_", EF_BOX(&eightfold::bindings::adamw_dre_));
}
#endif
