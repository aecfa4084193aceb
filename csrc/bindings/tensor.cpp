#include "bindings/tensor.h"

#include <array>

namespace eightfold::bindings {
namespace {

struct Named {
  ScalarType type;
  int32_t shim;
};

// What an op takes or a message names. libtorch's numbers are asked for, not assumed: they may differ from the headers'.
const auto kTypes = std::array{
    Named{ScalarType::Float, aoti_torch_dtype_float32()},
    Named{ScalarType::BFloat16, aoti_torch_dtype_bfloat16()},
    Named{ScalarType::Float8_e4m3fn, aoti_torch_dtype_float8_e4m3fn()},
    Named{ScalarType::Byte, aoti_torch_dtype_uint8()},
    Named{ScalarType::Half, aoti_torch_dtype_float16()},
    Named{ScalarType::Double, aoti_torch_dtype_float64()},
    Named{ScalarType::Float8_e5m2, aoti_torch_dtype_float8_e5m2()},
    Named{ScalarType::Int, aoti_torch_dtype_int32()},
    Named{ScalarType::Long, aoti_torch_dtype_int64()},
    Named{ScalarType::Bool, aoti_torch_dtype_bool()},
};

}  // namespace

ScalarType scalar_type_of(int32_t shim_dtype) {
  for (const Named& named : kTypes)
    if (named.shim == shim_dtype) return named.type;
  return ScalarType::Undefined;
}

int32_t shim_dtype_of(ScalarType type) {
  for (const Named& named : kTypes)
    if (named.type == type) return named.shim;
  throw std::runtime_error("eightfold: no op makes tensors of this dtype");
}

Tensor::Tensor(AtenTensorHandle handle) : handle_(handle) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  int64_t *sizes, *strides;
  int32_t dtype, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
  sizes_ = sizes;
  strides_ = strides;
  type_ = scalar_type_of(dtype);
  device_ = device == cpu ? Device::cpu : device == cuda ? Device::cuda : Device::other;
}

}  // namespace eightfold::bindings
