// block_attention: checks, allocation, dispatch.
#include "block_attention/block_attention.h"

#include "bindings/attention_checks.h"

namespace eightfold::bindings {
namespace {

// [sequences, rows, heads, dim] as rows one behind the other.
AttentionRows block_rows(const Tensor& t, const char* op, const char* argument) {
  const int64_t sequences = t.size(0), rows = t.size(1);
  EF_CHECK(sequences <= 1 || rows <= 1 || t.stride(0) == rows * t.stride(1), op, ": ", argument,
           " must have sequences and rows that lie as one dimension, got shape ", shape_of(t), " with strides ", strides_of(t));
  return {t.data_ptr(), rows > 1 ? t.stride(1) : t.stride(0), t.stride(2)};
}

// Values are read on the CPU alone.
void check_places(const BlockAttention& args, const char* op) {
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t at = args.at[s], length = args.lengths[s], room = args.cache.page_size;
    if (length == 0) continue;
    EF_CHECK(at >= 0, op, ": at must not be negative, got ", at, " for sequence ", s);
    EF_CHECK(length >= at + args.rows && length <= room, op, ": lengths must be 0 or between the end of the block (", at + args.rows,
             ") and the room of k_cache (", room, "), got ", length, " for sequence ", s);
  }
}

Tensor block_attention(const Tensor& q, const std::optional<Tensor>& k, const std::optional<Tensor>& v, const Tensor& k_cache,
                       const Tensor& v_cache, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                       const Tensor& at, const Tensor& lengths, double scale) {
  const char* op = "block_attention";
  check_rank(q, 4, op, "q");
  if (q.numel() > 0) check_last_dim_contiguous(q, op, "q");
  check_dtype(q, {ScalarType::BFloat16, ScalarType::Float}, op, "q");
  const int64_t sequences = q.size(0), rows = q.size(1);
  EF_CHECK(rows >= 1 && rows <= kMostBlockRows, op, ": q must have 1 to ", kMostBlockRows, " rows, got shape ", shape_of(q));
  const Pages cache{k_cache, v_cache, k_scales, v_scales, {"k_cache", "v_cache", "caches", "room for"}};
  cache.check(q, op);
  check_heads(q, cache.kv_heads(), op, "k_cache");
  check_shape(k_cache, {sequences, cache.kv_heads(), cache.page_size(), q.size(3)}, op, "k_cache");
  check_sm90(q, op, "q");
  BlockAttention args{};
  args.q = block_rows(q, op, "q");
  EF_CHECK(k.has_value() == v.has_value(), op, ": v must ", k ? "be given where k is" : "be None where k is");
  for (const auto& [t, to, name] : {std::tuple{&k, &args.cache.k, "k"}, {&v, &args.cache.v, "v"}}) {
    if (!*t) continue;
    check_rank(**t, 4, op, name);
    if ((*t)->numel() > 0) check_last_dim_contiguous(**t, op, name);
    check_like(**t, q, {sequences, rows, cache.kv_heads(), q.size(3)}, op, name);
    check_sm90(**t, op, name);
    *to = block_rows(**t, op, name);
  }
  args.cache.k_pages = k_cache.data_ptr(), args.cache.v_pages = v_cache.data_ptr();
  args.cache.k_scales = data_of(k_scales), args.cache.v_scales = data_of(v_scales);
  args.cache.dtype = dtype_of(q, op, "q"), args.cache.page_dtype = dtype_of(k_cache, op, "k_cache");
  args.cache.tokens = sequences * rows, args.cache.kv_heads = cache.kv_heads(), args.cache.dim = q.size(3);
  args.cache.page_count = sequences, args.cache.page_size = cache.page_size();
  args.at = integers<int32_t>(at, q, ScalarType::Int, {sequences}, op, "at");
  args.lengths = integers<int32_t>(lengths, q, ScalarType::Int, {sequences}, op, "lengths");
  args.sequences = sequences, args.rows = rows, args.heads = q.size(2);
  EF_CHECK(scale > 0, op, ": scale must be more than 0, got ", scale);
  args.scale = static_cast<float>(scale);
  Tensor out = empty(q.sizes(), q.scalar_type(), q);
  args.out = block_rows(out, op, "out");
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda()) {
    OnDeviceOf device(q);
    block_attention_sm90(args, current_stream(q));
    return out;
  }
#endif
  check_places(args, op);
  block_attention_cpu(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { m.impl("block_attention", EF_BOX(&block_attention)); }

#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { m.impl("block_attention", EF_BOX(&block_attention)); }
#endif

}  // namespace eightfold::bindings
