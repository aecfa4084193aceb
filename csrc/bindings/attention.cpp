// attention, its backward pass, attention over pages, storing to them and what comes before, the rows of a step: checks, allocation,
// dispatch.
#include "attention/attention.h"

#include "attention/paged_rows.h"
#include "bindings/attention_checks.h"
#include "bindings/casts.h"

namespace eightfold::bindings {
namespace {

const int32_t* starts_of(const Tensor& starts, const Tensor& q, int64_t longest, const char* op) {
  check_rank(starts, 1, op, "starts");
  EF_CHECK(starts.size(0) >= 1, op, ": starts must have at least one element, got shape ", shape_of(starts));
  const int64_t least = std::min<int64_t>(1, q.size(0));
  EF_CHECK(longest >= least, op, ": longest must be at least ", least, " with ", q.size(0), " rows of q, got ", longest);
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
    check_sm90(*t, op, name);
  }
  check_sm90(q, op, "q"), check_sm90(k, op, "k"), check_sm90(v, op, "v");
  check_same_device(lse, q, op, "lse");
  check_dtype(lse, {ScalarType::Float}, op, "lse");
  check_shape(lse, {q.size(1), q.size(0)}, op, "lse");
  check_contiguous(lse, op, "lse");
  Tensor dq = empty(q.sizes(), q.scalar_type(), q), dk = empty(k.sizes(), k.scalar_type(), k), dv = empty(v.sizes(), v.scalar_type(), v);
  args.forward.out = rows_of(out);
  args.forward.lse = static_cast<float*>(lse.data_ptr());
  args.dout = rows_of(dout), args.dq = rows_of(dq), args.dk = rows_of(dk), args.dv = rows_of(dv);
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda()) {
    OnDeviceOf device(q);
    const Tensor workspace = empty({attention_backward_workspace_sm90(args.forward)}, ScalarType::Byte, q);
    attention_backward_sm90(args, workspace.data_ptr(), current_stream(q));
    return {std::move(dq), std::move(dk), std::move(dv)};
  }
#endif
  attention_backward_cpu(args);
  return {std::move(dq), std::move(dk), std::move(dv)};
}

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

// Checked, with an `out` still to come.
PagedAttention paged_of(const Tensor& q, const Pages& cache, const Tensor& pages, const Tensor& starts, const Tensor& lengths,
                        int64_t longest, double scale, bool causal, int64_t block, bool settled, const char* op) {
  check_rows(q, op, "q");
  check_dtype(q, {ScalarType::BFloat16, ScalarType::Float}, op, "q");
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
  args.k_pages = cache.k.data_ptr(), args.v_pages = cache.v.data_ptr();
  args.k_scales = data_of(cache.k_scales), args.v_scales = data_of(cache.v_scales);
  args.dtype = dtype_of(q, op, "q"), args.page_dtype = dtype_of(cache.k, op, "k_pages");
  args.tokens = q.size(0), args.heads = q.size(1), args.kv_heads = cache.kv_heads(), args.dim = q.size(2);
  args.page_count = cache.count(), args.page_size = cache.page_size();
  EF_CHECK(scale > 0, op, ": scale must be more than 0, got ", scale);
  args.scale = static_cast<float>(scale);
  args.block = mask_of(causal, block, op);
  args.settled = settled;
  args.q = rows_of(q);
  if (!q.is_cuda()) {
    check_pages(args, op);
    return args;
  }
  const int64_t size = args.page_size;
  EF_CHECK(size % 128 == 0 || 128 % size == 0, op, ": k_pages must have pages of 16, 32, 64 or a multiple of 128 keys on CUDA, got ", size);
  EF_CHECK(args.tokens == 0 || (args.most_pages > 0 && args.page_count > 0), op, ": pages and k_pages must not be empty, got shapes ",
           shape_of(pages), " and ", shape_of(cache.k));
  return args;
}

void run_paged(const PagedAttention& args, const Tensor& q) {
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda()) {
    OnDeviceOf device(q);
    const Tensor workspace = empty({paged_attention_workspace_sm90(args)}, ScalarType::Byte, q);
    paged_attention_sm90(args, workspace.data_ptr(), current_stream(q));
    return;
  }
#endif
  paged_attention_cpu(args);
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const std::optional<Tensor>& k_scales,
                       const std::optional<Tensor>& v_scales, const Tensor& pages, const Tensor& starts, const Tensor& lengths,
                       int64_t longest, double scale, bool causal, int64_t block, bool settled) {
  const Pages cache{k_pages, v_pages, k_scales, v_scales};
  PagedAttention args = paged_of(q, cache, pages, starts, lengths, longest, scale, causal, block, settled, "paged_attention");
  Tensor out = empty(q.sizes(), q.scalar_type(), q);
  args.out = rows_of(out);
  run_paged(args, q);
  return out;
}

