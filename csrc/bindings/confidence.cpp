// lm_head_confidence and uncover_: checks, allocation, dispatch.
#include <cmath>
#include <limits>

#include "bindings/gemm.h"
#include "confidence/lm_head_confidence.h"
#include "confidence/uncover.h"

namespace eightfold::bindings {
namespace {

// The elements of a contiguous tensor of that shape, on the device of `like`; null where there is none.
template <class T>
T* elements(const std::optional<Tensor>& t, ScalarType type, std::initializer_list<int64_t> shape, const Tensor& like, const char* op,
            const char* argument) {
  if (!t) return nullptr;
  check_same_device(*t, like, op, argument);
  check_dtype(*t, {type}, op, argument);
  check_shape(*t, shape, op, argument);
  check_contiguous(*t, op, argument);
  return static_cast<T*>(t->data_ptr());
}

template <class T>
T* elements(const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape, const Tensor& like, const char* op,
            const char* argument) {
  check_same_device(t, like, op, argument);
  check_dtype(t, {type}, op, argument);
  check_shape(t, shape, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<T*>(t.data_ptr());
}

// A list of ids, and how many they are.
const int64_t* id_list(const std::optional<Tensor>& t, const Tensor& like, const char* op, const char* argument, int64_t* count) {
  *count = 0;
  if (!t) return nullptr;
  check_rank(*t, 1, op, argument);
  *count = t->size(0);
  return elements<int64_t>(*t, ScalarType::Long, {*count}, like, op, argument);
}

std::tuple<Tensor, Tensor> lm_head_confidence(const Tensor& hidden, const std::optional<Tensor>& hidden_scales, const Tensor& weight,
                                              const std::optional<Tensor>& weight_scales, const std::optional<Tensor>& active,
                                              const std::optional<Tensor>& forbidden, const std::optional<Tensor>& temperatures,
                                              const std::optional<Tensor>& seeds, const std::optional<Tensor>& positions) {
  const char* op = "lm_head_confidence";
  const OperandNames names{"hidden", "hidden_scales", "weight", "weight_scales"};
  LmHeadConfidence args{};
  args.codes = hidden_scales.has_value();
  EF_CHECK(args.codes == weight_scales.has_value(), op, ": hidden_scales and weight_scales come together");
  if (args.codes) {
    args.quantized = fp8_gemm_operands(hidden, *hidden_scales, weight, *weight_scales, 128, op, names);
  } else {
    args.plain = gemm_operands(hidden, weight, op, names);
  }
  const int64_t rows = args.rows = hidden.size(0), vocabulary = args.vocabulary = weight.size(0);
  EF_CHECK(hidden.size(1) > 0, op, ": hidden must have columns, got shape ", shape_of(hidden));
  EF_CHECK(vocabulary > 0 && vocabulary <= kMaxVocabulary, op, ": weight must have from 1 to ", kMaxVocabulary, " rows, got shape ",
           shape_of(weight));
  args.active = elements<uint8_t>(active, ScalarType::Bool, {rows}, hidden, op, "active");
  args.forbidden = id_list(forbidden, hidden, op, "forbidden", &args.forbidden_count);
  EF_CHECK(args.forbidden_count < vocabulary, op, ": forbidden must have fewer ids than the vocabulary, ", vocabulary, ", got ",
           args.forbidden_count);
  EF_CHECK(temperatures.has_value() == seeds.has_value() && temperatures.has_value() == positions.has_value(), op,
           ": temperatures, seeds and positions come together");
  args.temperatures = elements<float>(temperatures, ScalarType::Float, {rows}, hidden, op, "temperatures");
  args.seeds = elements<int64_t>(seeds, ScalarType::Long, {rows}, hidden, op, "seeds");
  args.positions = elements<int64_t>(positions, ScalarType::Long, {rows}, hidden, op, "positions");
  Tensor ids = empty({rows}, ScalarType::Long, hidden), confidence = empty({rows}, ScalarType::Float, hidden);
  args.ids = static_cast<int64_t*>(ids.data_ptr());
  args.confidence = static_cast<float*>(confidence.data_ptr());
#if defined(EIGHTFOLD_WITH_CUDA)
  if (hidden.is_cuda()) {
    OnDeviceOf device(hidden);
    const Tensor workspace = empty({ceil_div(lm_head_confidence_workspace(args), 4)}, ScalarType::Float, hidden);
    args.workspace = workspace.data_ptr();
    lm_head_confidence_sm90(args, current_stream(hidden));
    return {std::move(ids), std::move(confidence)};
  }
#endif
  for (int64_t i = 0; i < args.forbidden_count; ++i)
    EF_CHECK(args.forbidden[i] >= 0 && args.forbidden[i] < vocabulary, op, ": forbidden ids must be from 0 to ", vocabulary - 1, ", got ",
             args.forbidden[i]);
  lm_head_confidence_cpu(args);
  return {std::move(ids), std::move(confidence)};
}

void uncover_(const Tensor& tokens, const Tensor& at, const Tensor& ids, const Tensor& confidence, const Tensor& left, int64_t mask_id,
              std::optional<double> threshold, std::optional<double> factor, const std::optional<Tensor>& counts,
              const std::optional<Tensor>& eos_ids, const std::optional<Tensor>& ended, bool last_too) {
  const char* op = "uncover_";
  check_rank(tokens, 2, op, "tokens");
  check_dtype(tokens, {ScalarType::Long}, op, "tokens");
  check_last_dim_contiguous(tokens, op, "tokens");
  check_rank(ids, 2, op, "ids");
  Uncover args{};
  const int64_t batch = args.batch = tokens.size(0), rows = args.rows = ids.size(1);
  args.tokens = static_cast<int64_t*>(tokens.data_ptr());
  args.max_tokens = tokens.size(1);
  args.ld = tokens.stride(0);
  EF_CHECK(rows >= 1 && rows <= kUncoverRows && rows <= args.max_tokens, op, ": a block has from 1 to ", kUncoverRows,
           " tokens and fits its sequence, got ids of shape ", shape_of(ids), " and tokens of shape ", shape_of(tokens));
  EF_CHECK(batch <= 1 || args.ld >= args.max_tokens, op, ": rows of tokens must not overlap, got shape ", shape_of(tokens),
           " with strides ", strides_of(tokens));
  EF_CHECK(batch <= INT32_MAX, op, ": tokens must have fewer than 2^31 rows, got shape ", shape_of(tokens));
  args.at = elements<int32_t>(at, ScalarType::Int, {batch}, tokens, op, "at");
  args.ids = elements<int64_t>(ids, ScalarType::Long, {batch, rows}, tokens, op, "ids");
  args.confidence = elements<float>(confidence, ScalarType::Float, {batch, rows}, tokens, op, "confidence");
  args.left = elements<int32_t>(left, ScalarType::Int, {batch}, tokens, op, "left");
  args.counts = elements<int32_t>(counts, ScalarType::Int, {batch}, tokens, op, "counts");
  args.eos_ids = id_list(eos_ids, tokens, op, "eos_ids", &args.eos_count);
  args.ended = elements<int32_t>(ended, ScalarType::Int, {batch}, tokens, op, "ended");
  EF_CHECK(eos_ids.has_value() == ended.has_value(), op, ": eos_ids and ended come together");
  EF_CHECK(threshold.has_value() + factor.has_value() + counts.has_value() == 1, op,
           ": exactly one of threshold, factor and counts is given");
  EF_CHECK(!threshold || (*threshold > 0.0 && *threshold <= 1.0), op, ": threshold must be above 0 and at most 1, got ", *threshold);
  EF_CHECK(!factor || (*factor > 0.0 && std::isfinite(*factor)), op, ": factor must be above 0 and finite, got ", *factor);
  EF_CHECK(!last_too || factor, op, ": last_too belongs to factor");
  args.mask_id = mask_id;
  args.last_too = last_too;
  for (int64_t n = 1; n <= kUncoverRows; ++n)
    args.bounds[n - 1] = threshold ? static_cast<float>(*threshold)
                         : factor  ? static_cast<float>(1.0 - *factor / static_cast<double>(n + 1))
                                   : -std::numeric_limits<float>::infinity();
#if defined(EIGHTFOLD_WITH_CUDA)
  if (tokens.is_cuda()) {
    OnDeviceOf device(tokens);
    return uncover_sm90(args, current_stream(tokens));
  }
#endif
  for (int64_t b = 0; b < batch; ++b)
    EF_CHECK(args.at[b] >= 0 && args.at[b] + rows <= args.max_tokens, op, ": at must be from 0 to ", args.max_tokens - rows, ", got ",
             args.at[b], " for sequence ", b);
  uncover_cpu(args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) {
  m.impl("lm_head_confidence", EF_BOX(&lm_head_confidence));
  m.impl("uncover_", EF_BOX(&uncover_));
}

#if defined(EIGHTFOLD_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) {
  m.impl("lm_head_confidence", EF_BOX(&lm_head_confidence));
  m.impl("uncover_", EF_BOX(&uncover_));
}
#endif

}  // namespace eightfold::bindings
