// What every family's bindings share: argument checks that print values, strided allocation, the current CUDA stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/tensor.h"
#include "core/dtype.h"

namespace eightfold::bindings {

// Throws std::runtime_error("op: " + message) unless `condition`; the message is only built on failure.
#define EF_CHECK(condition, ...)                                \
  do {                                                          \
    if (!(condition)) ::eightfold::bindings::fail(__VA_ARGS__); \
  } while (0)

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& t);
std::string strides_of(const Tensor& t);
std::string device_of(const Tensor& t);
const char* name_of(ScalarType type);

DType dtype_of(const Tensor& t, const char* op, const char* argument);  // float32, bfloat16, float8_e4m3fn, uint8, ...

// Each names the op and the argument, and prints what was expected and what came.
void check_rank(const Tensor& t, int64_t rank, const char* op, const char* argument);
void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* op, const char* argument);
void check_dtype(const Tensor& t, std::initializer_list<ScalarType> allowed, const char* op, const char* argument);
void check_same_device(const Tensor& t, const Tensor& like, const char* op, const char* argument);
void check_contiguous(const Tensor& t, const char* op, const char* argument);
void check_last_dim_contiguous(const Tensor& t, const char* op, const char* argument);
void check_aligned(const Tensor& t, int64_t bytes, const char* op, const char* argument);

Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType type, const Tensor& like);
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like);  // row-major
Tensor empty(Dims sizes, ScalarType type, const Tensor& like);

// The memory layouts of DESIGN "Numbers": logical shape = ceil(shape / group); python/eightfold/ops/layouts.py says the same.
Tensor empty_row_scales(int64_t rows, int64_t cols, int64_t group_cols,
                        const Tensor& like);                              // [rows, ceil(cols/g)], rows contiguous, ld % 4 == 0
Tensor empty_col_codes(int64_t rows, int64_t cols, const Tensor& like);   // [rows, cols], rows contiguous, ld % 16 == 0
Tensor empty_col_scales(int64_t rows, int64_t cols, const Tensor& like);  // [ceil(rows/128), cols], cols contiguous, ld % 4 == 0

// Makes the device of a CUDA tensor current for as long as it lives. Nearly always it is already.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t);

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// The stream torch is on for this tensor's device (0 for CPU tensors); opaque so that CPU-only builds need no CUDA headers.
void* current_stream(const Tensor& t);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace eightfold::bindings