std::tuple<Tensor, Tensor> paged_attention_quantize(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                                    const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                                                    const Tensor& pages, const Tensor& starts, const Tensor& lengths, int64_t longest,
                                                    double scale, bool causal, int64_t block, bool settled) {
  const char* op = "paged_attention_quantize";
  const Pages cache{k_pages, v_pages, k_scales, v_scales};
  PagedAttention args = paged_of(q, cache, pages, starts, lengths, longest, scale, causal, block, settled, op);
  EF_CHECK(args.dim == kGroup, op, ": q must have a last dimension of ", kGroup, ", a group of codes, got shape ", shape_of(q));
  RowCast rows = empty_row_cast(args.tokens, args.heads * args.dim, q);
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda() && paged_attention_gives_codes_sm90(args)) {
    args.codes = rows.view.codes, args.scales = rows.view.scales, args.scale_ld = rows.view.scale_ld;
    run_paged(args, q);
    return {std::move(rows.codes), std::move(rows.scales)};
  }
#endif
  Tensor out = empty(q.sizes(), q.scalar_type(), q);
  args.out = rows_of(out);
  run_paged(args, q);
  const quant::Input wide{out.data_ptr(), args.dtype, args.tokens, args.heads * args.dim, args.heads * args.dim};
#ifdef EIGHTFOLD_WITH_CUDA
  if (q.is_cuda()) {
    OnDeviceOf device(q);
    quant::quantize_sm90(wide, quant::Group::row128, rows.view, false, current_stream(q));
    return {std::move(rows.codes), std::move(rows.scales)};
  }
#endif
  quant::quantize_cpu(wide, quant::Group::row128, rows.view, false);
  return {std::move(rows.codes), std::move(rows.scales)};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> paged_next_rows_(const Tensor& positions, const Tensor& tokens, const Tensor& active,
                                                            const Tensor& pages, int64_t page_size) {
  const char* op = "paged_next_rows_";
  check_rank(positions, 1, op, "positions");
  check_rank(pages, 2, op, "pages");
  const int64_t rows = positions.size(0), width = pages.size(1);
  EF_CHECK(page_size >= 1, op, ": page_size must be at least 1, got ", page_size);
  Tensor ids = empty({rows}, ScalarType::Long, positions), at = empty({rows}, ScalarType::Long, positions);
  Tensor slots = empty({rows}, ScalarType::Long, positions), lengths = empty({rows}, ScalarType::Int, positions);
  const PagedRows args{const_cast<int64_t*>(integers<int64_t>(positions, positions, ScalarType::Long, {rows}, op, "positions")),
                       integers<int64_t>(tokens, positions, ScalarType::Long, {rows}, op, "tokens"),
                       integers<int32_t>(active, positions, ScalarType::Int, {rows}, op, "active"),
                       integers<int32_t>(pages, positions, ScalarType::Int, {rows, width}, op, "pages"),
                       rows,
                       width,
                       page_size,
                       static_cast<int64_t*>(ids.data_ptr()),
                       static_cast<int64_t*>(at.data_ptr()),
                       static_cast<int64_t*>(slots.data_ptr()),
                       static_cast<int32_t*>(lengths.data_ptr())};
#ifdef EIGHTFOLD_WITH_CUDA
  if (positions.is_cuda()) {
    OnDeviceOf device(positions);
    paged_next_rows_sm90(args, current_stream(positions));
  }
#endif
  if (positions.is_cpu()) {
    for (int64_t i = 0; i < rows; ++i)
      EF_CHECK(args.positions[i] >= 0 && args.positions[i] < width * page_size, op, ": positions must be from 0 to ", width * page_size - 1,
               ", got ", args.positions[i], " at ", i);
    paged_next_rows_cpu(args);
  }
  return {std::move(ids), std::move(at), std::move(slots), std::move(lengths)};
}

Tensor kv_round(const Tensor& x) {
  const char* op = "kv_round";
  check_rows(x, op, "x");
  check_dtype(x, {ScalarType::BFloat16, ScalarType::Float}, op, "x");
  check_sm90(x, op, "x");
  Tensor out = empty(x.sizes(), x.scalar_type(), x);
  const KvRound args{rows_of(x), rows_of(out), dtype_of(x, op, "x"), x.size(0), x.size(1), x.size(2)};
#ifdef EIGHTFOLD_WITH_CUDA
  if (x.is_cuda()) {
    OnDeviceOf device(x);
    kv_round_sm90(args, current_stream(x));
    return out;
  }
#endif
  kv_round_cpu(args);
  return out;
}

template <class Library>
void register_all(Library& m) {
  m.impl("attention", EF_BOX(&attention));
  m.impl("attention_backward", EF_BOX(&attention_backward));
  m.impl("paged_attention", EF_BOX(&paged_attention));
  m.impl("paged_attention_quantize", EF_BOX(&paged_attention_quantize));
  m.impl("paged_next_rows_", EF_BOX(&paged_next_rows_));
  m.impl("paged_store_", EF_BOX(&paged_store_));
  m.impl("rope_cache_write", EF_BOX(&rope_cache_write));
  m.impl("kv_round", EF_BOX(&kv_round));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { register_all(m); }

#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { register_all(m); }
#endif

}  // namespace eightfold::bindings
