#include "bindings/common.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include "core/threads.h"

namespace eightfold::bindings {
namespace {

std::string joined(Dims values) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < values.count; ++i) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

// torch's pool, so that torch.set_num_threads and nested parallelism behave as users expect.
void torch_parallel(int64_t n, int64_t grain, RangeBody body, void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

[[maybe_unused]] const bool installed = (set_parallel_backend(torch_parallel), true);

using CurrentCudaStream = AOTITorchError (*)(int32_t, void**);

// libtorch_cuda is already loaded when a CUDA tensor exists; linking it would tie the library to CUDA builds of torch.
CurrentCudaStream find_current_cuda_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  return reinterpret_cast<CurrentCudaStream>(symbol);
}

constexpr int64_t kMaxDims = 16;

Tensor allocate(Dims sizes, const int64_t* strides, ScalarType type, const Tensor& like) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  AtenTensorHandle handle;
  const AOTITorchError error = aoti_torch_empty_strided(sizes.count, sizes.values, strides, shim_dtype_of(type), like.is_cpu() ? cpu : cuda,
                                                        like.get_device_index(), &handle);
  EF_CHECK(error == AOTI_TORCH_SUCCESS, "eightfold: out of memory? torch could not make a ", name_of(type), " tensor of shape ",
           joined(sizes), " on ", device_of(like), "; it has said why on standard error");
  return Tensor(handle);
}

}  // namespace

std::string shape_of(const Tensor& t) { return joined(t.sizes()); }
std::string strides_of(const Tensor& t) { return joined(t.strides()); }

std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

DType dtype_of(const Tensor& t, const char* op, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Float8_e4m3fn: return DType::e4m3;
    case ScalarType::Byte: return DType::u8;
    default: fail(op, ": ", argument, " has dtype ", name_of(t.scalar_type()), ", which no kernel takes");
  }
}

void check_rank(const Tensor& t, int64_t rank, const char* op, const char* argument) {
  EF_CHECK(t.dim() == rank, op, ": ", argument, " must have ", rank, " dimensions, got shape ", shape_of(t));
}

void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* op, const char* argument) {
  const auto dims = static_cast<int64_t>(shape.size());
  bool same = t.dim() == dims;
  for (int64_t i = 0; same && i < dims; ++i) same = t.size(i) == shape.begin()[i];
  EF_CHECK(same, op, ": ", argument, " must have shape ", joined({shape.begin(), dims}), ", got ", shape_of(t));
}

void check_dtype(const Tensor& t, std::initializer_list<ScalarType> allowed, const char* op, const char* argument) {
  for (ScalarType type : allowed)
    if (t.scalar_type() == type) return;
  std::string names;
  for (ScalarType type : allowed) names += std::string(names.empty() ? "" : " or ") + name_of(type);
  fail(op, ": ", argument, " must be ", names, ", got ", name_of(t.scalar_type()));
}

void check_same_device(const Tensor& t, const Tensor& like, const char* op, const char* argument) {
  bool same = t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index();
  EF_CHECK(same, op, ": ", argument, " is on ", device_of(t), " but the first argument is on ", device_of(like));
}

void check_contiguous(const Tensor& t, const char* op, const char* argument) {
  EF_CHECK(t.is_contiguous(), op, ": ", argument, " must be contiguous, got shape ", shape_of(t), " with strides ", strides_of(t));
}

void check_last_dim_contiguous(const Tensor& t, const char* op, const char* argument) {
  int64_t last = t.dim() - 1;
  bool ok = last >= 0 && (t.stride(last) == 1 || t.size(last) <= 1);
  EF_CHECK(ok, op, ": ", argument, " must have stride 1 in its last dimension, got shape ", shape_of(t), " with strides ", strides_of(t));
}

void check_aligned(const Tensor& t, int64_t bytes, const char* op, const char* argument) {
  auto address = reinterpret_cast<uintptr_t>(t.data_ptr());
  EF_CHECK(address % bytes == 0, op, ": ", argument, " must start at a multiple of ", bytes, " bytes, got an address ", address % bytes,
           " past one");
}

Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType type, const Tensor& like) {
  return allocate({sizes.begin(), static_cast<int64_t>(sizes.size())}, strides.begin(), type, like);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  return empty(Dims{sizes.begin(), static_cast<int64_t>(sizes.size())}, type, like);
}

Tensor empty(Dims sizes, ScalarType type, const Tensor& like) {
  EF_CHECK(sizes.count <= kMaxDims, "eightfold: a tensor has ", sizes.count, " dimensions; at most ", kMaxDims, " are supported");
  int64_t strides[kMaxDims], next = 1;
  for (int64_t i = sizes.count - 1; i >= 0; --i) {
    strides[i] = next;
    next *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return allocate(sizes, strides, type, like);
}

Tensor empty_row_scales(int64_t rows, int64_t cols, int64_t group_cols, const Tensor& like) {
  int64_t ld = round_up(rows > 0 ? rows : 1, 4);
  return empty_strided({rows, ceil_div(cols, group_cols)}, {1, ld}, ScalarType::Float, like);
}

Tensor empty_col_codes(int64_t rows, int64_t cols, const Tensor& like) {
  int64_t ld = round_up(rows > 0 ? rows : 1, 16);
  return empty_strided({rows, cols}, {1, ld}, ScalarType::Float8_e4m3fn, like);
}

Tensor empty_col_scales(int64_t rows, int64_t cols, const Tensor& like) {
  int64_t ld = round_up(cols > 0 ? cols : 1, 4);
  return empty_strided({ceil_div(rows, 128), cols}, {ld, 1}, ScalarType::Float, like);
}

OnDeviceOf::OnDeviceOf(const Tensor& t) {
  int32_t current = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&current));
  if (current != t.get_device_index()) guard_.emplace(t.get_device_index());
}

void* current_stream(const Tensor& t) {
  if (t.is_cpu()) return nullptr;
  static const CurrentCudaStream get = find_current_cuda_stream();
  EF_CHECK(get != nullptr, "eightfold: this torch has no CUDA stream to launch on (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return stream;
}

}  // namespace eightfold::bindings
