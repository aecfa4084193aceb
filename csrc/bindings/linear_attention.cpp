// linear_attention, with its result cast or not, and its backward pass: checks, allocation, dispatch.
#include "linear_attention/linear_attention.h"

#include <cfloat>

#include "bindings/casts.h"

namespace eightfold::bindings {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;

HeadRows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
const float* data_of(const std::optional<Tensor>& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

// [batch, tokens, heads, dim], like q; copies of the kernels are of 16 bytes.
void check_rows(const Tensor& t, const Tensor& q, const char* op, const char* argument) {
  check_rank(t, 4, op, argument);
  check_same_device(t, q, op, argument);
  check_dtype(t, {q.scalar_type()}, op, argument);
  check_shape(t, {q.size(0), q.size(1), q.size(2), q.size(3)}, op, argument);
  if (t.numel() == 0) return;
  check_last_dim_contiguous(t, op, argument);
  if (!t.is_cuda()) return;
  EF_CHECK(t.scalar_type() == ScalarType::BFloat16, op, ": ", argument, " must be bfloat16 on CUDA, got float32");
  check_aligned(t, 16, op, argument);
  for (int64_t i = 0; i < 3; ++i)
    EF_CHECK(t.stride(i) % 8 == 0 || t.size(i) <= 1, op, ": ", argument, " must have strides that are multiples of 8 on CUDA, got shape ",
             shape_of(t), " with strides ", strides_of(t));
}

// A state or a normalizer.
void check_state(const Tensor& t, const Tensor& q, std::initializer_list<int64_t> shape, const char* op, const char* argument) {
  check_same_device(t, q, op, argument);
  check_dtype(t, {ScalarType::Float}, op, argument);
  check_shape(t, shape, op, argument);
  check_contiguous(t, op, argument);
  if (t.is_cuda() && t.numel() > 0) check_aligned(t, 16, op, argument);
}
void check_states(const Tensor& state, const Tensor& normalizer, const Tensor& q, const char* op, const char* name, const char* other) {
  check_state(state, q, {q.size(0), q.size(2), q.size(3), q.size(3)}, op, name);
  check_state(normalizer, q, {q.size(0), q.size(2), q.size(3)}, op, other);
}
// The same where both or neither are given.
void check_states(const std::optional<Tensor>& state, const std::optional<Tensor>& normalizer, const Tensor& q, const char* op,
                  const char* name, const char* other) {
  EF_CHECK(state.has_value() == normalizer.has_value(), op, ": ", other, state ? " must be given where " : " must be None where ", name,
           state ? " is" : " is None");
  if (state) check_states(*state, *normalizer, q, op, name, other);
}

LinearAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask, double eps,
                         const char* op) {
  check_rank(q, 4, op, "q");
  check_dtype(q, {ScalarType::BFloat16, ScalarType::Float}, op, "q");
  const int64_t dim = q.size(3);
  EF_CHECK(dim == 32 || dim == 64 || dim == 128, op, ": q must have a last dimension of 32, 64 or 128, got shape ", shape_of(q));
  check_rows(q, q, op, "q"), check_rows(k, q, op, "k"), check_rows(v, q, op, "v");
  EF_CHECK(q.is_cpu() || q.size(1) <= kMostTokens, op, ": q must have at most 2^30 tokens on CUDA, got shape ", shape_of(q));
  LinearAttention args{};
  args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
  args.dtype = dtype_of(q, op, "q");
  args.batch = q.size(0), args.tokens = q.size(1), args.heads = q.size(2), args.dim = dim;
  if (key_mask) {
    check_same_device(*key_mask, q, op, "key_mask");
    check_dtype(*key_mask, {ScalarType::Bool}, op, "key_mask");
    check_shape(*key_mask, {args.batch, args.tokens}, op, "key_mask");
    check_contiguous(*key_mask, op, "key_mask");
    args.key_mask = static_cast<const uint8_t*>(key_mask->data_ptr());
  }
  args.eps = static_cast<float>(eps);
  EF_CHECK(args.eps >= 1e-37f && args.eps <= FLT_MAX, op, ": eps must be from 1e-37 to 3.4e38, as float32 holds it, got ", eps);
  return args;
}

struct States {
  Tensor state, normalizer;
  explicit States(const Tensor& q)
      : state(empty({q.size(0), q.size(2), q.size(3), q.size(3)}, ScalarType::Float, q)),
        normalizer(empty({q.size(0), q.size(2), q.size(3)}, ScalarType::Float, q)) {}
  float* s() const { return static_cast<float*>(state.data_ptr()); }
  float* z() const { return static_cast<float*>(normalizer.data_ptr()); }
};

#ifdef EIGHTFOLD_WITH_CUDA
Tensor workspace_of(const LinearAttention& args, const Tensor& q) {
  return empty({linear_attention_workspace_sm90(args)}, ScalarType::Byte, q);
}
#endif

States forward(LinearAttention& args, const Tensor& q, const std::optional<Tensor>& state, const std::optional<Tensor>& normalizer,
               const char* op) {
  check_states(state, normalizer, q, op, "state", "normalizer");
  States made(q);
  args.state_in = data_of(state), args.normalizer_in = data_of(normalizer);
  args.state = made.s(), args.normalizer = made.z();
  if (args.batch == 0 || args.heads == 0) return made;
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda()) {
    OnDeviceOf device(q);
    const Tensor workspace = workspace_of(args, q);
    linear_attention_sm90(args, workspace.data_ptr(), current_stream(q));
    return made;
  }
#endif
  linear_attention_cpu(args);
  return made;
}

