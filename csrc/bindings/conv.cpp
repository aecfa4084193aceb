// depthwise_glu, depthwise_glu_quantize, depthwise_glu_backward, bias_silu, rms_norm_add: checks, allocation, dispatch.
#include "bindings/casts.h"
#include "conv/depthwise_glu.h"
#include "conv/pixels.h"

namespace eightfold::bindings {
namespace {

using namespace conv;  // the kernels

constexpr int64_t kTaps = 9;

// The CUDA kernels read 16 bytes at a time.
void check_image(const Tensor& t, int64_t channels, const char* op, const char* argument) {
  check_contiguous(t, op, argument);
  if (t.is_cpu()) {
    check_dtype(t, {ScalarType::BFloat16, ScalarType::Float}, op, argument);
    return;
  }
  check_dtype(t, {ScalarType::BFloat16}, op, argument);
  EF_CHECK(channels % 8 == 0, op, ": x must have a multiple of 16 channels on CUDA, got shape ", shape_of(t));
  if (t.numel() > 0) check_aligned(t, 16, op, argument);
}

Images images_of(const Tensor& x, const char* op) {
  check_rank(x, 4, op, "x");
  EF_CHECK(x.size(3) % 2 == 0, op, ": x must have an even number of channels, values before gates, got shape ", shape_of(x));
  check_image(x, x.size(3) / 2, op, "x");
  return {x.size(0), x.size(1), x.size(2), x.size(3) / 2};
}

DepthwiseWeights weights_of(const Tensor& weight, const Tensor& bias, const Tensor& x, const char* op) {
  const int64_t channels = x.size(3);
  check_same_device(weight, x, op, "weight");
  check_dtype(weight, {ScalarType::BFloat16, ScalarType::Float}, op, "weight");
  if (weight.dim() == 4)
    check_shape(weight, {channels, 1, 3, 3}, op, "weight");
  else
    check_shape(weight, {channels, 3, 3}, op, "weight");
  check_contiguous(weight, op, "weight");
  check_same_device(bias, x, op, "bias");
  check_dtype(bias, {ScalarType::BFloat16, ScalarType::Float}, op, "bias");
  check_shape(bias, {channels}, op, "bias");
  check_contiguous(bias, op, "bias");
  return {weight.data_ptr(), bias.data_ptr(), dtype_of(weight, op, "weight"), dtype_of(bias, op, "bias")};
}

DepthwiseGlu describe(const Tensor& x, const Tensor& weight, const Tensor& bias, const char* op) {
  const Images images = images_of(x, op);
  return {images, dtype_of(x, op, "x"), x.data_ptr(), weights_of(weight, bias, x, op), nullptr, {}};
}

void run(const DepthwiseGlu& glu, const Tensor& x, const char* op) {
  if (x.numel() == 0) return;
  if (x.is_cpu()) return depthwise_glu_cpu(glu);
#if EIGHTFOLD_WITH_CUDA
  OnDeviceOf device(x);
  depthwise_glu_sm90(glu, current_stream(x));
#else
  fail(op, ": this build has no CUDA kernels");
#endif
}

Tensor depthwise_glu(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  DepthwiseGlu glu = describe(x, weight, bias, "depthwise_glu");
  const Images& images = glu.images;
  Tensor y = empty({images.batch, images.height, images.width, images.channels}, x.scalar_type(), x);
  glu.y = y.data_ptr();
  run(glu, x, "depthwise_glu");
  return y;
}

std::tuple<Tensor, Tensor> depthwise_glu_quantize(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  DepthwiseGlu glu = describe(x, weight, bias, "depthwise_glu_quantize");
  RowCast y = empty_row_cast(glu.images.pixels(), glu.images.channels, x);
  glu.codes = y.view;
  run(glu, x, "depthwise_glu_quantize");
  return {std::move(y.codes), std::move(y.scales)};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_glu_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const char* op = "depthwise_glu_backward";
  const Images images = images_of(x, op);
  check_same_device(dy, x, op, "dy");
  check_dtype(dy, {x.scalar_type()}, op, "dy");
  check_shape(dy, {images.batch, images.height, images.width, images.channels}, op, "dy");
  check_image(dy, images.channels, op, "dy");
  const DepthwiseWeights weights = weights_of(weight, bias, x, op);
  const int64_t channels = 2 * images.channels;
  Tensor dx = empty(x.sizes(), x.scalar_type(), x), dweight = empty(weight.sizes(), ScalarType::Float, x),
         dbias = empty({channels}, ScalarType::Float, x);
  int64_t spans = 0;
  if (x.is_cpu()) {
    spans = depthwise_glu_spans_cpu(images);
  } else {
#if EIGHTFOLD_WITH_CUDA
    spans = depthwise_glu_spans_sm90(images);
#else
    fail(op, ": this build has no CUDA kernels");
#endif
  }
  Tensor partials = empty({spans, kTaps + 1, channels}, ScalarType::Float, x);
  const DepthwiseGluBackward glu = {images,
                                    dtype_of(x, op, "x"),
                                    dy.data_ptr(),
                                    x.data_ptr(),
                                    weights,
                                    dx.data_ptr(),
                                    static_cast<float*>(dweight.data_ptr()),
                                    static_cast<float*>(dbias.data_ptr()),
                                    static_cast<float*>(partials.data_ptr())};
  if (x.is_cpu()) {
    depthwise_glu_backward_cpu(glu);
  } else {
#if EIGHTFOLD_WITH_CUDA
    OnDeviceOf device(x);
    depthwise_glu_backward_sm90(glu, current_stream(x));
#endif
  }
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

// Pixels [..., channels] as they lie beside each other.
struct Pixels {
  int64_t rows, cols;
};

Pixels pixels_of(const Tensor& x, int64_t most, const char* op) {
  EF_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension, got shape ", shape_of(x));
  check_dtype(x, {ScalarType::BFloat16, ScalarType::Float}, op, "x");
  check_contiguous(x, op, "x");
  const int64_t cols = x.size(x.dim() - 1);
  if (x.is_cuda()) {
    EF_CHECK(cols % 8 == 0 && cols <= most, op, ": x must have a multiple of 8 channels up to ", most, " on CUDA, got shape ", shape_of(x));
    check_aligned(x, 16, op, "x");
  }
  return {cols == 0 ? 0 : x.numel() / cols, cols};
}

PixelVector vector_of(const Tensor& t, const Tensor& x, int64_t cols, std::initializer_list<ScalarType> types, const char* op,
                      const char* argument) {
  check_same_device(t, x, op, argument);
  check_dtype(t, types, op, argument);
  check_shape(t, {cols}, op, argument);
  check_contiguous(t, op, argument);
  if (t.is_cuda()) check_aligned(t, 16, op, argument);
  return {t.data_ptr(), dtype_of(t, op, argument)};
}

Tensor bias_silu(const Tensor& x, const Tensor& bias) {
  const char* op = "bias_silu";
  const Pixels pixels = pixels_of(x, std::numeric_limits<int64_t>::max(), op);
  Tensor y = empty(x.sizes(), x.scalar_type(), x);
  const BiasSilu args{x.data_ptr(),
                      dtype_of(x, op, "x"),
                      pixels.rows,
                      pixels.cols,
                      vector_of(bias, x, pixels.cols, {ScalarType::BFloat16, ScalarType::Float}, op, "bias"),
                      y.data_ptr()};
  if (x.is_cpu()) bias_silu_cpu(args);
#if EIGHTFOLD_WITH_CUDA
  if (x.is_cuda()) {
    OnDeviceOf device(x);
    bias_silu_sm90(args, current_stream(x));
  }
#endif
  return y;
}

Tensor rms_norm_add(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual, double eps) {
  const char* op = "rms_norm_add";
  const Pixels pixels = pixels_of(x, kMaxNormCols, op);
  check_same_device(residual, x, op, "residual");
  check_dtype(residual, {x.scalar_type()}, op, "residual");
  EF_CHECK(shape_of(residual) == shape_of(x), op, ": residual must have shape ", shape_of(x), ", got ", shape_of(residual));
  check_contiguous(residual, op, "residual");
  if (x.is_cuda()) check_aligned(residual, 16, op, "residual");
  EF_CHECK(eps >= 0, op, ": eps must not be negative, got ", eps);
  Tensor y = empty(x.sizes(), x.scalar_type(), x);
  const RmsNormAdd args{x.data_ptr(),
                        residual.data_ptr(),
                        dtype_of(x, op, "x"),
                        pixels.rows,
                        pixels.cols,
                        vector_of(weight, x, pixels.cols, {ScalarType::BFloat16, ScalarType::Float}, op, "weight"),
                        vector_of(bias, x, pixels.cols, {weight.scalar_type()}, op, "bias"),
                        static_cast<float>(eps),
                        y.data_ptr()};
  if (x.is_cpu()) rms_norm_add_cpu(args);
#if EIGHTFOLD_WITH_CUDA
  if (x.is_cuda()) {
    OnDeviceOf device(x);
    rms_norm_add_sm90(args, current_stream(x));
  }
#endif
  return y;
}

template <class Library>
void register_all(Library& m) {
  m.impl("depthwise_glu", EF_BOX(&depthwise_glu));
  m.impl("depthwise_glu_quantize", EF_BOX(&depthwise_glu_quantize));
  m.impl("depthwise_glu_backward", EF_BOX(&depthwise_glu_backward));
  m.impl("bias_silu", EF_BOX(&bias_silu));
  m.impl("rms_norm_add", EF_BOX(&rms_norm_add));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { register_all(m); }

#if EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { register_all(m); }
#endif

}  // namespace eightfold::bindings
