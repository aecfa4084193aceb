// layer_norm_modulate, alone, after a gated residual and with casts, and its backward pass: checks, allocation, dispatch.
#include "bindings/casts.h"
#include "quant/layer_norm_modulate.h"

namespace eightfold::bindings {
namespace {

using namespace quant;  // the kernels

void check_tokens(const Tensor& x, const char* op, const char* argument) {
  check_rank(x, 3, op, argument);
  check_dtype(x, {ScalarType::BFloat16, ScalarType::Float}, op, argument);
  check_contiguous(x, op, argument);
  EF_CHECK(x.is_cpu() || (x.size(2) % 8 == 0 && x.size(2) <= kMaxModulateCols), op, ": ", argument, " has ", x.size(2),
           " features; the CUDA kernel takes multiples of 8 up to ", kMaxModulateCols);
}

void check_like(const Tensor& t, const Tensor& x, const char* op, const char* argument) {
  check_same_device(t, x, op, argument);
  check_dtype(t, {x.scalar_type()}, op, argument);
  check_shape(t, {x.size(0), x.size(1), x.size(2)}, op, argument);
  check_contiguous(t, op, argument);
}

// A vector a sample: rows of any stride, as slices of one table [batch, 6, features] are.
SampleVectors vectors_of(const Tensor& t, const Tensor& x, ScalarType dtype, const char* op, const char* argument) {
  check_same_device(t, x, op, argument);
  check_dtype(t, {dtype}, op, argument);
  check_shape(t, {x.size(0), x.size(2)}, op, argument);
  check_last_dim_contiguous(t, op, argument);
  return {t.data_ptr(), t.stride(0)};
}

void check_statistic(const Tensor& t, const Tensor& x, const char* op, const char* argument) {
  check_same_device(t, x, op, argument);
  check_dtype(t, {ScalarType::Float}, op, argument);
  check_shape(t, {x.size(0), x.size(1)}, op, argument);
  check_contiguous(t, op, argument);
}

// The dtype of all vectors is scale's.
template <class Op>
void describe_input(Op& norm, const Tensor& x, const Tensor& scale, const char* op, const char* argument) {
  check_tokens(x, op, argument);
  check_dtype(scale, {ScalarType::BFloat16, ScalarType::Float}, op, "scale");
  norm.dtype = dtype_of(x, op, argument);
  norm.vector_dtype = dtype_of(scale, op, "scale");
  norm.samples = x.size(0);
  norm.tokens = x.size(1);
  norm.cols = x.size(2);
  norm.scale = vectors_of(scale, x, scale.scalar_type(), op, "scale");
}

LayerNormModulate describe(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps, const char* op) {
  LayerNormModulate norm{};
  describe_input(norm, x, scale, op, "x");
  EF_CHECK(eps >= 0, op, ": eps must not be negative, got ", eps);
  norm.x = x.data_ptr();
  norm.shift = vectors_of(shift, x, scale.scalar_type(), op, "shift");
  norm.eps = static_cast<float>(eps);
  return norm;
}

Tensor add_branch(LayerNormModulate& norm, const Tensor& x, const Tensor& branch, const std::optional<Tensor>& gate, const Tensor& scale,
                  const char* op) {
  check_like(branch, x, op, "branch");
  if (gate) norm.gate = vectors_of(*gate, x, scale.scalar_type(), op, "gate");
  Tensor r = empty(x.sizes(), x.scalar_type(), x);
  norm.branch = branch.data_ptr();
  norm.r = r.data_ptr();
  return r;
}

void run(const LayerNormModulate& norm, const Tensor& x, const char* op) {
  if (x.numel() == 0) return;
  if (x.is_cpu()) return layer_norm_modulate_cpu(norm);
#if EIGHTFOLD_WITH_CUDA
  OnDeviceOf device(x);
  layer_norm_modulate_sm90(norm, current_stream(x));
#else
  fail(op, ": this build has no CUDA kernels");
#endif
}

struct Statistics {
  Tensor mean, rstd;
};

Statistics add_statistics(LayerNormModulate& norm, const Tensor& x, bool training) {
  const int64_t samples = training ? x.size(0) : 0, tokens = training ? x.size(1) : 0;
  Statistics out{empty({samples, tokens}, ScalarType::Float, x), empty({samples, tokens}, ScalarType::Float, x)};
  if (training) {
    norm.mean = static_cast<float*>(out.mean.data_ptr());
    norm.rstd = static_cast<float*>(out.rstd.data_ptr());
  }
  return out;
}

struct Plain {
  Tensor y;
  Statistics statistics;
};

Plain normalise(LayerNormModulate& norm, const Tensor& x, bool training, const char* op) {
  Plain out{empty(x.sizes(), x.scalar_type(), x), add_statistics(norm, x, training)};
  norm.y = out.y.data_ptr();
  run(norm, x, op);
  return out;
}

struct Casts {
  RowCast rows;
  ColCast cols;
  Statistics statistics;
};

Casts normalise_and_cast(LayerNormModulate& norm, const Tensor& x, bool training, const char* op) {
  Casts out{empty_row_cast(norm.rows(), norm.cols, x), empty_col_cast(norm.rows(), norm.cols, x, training),
            add_statistics(norm, x, training)};
  norm.y_rows = out.rows.view;
  norm.y_cols = out.cols.view;
  run(norm, x, op);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps,
                                                       bool training) {
  const char* op = "layer_norm_modulate";
  LayerNormModulate norm = describe(x, scale, shift, eps, op);
  Plain out = normalise(norm, x, training, op);
  return {std::move(out.y), std::move(out.statistics.mean), std::move(out.statistics.rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_quantize(const Tensor& x, const Tensor& scale,
                                                                                        const Tensor& shift, double eps, bool training) {
  const char* op = "layer_norm_modulate_quantize";
  LayerNormModulate norm = describe(x, scale, shift, eps, op);
  Casts out = normalise_and_cast(norm, x, training, op);
  return {std::move(out.rows.codes),  std::move(out.rows.scales),     std::move(out.cols.codes),
          std::move(out.cols.scales), std::move(out.statistics.mean), std::move(out.statistics.rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm_modulate(const Tensor& x, const Tensor& branch,
                                                                              const std::optional<Tensor>& gate, const Tensor& scale,
                                                                              const Tensor& shift, double eps, bool training) {
  const char* op = "gated_residual_layer_norm_modulate";
  LayerNormModulate norm = describe(x, scale, shift, eps, op);
  Tensor r = add_branch(norm, x, branch, gate, scale, op);
  Plain out = normalise(norm, x, training, op);
  return {std::move(r), std::move(out.y), std::move(out.statistics.mean), std::move(out.statistics.rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm_modulate_quantize(
    const Tensor& x, const Tensor& branch, const std::optional<Tensor>& gate, const Tensor& scale, const Tensor& shift, double eps,
    bool training) {
  const char* op = "gated_residual_layer_norm_modulate_quantize";
  LayerNormModulate norm = describe(x, scale, shift, eps, op);
  Tensor r = add_branch(norm, x, branch, gate, scale, op);
  Casts out = normalise_and_cast(norm, x, training, op);
  return {std::move(r),
          std::move(out.rows.codes),
          std::move(out.rows.scales),
          std::move(out.cols.codes),
          std::move(out.cols.scales),
          std::move(out.statistics.mean),
          std::move(out.statistics.rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_backward(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                                                const Tensor& rstd, const Tensor& scale,
                                                                                const std::optional<Tensor>& residual_grad,
                                                                                const std::optional<Tensor>& branch,
                                                                                const std::optional<Tensor>& gate) {
  const char* op = "layer_norm_modulate_backward";
  LayerNormModulateBackward norm{};
  describe_input(norm, dy, scale, op, "dy");
  check_like(x, dy, op, "x");
  check_statistic(mean, dy, op, "mean");
  check_statistic(rstd, dy, op, "rstd");
  if (residual_grad) {
    check_like(*residual_grad, dy, op, "residual_grad");
    norm.residual_grad = residual_grad->data_ptr();
  }
  EF_CHECK(branch.has_value() == gate.has_value(), op, ": branch and gate come together, got ", branch ? "branch" : "gate", " alone");
  if (branch) {
    check_like(*branch, dy, op, "branch");
    norm.branch = branch->data_ptr();
    norm.gate = vectors_of(*gate, dy, scale.scalar_type(), op, "gate");
  }
  const int64_t samples = norm.samples, cols = norm.cols, runs = modulate_runs(norm.tokens);
  Tensor dx = empty(dy.sizes(), dy.scalar_type(), dy);
  Tensor dbranch = branch ? empty(dy.sizes(), dy.scalar_type(), dy) : empty({0, 0, 0}, dy.scalar_type(), dy);
  Tensor dgate = branch ? empty({samples, cols}, ScalarType::Float, dy) : nothing(2, ScalarType::Float, dy);
  Tensor dscale = empty({samples, cols}, ScalarType::Float, dy), dshift = empty({samples, cols}, ScalarType::Float, dy);
  norm.dy = dy.data_ptr();
  norm.x = x.data_ptr();
  norm.mean = static_cast<const float*>(mean.data_ptr());
  norm.rstd = static_cast<const float*>(rstd.data_ptr());
  norm.dx = dx.data_ptr();
  norm.dbranch = dbranch.data_ptr();
  norm.dgate = static_cast<float*>(dgate.data_ptr());
  norm.dscale = static_cast<float*>(dscale.data_ptr());
  norm.dshift = static_cast<float*>(dshift.data_ptr());
  Tensor partials = empty({samples, runs, norm.sums(), cols}, ScalarType::Float, dy);
  norm.partials = static_cast<float*>(partials.data_ptr());
  if (samples > 0 && cols > 0) {
    if (dy.is_cpu()) {
      layer_norm_modulate_backward_cpu(norm);
    } else {
#if EIGHTFOLD_WITH_CUDA
      OnDeviceOf device(dy);
      layer_norm_modulate_backward_sm90(norm, current_stream(dy));
#else
      fail(op, ": this build has no CUDA kernels");
#endif
    }
  }
  return {std::move(dx), std::move(dbranch), std::move(dgate), std::move(dscale), std::move(dshift)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) {
  m.impl("layer_norm_modulate", EF_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_quantize", EF_BOX(&layer_norm_modulate_quantize));
  m.impl("gated_residual_layer_norm_modulate", EF_BOX(&gated_residual_layer_norm_modulate));
  m.impl("gated_residual_layer_norm_modulate_quantize", EF_BOX(&gated_residual_layer_norm_modulate_quantize));
  m.impl("layer_norm_modulate_backward", EF_BOX(&layer_norm_modulate_backward));
}

#if EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) {
  m.impl("layer_norm_modulate", EF_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_quantize", EF_BOX(&layer_norm_modulate_quantize));
  m.impl("gated_residual_layer_norm_modulate", EF_BOX(&gated_residual_layer_norm_modulate));
  m.impl("gated_residual_layer_norm_modulate_quantize", EF_BOX(&gated_residual_layer_norm_modulate_quantize));
  m.impl("layer_norm_modulate_backward", EF_BOX(&layer_norm_modulate_backward));
}
#endif

}  // namespace eightfold::bindings
