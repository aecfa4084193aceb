// sample: checks, allocation, dispatch.
#include "sampling/sampling.h"

#include "bindings/common.h"

namespace eightfold::bindings {
namespace {

template <class T>
const T* of_rows(const Tensor& t, ScalarType type, const Tensor& logits, const char* op, const char* argument) {
  check_same_device(t, logits, op, argument);
  check_dtype(t, {type}, op, argument);
  check_shape(t, {logits.size(0)}, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<const T*>(t.data_ptr());
}

Tensor sample(const Tensor& logits, const Tensor& seeds, const Tensor& positions, const Tensor& temperatures, const Tensor& top_k,
              const Tensor& top_p) {
  const char* op = "sample";
  check_rank(logits, 2, op, "logits");
  check_dtype(logits, {ScalarType::Float}, op, "logits");
  check_last_dim_contiguous(logits, op, "logits");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  EF_CHECK((vocabulary > 0 && vocabulary <= kMaxVocabulary) || rows == 0, op, ": logits must have from 1 to ", kMaxVocabulary,
           " columns, got shape ", shape_of(logits));
  Tensor tokens = empty({rows}, ScalarType::Long, logits);
  const Sample args{static_cast<const float*>(logits.data_ptr()),
                    rows,
                    vocabulary,
                    logits.stride(0),
                    of_rows<int64_t>(seeds, ScalarType::Long, logits, op, "seeds"),
                    of_rows<int64_t>(positions, ScalarType::Long, logits, op, "positions"),
                    of_rows<float>(temperatures, ScalarType::Float, logits, op, "temperatures"),
                    of_rows<int32_t>(top_k, ScalarType::Int, logits, op, "top_k"),
                    of_rows<float>(top_p, ScalarType::Float, logits, op, "top_p"),
                    static_cast<int64_t*>(tokens.data_ptr())};
#if EIGHTFOLD_WITH_CUDA
  if (logits.is_cuda()) {
    OnDeviceOf device(logits);
    sample_sm90(args, current_stream(logits));
    return tokens;
  }
#endif
  sample_cpu(args);
  return tokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { m.impl("sample", EF_BOX(&sample)); }

#if EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { m.impl("sample", EF_BOX(&sample)); }
#endif

}  // namespace eightfold::bindings
