// Checks, allocation and dispatch of the casts alone.
#include "bindings/casts.h"
#include "quant/cast.h"

namespace eightfold::bindings {
namespace {

using quant::Group;
using Sizes = std::vector<int64_t>;

// Runs quant::name_cpu or, on the stream of the tensor's device, quant::name_sm90.
#ifdef EIGHTFOLD_WITH_CUDA
#define EF_RUN(name, tensor, ...)                              \
  do {                                                         \
    if ((tensor).is_cpu()) {                                   \
      quant::name##_cpu(__VA_ARGS__);                          \
    } else {                                                   \
      OnDeviceOf device(tensor);                               \
      quant::name##_sm90(__VA_ARGS__, current_stream(tensor)); \
    }                                                          \
  } while (0)
#else
#define EF_RUN(name, tensor, ...) quant::name##_cpu(__VA_ARGS__)
#endif

uint8_t* bytes_of(const Tensor& t) { return static_cast<uint8_t*>(t.data_ptr()); }
float* floats_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

std::string text_of(const Sizes& values) {
  std::string text;
  for (int64_t v : values) text += (text.empty() ? "(" : ", ") + std::to_string(v);
  return text.empty() ? "()" : text + ")";
}

Group group_of(const Sizes& group, const char* op) {
  if (group == Sizes{1, 128}) return Group::row128;
  if (group == Sizes{1, 16}) return Group::row16;
  if (group == Sizes{128, 1}) return Group::col128;
  if (group == Sizes{128, 128}) return Group::square;
  fail(op, ": group must be (1, 128), (128, 128), (128, 1) or (1, 16), got ", text_of(group));
}

quant::Input input_of(const Tensor& x, const char* op, const char* argument = "x") {
  check_dtype(x, {ScalarType::BFloat16, ScalarType::Float}, op, argument);
  check_rank(x, 2, op, argument);
  check_last_dim_contiguous(x, op, argument);
  return {x.data_ptr(), dtype_of(x, op, argument), x.size(0), x.size(1), x.stride(0)};
}

void check_codes(const Tensor& codes, const char* op) {
  check_dtype(codes, {ScalarType::Float8_e4m3fn}, op, "codes");
  check_rank(codes, 2, op, "codes");
}

// Fresh codes and scales of a [rows, cols] tensor, and the same for a kernel.
struct Output {
  Tensor codes, scales;
  quant::Quantized raw;
};

Output allocate(int64_t rows, int64_t cols, Group group, const Tensor& like) {
  auto made = [&](Tensor codes, Tensor scales) {
    const bool columns = group == Group::col128;
    quant::Quantized raw{bytes_of(codes), floats_of(scales), columns ? codes.stride(1) : cols,
                         group == Group::square ? 0 : scales.stride(columns ? 0 : 1)};
    return Output{std::move(codes), std::move(scales), raw};
  };
  if (group == Group::col128) return made(empty_col_codes(rows, cols, like), empty_col_scales(rows, cols, like));
  Tensor codes = empty({rows, cols}, ScalarType::Float8_e4m3fn, like);
  if (group == Group::square) return made(std::move(codes), empty({ceil_div(rows, 128), ceil_div(cols, 128)}, ScalarType::Float, like));
  return made(std::move(codes), empty_row_scales(rows, cols, group == Group::row128 ? 128 : 16, like));
}

std::tuple<Tensor, Tensor> quantize(const Tensor& x, Sizes group, bool power_of_two) {
  const Group kind = group_of(group, "quantize");
  const quant::Input in = input_of(x, "quantize");
  Output out = allocate(in.rows, in.cols, kind, x);
  EF_RUN(quantize, x, in, kind, out.raw, power_of_two);
  return {std::move(out.codes), std::move(out.scales)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_both(const Tensor& x, bool power_of_two) {
  const quant::Input in = input_of(x, "quantize_both");
  Output rows = allocate(in.rows, in.cols, Group::row128, x), cols = allocate(in.rows, in.cols, Group::col128, x);
  EF_RUN(quantize_both, x, in, rows.raw, cols.raw, power_of_two);
  return {std::move(rows.codes), std::move(rows.scales), std::move(cols.codes), std::move(cols.scales)};
}

// The tensors as one, along dimension `along`.
quant::Parts parts_of(const std::vector<Tensor>& xs, int along, const char* op) {
  EF_CHECK(!xs.empty() && xs.size() <= quant::kMostParts, op, ": xs must be 1 to ", quant::kMostParts, " tensors, got ", xs.size());
  quant::Parts parts{};
  parts.count = static_cast<int>(xs.size());
  int64_t reached = 0;
  for (int i = 0; i < parts.count; ++i) {
    const Tensor& x = xs[i];
    const std::string name = "xs[" + std::to_string(i) + "]";
    const quant::Input in = input_of(x, op, name.c_str());
    check_dtype(x, {xs[0].scalar_type()}, op, name.c_str());
    check_same_device(x, xs[0], op, name.c_str());
    EF_CHECK(x.size(1 - along) == xs[0].size(1 - along), op, ": ", name, " must have ", xs[0].size(1 - along),
             along == 0 ? " columns" : " rows", ", as the first, got shape ", shape_of(x));
    EF_CHECK(x.size(along) % 128 == 0 || i + 1 == parts.count, op, ": ", name, " must have a multiple of 128 ",
             along == 0 ? "rows" : "columns", ", as all but the last, got shape ", shape_of(x));
    parts.data[i] = in.data;
    parts.ld[i] = in.ld;
    parts.first[i] = reached;
    reached += x.size(along);
  }
  parts.dtype = dtype_of(xs[0], op, "xs[0]");
  parts.rows = along == 0 ? reached : xs[0].size(0);
  parts.cols = along == 0 ? xs[0].size(1) : reached;
  return parts;
}

std::tuple<Tensor, Tensor> quantize_stacked(const std::vector<Tensor>& xs, bool transposed) {
  const quant::Parts parts = parts_of(xs, 0, "quantize_stacked");
  const Tensor& like = xs[0];
  if (!transposed) {
    Output out = allocate(parts.rows, parts.cols, Group::square, like);
    EF_RUN(quantize_stacked, like, parts, out.raw, false);
    return {std::move(out.codes), std::move(out.scales)};
  }
  const int64_t ld = round_up(parts.rows > 0 ? parts.rows : 1, 16);
  Tensor codes = empty_strided({parts.cols, parts.rows}, {ld, 1}, ScalarType::Float8_e4m3fn, like);
  Tensor scales = empty({ceil_div(parts.cols, 128), ceil_div(parts.rows, 128)}, ScalarType::Float, like);
  EF_RUN(quantize_stacked, like, parts, (quant::Quantized{bytes_of(codes), floats_of(scales), ld, 0}), true);
  return {std::move(codes), std::move(scales)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_beside(const std::vector<Tensor>& xs, bool columns) {
  const quant::Parts parts = parts_of(xs, 1, "quantize_beside");
  const Tensor& like = xs[0];
  RowCast rows = empty_row_cast(parts.rows, parts.cols, like);
  ColCast cols = empty_col_cast(parts.rows, parts.cols, like, columns);
  EF_RUN(quantize_beside, like, parts, rows.view, cols.view);
  return {std::move(rows.codes), std::move(rows.scales), std::move(cols.codes), std::move(cols.scales)};
}

std::tuple<Tensor, Tensor> requantize(const Tensor& codes, const Tensor& scales, bool power_of_two) {
  const char* op = "requantize";
  check_codes(codes, op);
  check_last_dim_contiguous(codes, op, "codes");
  const int64_t rows = codes.size(0), cols = codes.size(1);
  check_dtype(scales, {ScalarType::Float}, op, "scales");
  check_same_device(scales, codes, op, "scales");
  check_shape(scales, {rows, ceil_div(cols, 128)}, op, "scales");
  EF_CHECK(scales.stride(0) == 1 || rows <= 1 || cols == 0, op, ": scales must have stride 1 in the first dimension, got shape ",
           shape_of(scales), " with strides ", strides_of(scales));
  Output out = allocate(rows, cols, Group::col128, codes);
  const quant::RowCodes in{bytes_of(codes), floats_of(scales), rows, cols, codes.stride(0), scales.stride(1)};
  EF_RUN(requantize, codes, in, out.raw, power_of_two);
  return {std::move(out.codes), std::move(out.scales)};
}

Tensor transpose_codes(const Tensor& codes) {
  check_codes(codes, "transpose_codes");
  check_last_dim_contiguous(codes, "transpose_codes", "codes");
  const int64_t rows = codes.size(0), cols = codes.size(1);
  Tensor out = empty({cols, rows}, ScalarType::Float8_e4m3fn, codes);
  EF_RUN(transpose_codes, codes, bytes_of(codes), rows, cols, codes.stride(0), bytes_of(out));
  return out;
}

Tensor dequantize(const Tensor& codes, const Tensor& scales, Sizes group, ScalarType dtype) {
  const char* op = "dequantize";
  check_codes(codes, op);
  EF_CHECK(group.size() == 2 && group[0] > 0 && group[1] > 0, op, ": group must be two positive sizes, got ", text_of(group));
  const int64_t rows = codes.size(0), cols = codes.size(1);
  const bool by_rows = codes.stride(1) == 1 || cols <= 1;
  EF_CHECK(by_rows || codes.stride(0) == 1 || rows <= 1, op, ": codes must have stride 1 in one dimension, got shape ", shape_of(codes),
           " with strides ", strides_of(codes));
  check_dtype(scales, {ScalarType::Float}, op, "scales");
  check_same_device(scales, codes, op, "scales");
  check_shape(scales, {ceil_div(rows, group[0]), ceil_div(cols, group[1])}, op, "scales");
  EF_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, op, ": dtype must be bfloat16 or float32, got ", name_of(dtype));
  Tensor out = empty({rows, cols}, dtype, codes);
  const quant::AnyCodes in{bytes_of(codes),
                           rows,
                           cols,
                           by_rows ? codes.stride(0) : 1,
                           by_rows ? 1 : codes.stride(1),
                           floats_of(scales),
                           group[0],
                           group[1],
                           scales.stride(0),
                           scales.stride(1)};
  EF_RUN(dequantize, codes, in, out.data_ptr(), dtype == ScalarType::Float ? DType::f32 : DType::bf16);
  return out;
}

template <class Library>
void register_all(Library& m) {
  m.impl("quantize", EF_BOX(&quantize));
  m.impl("quantize_both", EF_BOX(&quantize_both));
  m.impl("quantize_stacked", EF_BOX(&quantize_stacked));
  m.impl("quantize_beside", EF_BOX(&quantize_beside));
  m.impl("requantize", EF_BOX(&requantize));
  m.impl("transpose_codes", EF_BOX(&transpose_codes));
  m.impl("dequantize", EF_BOX(&dequantize));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eightfold, CPU, m) { register_all(m); }
#ifdef EIGHTFOLD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(eightfold, CUDA, m) { register_all(m); }
#endif

}  // namespace eightfold::bindings