std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& state,
                                                    const std::optional<Tensor>& normalizer, double eps) {
  const char* op = "linear_attention";
  LinearAttention args = describe(q, k, v, key_mask, eps, op);
  Tensor out = empty(q.sizes(), q.scalar_type(), q);
  args.out = out.data_ptr();
  States made = forward(args, q, state, normalizer, op);
  return {std::move(out), std::move(made.state), std::move(made.normalizer)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_quantize(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                     const std::optional<Tensor>& key_mask,
                                                                     const std::optional<Tensor>& state,
                                                                     const std::optional<Tensor>& normalizer, double eps) {
  const char* op = "linear_attention_quantize";
  LinearAttention args = describe(q, k, v, key_mask, eps, op);
  RowCast cast = empty_row_cast(args.batch * args.tokens, args.heads * args.dim, q);
  args.codes = cast.view;
  States made = forward(args, q, state, normalizer, op);
  return {std::move(cast.codes), std::move(cast.scales), std::move(made.state), std::move(made.normalizer)};
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                             const Tensor& state_out, const Tensor& normalizer_out,
                                                             const std::optional<Tensor>& key_mask, const std::optional<Tensor>& dstate_out,
                                                             const std::optional<Tensor>& dnormalizer_out, double eps) {
  const char* op = "linear_attention_backward";
  LinearAttentionBackward args{};
  args.forward = describe(q, k, v, key_mask, eps, op);
  check_rows(dout, q, op, "dout");
  check_states(state_out, normalizer_out, q, op, "state_out", "normalizer_out");
  check_states(dstate_out, dnormalizer_out, q, op, "dstate_out", "dnormalizer_out");
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), dim = q.size(3);
  Tensor dqkv = empty({batch, tokens, 3, heads, dim}, q.scalar_type(), q);
  States made(q);
  args.forward.state = static_cast<float*>(state_out.data_ptr());
  args.forward.normalizer = static_cast<float*>(normalizer_out.data_ptr());
  args.dout = rows_of(dout);
  HeadRows* const parts[] = {&args.dq, &args.dk, &args.dv};
  for (int64_t i = 0; i < 3; ++i) {
    auto* data = static_cast<char*>(dqkv.data_ptr()) + i * heads * dim * (args.forward.dtype == DType::f32 ? 4 : 2);
    *parts[i] = {data, dqkv.stride(0), dqkv.stride(1), dqkv.stride(3)};
  }
  args.dstate_out = data_of(dstate_out), args.dnormalizer_out = data_of(dnormalizer_out);
  args.dstate = made.s(), args.dnormalizer = made.z();
  if (batch > 0 && heads > 0) {
#ifdef EIGHTFOLD_WITH_CUDA
    if (q.is_cuda()) {
      OnDeviceOf device(q);
      const Tensor workspace = workspace_of(args.forward, q);
      linear_attention_backward_sm90(args, workspace.data_ptr(), current_stream(q));
      return {std::move(dqkv), std::move(made.state), std::move(made.normalizer)};
    }
#endif
    linear_attention_backward_cpu(args);
  }
  return {std::move(dqkv), std::move(made.state), std::move(made.normalizer)};
}

template <class Library>
void register_all(Library& m) {
  m.impl("linear_attention", EF_BOX(&linear_attention));
  m.impl("linear_attention_quantize", EF_BOX(&linear_attention_quantize));
  m.impl("linear_attention_backward", EF_BOX(&linear_attention_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { register_all(m); }

#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { register_all(m); }
#endif

}  // namespace eightfold::bindings
