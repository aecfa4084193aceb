// Checks that attention, attention over pages and block attention share.
#pragma once

#include "attention/attention.h"
#include "bindings/common.h"

namespace eightfold::bindings {

constexpr int64_t kMostDim = 256;

inline AttentionRows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

inline void check_rows(const Tensor& t, const char* op, const char* argument) {
  check_rank(t, 3, op, argument);
  if (t.numel() > 0) check_last_dim_contiguous(t, op, argument);  // gradients without elements come with strides of 0
}

inline void check_like(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape, const char* op, const char* argument) {
  check_same_device(t, like, op, argument);
  check_dtype(t, {like.scalar_type()}, op, argument);
  check_shape(t, shape, op, argument);
}

template <class T>
const T* integers(const Tensor& t, const Tensor& like, ScalarType type, std::initializer_list<int64_t> shape, const char* op,
                  const char* argument) {
  check_same_device(t, like, op, argument);
  check_dtype(t, {type}, op, argument);
  check_shape(t, shape, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<const T*>(t.data_ptr());
}

inline void check_heads(const Tensor& q, int64_t kv_heads, const char* op, const char* keys) {
  const int64_t heads = q.size(q.dim() - 2), dim = q.size(q.dim() - 1);
  EF_CHECK(kv_heads >= 1 && heads % kv_heads == 0, op, ": heads of q must be a multiple of heads of ", keys, ", got ", heads, " and ",
           kv_heads);
  EF_CHECK(dim >= 16 && dim <= kMostDim && dim % 8 == 0, op, ": q must have a last dimension of 16 to ", kMostDim,
           " that is a multiple of 8, got shape ", shape_of(q));
}

// What the sm_90a kernels do not take. Their copies are of 16 bytes, so every row of a head starts at a multiple of that.
inline void check_sm90(const Tensor& t, const char* op, const char* argument) {
  if (!t.is_cuda()) return;
  const int64_t dim = t.size(t.dim() - 1);
  EF_CHECK(t.scalar_type() != ScalarType::Float, op, ": ", argument, " must be bfloat16 on CUDA, got float32");
  EF_CHECK(dim == 64 || dim == 96 || dim == 128, op, ": ", argument, " must have a last dimension of 64, 96 or 128 on CUDA, got shape ",
           shape_of(t));
  check_aligned(t, 16, op, argument);
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    EF_CHECK(t.stride(i) % 8 == 0 || t.size(i) <= 1, op, ": ", argument, " must have strides that are multiples of 8 on CUDA, got shape ",
             shape_of(t), " with strides ", strides_of(t));
}

// What messages call the tensors of a cache.
struct PageNames {
  const char *k = "k_pages", *v = "v_pages", *both = "pages", *room = "pages of";
};

// The tensors that attention over pages and storing to them share.
struct Pages {
  const Tensor &k, &v;
  const std::optional<Tensor>&k_scales, &v_scales;
  PageNames names{};

  int64_t count() const { return k.size(0); }
  int64_t kv_heads() const { return k.size(1); }
  int64_t page_size() const { return k.size(2); }
  bool codes() const { return k.scalar_type() == ScalarType::Float8_e4m3fn; }

  // `rows`: the tensor whose dtype pages have, unless they are codes, and whose last dimension they share.
  void check(const Tensor& rows, const char* op) const {
    check_rank(k, 4, op, names.k);
    check_same_device(k, rows, op, names.k);
    check_dtype(k, {rows.scalar_type(), ScalarType::Float8_e4m3fn}, op, names.k);
    check_shape(k, {count(), kv_heads(), page_size(), rows.size(rows.dim() - 1)}, op, names.k);
    check_contiguous(k, op, names.k);
    EF_CHECK(page_size() >= 16 && page_size() % 16 == 0, op, ": ", names.k, " must have ", names.room, " a multiple of 16 keys, got shape ",
             shape_of(k));
    check_like(v, k, {count(), kv_heads(), page_size(), rows.size(rows.dim() - 1)}, op, names.v);
    check_contiguous(v, op, names.v);
    check_sm90(k, op, names.k), check_sm90(v, op, names.v);
    EF_CHECK(k.is_cpu() || count() * page_size() <= INT32_MAX, op, ": ", names.k,
             " must have room for less than 2^31 keys on CUDA, got shape ", shape_of(k));
    for (const auto& [scales, name] : {std::pair{&k_scales, "k_scales"}, {&v_scales, "v_scales"}}) {
      EF_CHECK(scales->has_value() == codes(), op, ": ", name, codes() ? " must be given" : " must be None", " where ", names.both, " are ",
               name_of(k.scalar_type()));
      if (!codes()) continue;
      check_same_device(**scales, rows, op, name);
      check_dtype(**scales, {ScalarType::Float}, op, name);
      check_shape(**scales, {count(), kv_heads(), page_size()}, op, name);
      check_contiguous(**scales, op, name);
      if (k.is_cuda()) check_aligned(**scales, 16, op, name);
    }
  }
};

inline float* data_of(const std::optional<Tensor>& t) { return t ? static_cast<float*>(t->data_ptr()) : nullptr; }

}  // namespace eightfold::bindings
