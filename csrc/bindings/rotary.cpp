// rotary: checks, allocation, dispatch.
#include "rotary/rotary.h"

#include "bindings/common.h"

namespace eightfold::bindings {
namespace {

const float* table(const Tensor& t, const Tensor& x, const char* op, const char* argument) {
  check_same_device(t, x, op, argument);
  check_dtype(t, {ScalarType::Float}, op, argument);
  check_rank(t, 4, op, argument);
  const int64_t batch = t.size(0) == 1 ? 1 : x.size(0);
  check_shape(t, {batch, x.size(1), 1, x.size(3) / 2}, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<const float*>(t.data_ptr());
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const char* op = "rotary";
  check_rank(x, 4, op, "x");
  check_dtype(x, {ScalarType::BFloat16, ScalarType::Float}, op, "x");
  check_last_dim_contiguous(x, op, "x");
  EF_CHECK(x.size(3) % 2 == 0, op, ": x must have an even last dimension, got shape ", shape_of(x));
  Rotary args{};
  args.cos = table(cos, x, op, "cos");
  args.sin = table(sin, x, op, "sin");
  check_shape(sin, {cos.size(0), cos.size(1), 1, cos.size(3)}, op, "sin");
  Tensor y = empty(x.sizes(), x.scalar_type(), x);
  args.x = x.data_ptr();
  args.x_batch_stride = x.stride(0);
  args.x_token_stride = x.stride(1);
  args.x_head_stride = x.stride(2);
  args.y = y.data_ptr();
  args.dtype = dtype_of(x, op, "x");
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.heads = x.size(2);
  args.dim = x.size(3);
  args.table_batch_stride = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(3);
  args.inverse = inverse;
#if EIGHTFOLD_WITH_CUDA
  if (x.is_cuda()) {
    OnDeviceOf device(x);
    rotary_sm90(args, current_stream(x));
    return y;
  }
#endif
  rotary_cpu(args);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { m.impl("rotary", EF_BOX(&rotary)); }

#if EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { m.impl("rotary", EF_BOX(&rotary)); }
#endif

}  // namespace eightfold::bindings
