// attention, its backward pass, attention over pages, storing to them and what comes before: checks, allocation, dispatch.
#include "attention/attention.h"

#include "bindings/common.h"

namespace eightfold::bindings {
namespace {

constexpr int64_t kMostDim = 256;

AttentionRows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

void check_rows(const Tensor& t, const char* op, const char* argument) {
  check_rank(t, 3, op, argument);
  if (t.numel() > 0) check_last_dim_contiguous(t, op, argument);  // gradients without elements come with strides of 0
}

void check_like(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape, const char* op, const char* argument) {
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

void check_heads(const Tensor& q, int64_t kv_heads, const char* op, const char* keys) {
  const int64_t heads = q.size(1), dim = q.size(2);
  EF_CHECK(kv_heads >= 1 && heads % kv_heads == 0, op, ": heads of q must be a multiple of heads of ", keys, ", got ", heads, " and ",
           kv_heads);
  EF_CHECK(dim >= 16 && dim <= kMostDim && dim % 8 == 0, op, ": q must have a last dimension of 16 to ", kMostDim,
           " that is a multiple of 8, got shape ", shape_of(q));
}

// What the sm_90a kernels do not take. Their copies are of 16 bytes, so every row of a head starts at a multiple of that.
void check_sm90(const Tensor& t, const char* op, const char* argument) {
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

const int32_t* starts_of(const Tensor& starts, const Tensor& q, int64_t longest, const char* op) {
  check_rank(starts, 1, op, "starts");
  EF_CHECK(starts.size(0) >= 1, op, ": starts must have at least one element, got shape ", shape_of(starts));
  EF_CHECK(longest >= 0, op, ": longest must be at least 0, got ", longest);
  const auto* values = integers<int32_t>(starts, q, ScalarType::Int, {starts.size(0)}, op, "starts");
  if (!q.is_cpu()) return values;  // on CUDA values are not read before launch
  const int64_t sequences = starts.size(0) - 1;
  EF_CHECK(values[0] == 0, op, ": starts must begin with 0, got ", values[0]);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t rows = int64_t{values[s + 1]} - values[s];
    EF_CHECK(rows >= 0, op, ": starts must not fall, got ", values[s], " and then ", values[s + 1], " at ", s + 1);
    EF_CHECK(rows <= longest, op, ": longest must be at least the ", rows, " rows of sequence ", s, ", got ", longest);
  }
  EF_CHECK(values[sequences] == q.size(0), op, ": starts must end with the ", q.size(0), " rows of q, got ", values[sequences]);
  return values;
}

// The mask of an op: all see all, or each the keys of its block and of those before.
int64_t mask_of(bool causal, int64_t block, const char* op) {
  EF_CHECK(block >= 1 && block <= kMostBlock, op, ": block must be from 1 to ", kMostBlock, ", got ", block);
  EF_CHECK(causal || block == 1, op, ": block must be 1 where causal is false, got ", block);
  return causal ? block : kNoMask;
}

Attention forward_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, int64_t longest, double scale, bool causal,
                     int64_t block, const char* op) {
  check_rows(q, op, "q");
  check_dtype(q, {ScalarType::BFloat16, ScalarType::Float}, op, "q");
  check_rows(k, op, "k");
  check_heads(q, k.size(1), op, "k");
  check_like(k, q, {q.size(0), k.size(1), q.size(2)}, op, "k");
  check_rows(v, op, "v");
  check_like(v, q, {q.size(0), k.size(1), q.size(2)}, op, "v");
  Attention args{};
  args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
  args.dtype = dtype_of(q, op, "q");
  args.tokens = q.size(0), args.heads = q.size(1), args.kv_heads = k.size(1), args.dim = q.size(2);
  args.starts = starts_of(starts, q, longest, op);
  args.sequences = starts.size(0) - 1, args.longest = longest;
  EF_CHECK(scale > 0, op, ": scale must be more than 0, got ", scale);
  args.scale = static_cast<float>(scale);
  args.block = mask_of(causal, block, op);
  return args;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, int64_t longest, double scale,
                                     bool causal, int64_t block) {
  const char* op = "attention";
  Attention args = forward_of(q, k, v, starts, longest, scale, causal, block, op);
  check_sm90(q, op, "q"), check_sm90(k, op, "k"), check_sm90(v, op, "v");
  Tensor out = empty(q.sizes(), q.scalar_type(), q), lse = empty({args.heads, args.tokens}, ScalarType::Float, q);
  args.out = rows_of(out);
  args.lse = static_cast<float*>(lse.data_ptr());
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda()) {
    OnDeviceOf device(q);
    attention_sm90(args, current_stream(q));
    return {std::move(out), std::move(lse)};
  }
#endif
  attention_cpu(args);
  return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse, const Tensor& starts, int64_t longest,
                                                      double scale, bool causal, int64_t block) {
  const char* op = "attention_backward";
  AttentionBackward args{};
  args.forward = forward_of(q, k, v, starts, longest, scale, causal, block, op);
  for (const auto& [t, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    check_rows(*t, op, name);
    check_like(*t, q, {q.size(0), q.size(1), q.size(2)}, op, name);
  }
  check_same_device(lse, q, op, "lse");
  check_dtype(lse, {ScalarType::Float}, op, "lse");
  check_shape(lse, {q.size(1), q.size(0)}, op, "lse");
  check_contiguous(lse, op, "lse");
  Tensor dq = empty(q.sizes(), q.scalar_type(), q), dk = empty(k.sizes(), k.scalar_type(), k), dv = empty(v.sizes(), v.scalar_type(), v);
  args.forward.out = rows_of(out);
  args.forward.lse = static_cast<float*>(lse.data_ptr());
  args.dout = rows_of(dout), args.dq = rows_of(dq), args.dk = rows_of(dk), args.dv = rows_of(dv);
  attention_backward_cpu(args);
  return {std::move(dq), std::move(dk), std::move(dv)};
}

// The tensors that attention over pages and storing to them share.
struct Pages {
  const Tensor &k, &v;
  const std::optional<Tensor>&k_scales, &v_scales;

  int64_t count() const { return k.size(0); }
  int64_t kv_heads() const { return k.size(1); }
  int64_t page_size() const { return k.size(2); }
  bool codes() const { return k.scalar_type() == ScalarType::Float8_e4m3fn; }

  // `rows`: the tensor whose dtype pages have, unless they are codes, and whose last dimension they share.
  void check(const Tensor& rows, const char* op) const {
    check_rank(k, 4, op, "k_pages");
    check_same_device(k, rows, op, "k_pages");
    check_dtype(k, {rows.scalar_type(), ScalarType::Float8_e4m3fn}, op, "k_pages");
    check_shape(k, {count(), kv_heads(), page_size(), rows.size(2)}, op, "k_pages");
    check_contiguous(k, op, "k_pages");
    EF_CHECK(page_size() >= 16 && page_size() % 16 == 0, op, ": k_pages must have pages of a multiple of 16 keys, got shape ", shape_of(k));
    check_like(v, k, {count(), kv_heads(), page_size(), rows.size(2)}, op, "v_pages");
    check_contiguous(v, op, "v_pages");
    check_sm90(k, op, "k_pages"), check_sm90(v, op, "v_pages");
    EF_CHECK(k.is_cpu() || count() * page_size() <= INT32_MAX, op, ": k_pages must have room for less than 2^31 keys on CUDA, got shape ",
             shape_of(k));
    for (const auto& [scales, name] : {std::pair{&k_scales, "k_scales"}, {&v_scales, "v_scales"}}) {
      EF_CHECK(scales->has_value() == codes(), op, ": ", name, codes() ? " must be given" : " must be None", " where pages are ",
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

float* data_of(const std::optional<Tensor>& t) { return t ? static_cast<float*>(t->data_ptr()) : nullptr; }

// Every page that a sequence with rows needs exists.
void check_pages(const PagedAttention& args, const char* op) {
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t rows = args.starts[s + 1] - args.starts[s], length = args.lengths[s], room = args.most_pages * args.page_size;
    if (rows == 0) continue;
    EF_CHECK(length >= rows && length <= room, op, ": lengths must be between the rows of a sequence (", rows, ") and its room in pages (",
             room, "), got ", length, " for sequence ", s);
    for (int64_t p = 0; p < ceil_div(length, args.page_size); ++p) {
      const int64_t page = args.pages[s * args.most_pages + p];
      EF_CHECK(page >= 0 && page < args.page_count, op, ": pages must be from 0 to ", args.page_count - 1, ", got ", page, " at [", s, ", ",
               p, "]");
    }
  }
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const std::optional<Tensor>& k_scales,
                       const std::optional<Tensor>& v_scales, const Tensor& pages, const Tensor& starts, const Tensor& lengths,
                       int64_t longest, double scale, bool causal, int64_t block) {
  const char* op = "paged_attention";
  check_rows(q, op, "q");
  check_dtype(q, {ScalarType::BFloat16, ScalarType::Float}, op, "q");
  const Pages cache{k_pages, v_pages, k_scales, v_scales};
  cache.check(q, op);
  check_heads(q, cache.kv_heads(), op, "k_pages");
  check_sm90(q, op, "q");
  PagedAttention args{};
  args.starts = starts_of(starts, q, longest, op);
  args.sequences = starts.size(0) - 1, args.longest = longest;
  check_rank(pages, 2, op, "pages");
  args.pages = integers<int32_t>(pages, q, ScalarType::Int, {args.sequences, pages.size(1)}, op, "pages");
  args.most_pages = pages.size(1);
  args.lengths = integers<int32_t>(lengths, q, ScalarType::Int, {args.sequences}, op, "lengths");
  args.k_pages = k_pages.data_ptr(), args.v_pages = v_pages.data_ptr();
  args.k_scales = data_of(k_scales), args.v_scales = data_of(v_scales);
  args.dtype = dtype_of(q, op, "q"), args.page_dtype = dtype_of(k_pages, op, "k_pages");
  args.tokens = q.size(0), args.heads = q.size(1), args.kv_heads = cache.kv_heads(), args.dim = q.size(2);
  args.page_count = cache.count(), args.page_size = cache.page_size();
  EF_CHECK(scale > 0, op, ": scale must be more than 0, got ", scale);
  args.scale = static_cast<float>(scale);
  args.block = mask_of(causal, block, op);
  Tensor out = empty(q.sizes(), q.scalar_type(), q);
  args.q = rows_of(q), args.out = rows_of(out);
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda()) {
    const int64_t size = args.page_size;
    EF_CHECK(size % 128 == 0 || 128 % size == 0, op, ": k_pages must have pages of 16, 32, 64 or a multiple of 128 keys on CUDA, got ",
             size);
    OnDeviceOf device(q);
    const Tensor workspace = empty({paged_attention_workspace_sm90(args)}, ScalarType::Byte, q);
    paged_attention_sm90(args, workspace.data_ptr(), current_stream(q));
    return out;
  }
#endif
  check_pages(args, op);
  paged_attention_cpu(args);
  return out;
}

// Rows to store in pages. Slots are read on the CPU alone.
PagedStore store_of(const Tensor& k, const Tensor& v, const Pages& cache, const Tensor& slots, const char* op) {
  check_rows(k, op, "k");
  check_dtype(k, {ScalarType::BFloat16, ScalarType::Float}, op, "k");
  check_rows(v, op, "v");
  check_like(v, k, {k.size(0), k.size(1), k.size(2)}, op, "v");
  cache.check(k, op);
  check_shape(cache.k, {cache.count(), k.size(1), cache.page_size(), k.size(2)}, op, "k_pages");
  check_sm90(k, op, "k"), check_sm90(v, op, "v");
  PagedStore args{};
  args.slots = integers<int64_t>(slots, k, ScalarType::Long, {k.size(0)}, op, "slots");
  args.k = rows_of(k), args.v = rows_of(v);
  args.k_pages = cache.k.data_ptr(), args.v_pages = cache.v.data_ptr();
  args.k_scales = data_of(cache.k_scales), args.v_scales = data_of(cache.v_scales);
  args.dtype = dtype_of(k, op, "k"), args.page_dtype = dtype_of(cache.k, op, "k_pages");
  args.tokens = k.size(0), args.kv_heads = k.size(1), args.dim = k.size(2);
  args.page_count = cache.count(), args.page_size = cache.page_size();
  const int64_t room = args.page_count * args.page_size;
  for (int64_t i = 0; k.is_cpu() && i < args.tokens; ++i)
    EF_CHECK(args.slots[i] < room, op, ": slots must be below ", room, ", got ", args.slots[i], " at ", i);
  return args;
}

void paged_store_(const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages, const std::optional<Tensor>& k_scales,
                  const std::optional<Tensor>& v_scales, const Tensor& slots) {
  const PagedStore args = store_of(k, v, {k_pages, v_pages, k_scales, v_scales}, slots, "paged_store_");
#ifdef EIGHTFOLD_WITH_CUDA
  if (k.is_cuda()) {
    OnDeviceOf device(k);
    paged_store_sm90(args, current_stream(k));
    return;
  }
#endif
  paged_store_cpu(args);
}

// A dense operand of a row's norm or rotation; the kernel reads 16 bytes at a time.
const void* dense(const Tensor& t, const Tensor& q, std::initializer_list<ScalarType> types, std::initializer_list<int64_t> shape,
                  const char* op, const char* argument) {
  check_same_device(t, q, op, argument);
  check_dtype(t, types, op, argument);
  check_shape(t, shape, op, argument);
  check_contiguous(t, op, argument);
  if (t.is_cuda()) check_aligned(t, 16, op, argument);
  return t.data_ptr();
}

Tensor rope_cache_write(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, const Tensor& k_pages,
                        const Tensor& v_pages, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                        const Tensor& slots, const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, double eps) {
  const char* op = "rope_cache_write";
  check_rows(q, op, "q");
  check_dtype(q, {ScalarType::BFloat16, ScalarType::Float}, op, "q");
  EF_CHECK(q.size(2) % 2 == 0, op, ": q must have an even last dimension, got shape ", shape_of(q));
  check_sm90(q, op, "q");
  check_rank(k, 3, op, "k");
  check_like(k, q, {q.size(0), k.size(1), q.size(2)}, op, "k");
  RopeCacheWrite args{};
  args.store = store_of(k, v, {k_pages, v_pages, k_scales, v_scales}, slots, op);
  args.heads = q.size(1);
  args.cos = static_cast<const float*>(dense(cos, q, {ScalarType::Float}, {q.size(0), q.size(2) / 2}, op, "cos"));
  args.sin = static_cast<const float*>(dense(sin, q, {ScalarType::Float}, {q.size(0), q.size(2) / 2}, op, "sin"));
  EF_CHECK(q_weight.has_value() == k_weight.has_value(), op, ": k_weight must ",
           q_weight ? "be given where q_weight is" : "be None where q_weight is");
  if (q_weight) {
    args.q_weight = dense(*q_weight, q, {ScalarType::BFloat16, ScalarType::Float}, {q.size(2)}, op, "q_weight");
    args.k_weight = dense(*k_weight, q, {q_weight->scalar_type()}, {q.size(2)}, op, "k_weight");
    args.weight_dtype = dtype_of(*q_weight, op, "q_weight");
  }
  EF_CHECK(eps >= 0, op, ": eps must not be negative, got ", eps);
  args.eps = static_cast<float>(eps);
  Tensor out = empty(q.sizes(), q.scalar_type(), q);
  args.q = rows_of(q), args.out = rows_of(out);
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda()) {
    OnDeviceOf device(q);
    rope_cache_write_sm90(args, current_stream(q));
    return out;
  }
#endif
  rope_cache_write_cpu(args);
  return out;
}

template <class Library>
void register_all(Library& m) {
  m.impl("attention", EF_BOX(&attention));
  m.impl("paged_attention", EF_BOX(&paged_attention));
  m.impl("paged_store_", EF_BOX(&paged_store_));
  m.impl("rope_cache_write", EF_BOX(&rope_cache_write));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) {
  register_all(m);
  m.impl("attention_backward", EF_BOX(&attention_backward));
}

#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { register_all(m); }  // attention_backward: python/eightfold/ops/attention.py
#endif

}  // namespace eightfold::bindings
