// cross_entropy: checks, allocation, dispatch.
#include "bindings/common.h"
#include "loss/cross_entropy.h"

namespace eightfold::bindings {
namespace {

// A float32 for each row of logits, or null.
const float* value_a_row(const std::optional<Tensor>& values, const Tensor& logits, const char* op, const char* name) {
  if (!values) return nullptr;
  check_same_device(*values, logits, op, name);
  check_dtype(*values, {ScalarType::Float}, op, name);
  check_shape(*values, {logits.size(0)}, op, name);
  check_contiguous(*values, op, name);
  return static_cast<const float*>(values->data_ptr());
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& labels, bool training, ScalarType grad_dtype,
                                         const std::optional<Tensor>& temperatures, const std::optional<Tensor>& grad_output) {
  const char* op = "cross_entropy";
  check_rank(logits, 2, op, "logits");
  check_dtype(logits, {ScalarType::Float}, op, "logits");
  check_last_dim_contiguous(logits, op, "logits");
  check_same_device(labels, logits, op, "labels");
  check_dtype(labels, {ScalarType::Long}, op, "labels");
  check_shape(labels, {logits.size(0)}, op, "labels");
  check_contiguous(labels, op, "labels");
  EF_CHECK(grad_dtype == ScalarType::BFloat16 || grad_dtype == ScalarType::Float, op, ": grad_dtype must be bfloat16 or float32, got ",
           name_of(grad_dtype));
  const float* temperature_of_row = value_a_row(temperatures, logits, op, "temperatures");
  const float* upstream_of_row = value_a_row(grad_output, logits, op, "grad_output");
  const int64_t rows = logits.size(0), cols = logits.size(1);
  EF_CHECK(cols > 0 || rows == 0, op, ": logits must have at least one column, got shape ", shape_of(logits));
  Tensor loss = empty({rows}, ScalarType::Float, logits);
  Tensor grad = training ? empty({rows, cols}, grad_dtype, logits) : empty({0, 0}, grad_dtype, logits);
  const CrossEntropy args{static_cast<const float*>(logits.data_ptr()),
                          rows,
                          cols,
                          logits.stride(0),
                          static_cast<const int64_t*>(labels.data_ptr()),
                          temperature_of_row,
                          upstream_of_row,
                          static_cast<float*>(loss.data_ptr()),
                          training ? grad.data_ptr() : nullptr,
                          grad_dtype == ScalarType::Float ? DType::f32 : DType::bf16};
#if EIGHTFOLD_WITH_CUDA
  if (logits.is_cuda()) {
    OnDeviceOf device(logits);
    cross_entropy_sm90(args, current_stream(logits));
    return {std::move(loss), std::move(grad)};
  }
#endif
  cross_entropy_cpu(args);
  return {std::move(loss), std::move(grad)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { m.impl("cross_entropy", EF_BOX(&cross_entropy)); }

#if EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { m.impl("cross_entropy", EF_BOX(&cross_entropy)); }
#endif

}  // namespace eightfold::bindings
