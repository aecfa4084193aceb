// Tensors as the bindings see them, and the calling convention of ops. torch::stable::Tensor keeps its handle behind a shared
// pointer and asks libtorch for every size, and a dtype costs a chain of calls: on small shapes that was most of an op's host time.
// Here a handle has one owner and its metadata is read once. Only the stable C interface is used.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace eightfold::bindings {

using torch::headeronly::ScalarType;

ScalarType scalar_type_of(int32_t shim_dtype);  // Undefined for a dtype that no op takes
int32_t shim_dtype_of(ScalarType type);

struct Dims {
  const int64_t* values;
  int64_t count;
  int64_t operator[](int64_t i) const { return values[i]; }
};

// Owns its handle. The reads below see the tensor as it was when this object was made.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle);
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    data_ = other.data_, sizes_ = other.sizes_, strides_ = other.strides_, dim_ = other.dim_;
    type_ = other.type_, device_index_ = other.device_index_, device_ = other.device_;
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  void* data_ptr() const { return data_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  Dims sizes() const { return {sizes_, dim_}; }
  Dims strides() const { return {strides_, dim_}; }
  ScalarType scalar_type() const { return type_; }
  int32_t get_device_index() const { return device_index_; }
  bool is_cpu() const { return device_ == Device::cpu; }
  bool is_cuda() const { return device_ == Device::cuda; }

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim_; ++i) n *= sizes_[i];
    return n;
  }

  bool is_contiguous() const {  // as torch has it: strides of dimensions of size 1, and of empty tensors, do not count
    int64_t expected = 1;
    bool dense = true;
    for (int64_t i = dim_ - 1; i >= 0; --i) {
      if (sizes_[i] == 0) return true;
      if (sizes_[i] != 1) dense = dense && strides_[i] == expected;
      expected *= sizes_[i];
    }
    return dense;
  }

 private:
  enum class Device : uint8_t { cpu, cuda, other };
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;
  int64_t dim_ = 0;
  ScalarType type_ = ScalarType::Undefined;
  int32_t device_index_ = 0;
  Device device_ = Device::cpu;
};

// ---- boxing: an op's arguments and results as the 64-bit values that libtorch passes ----

template <class T>
struct Boxed {
  static_assert(std::is_arithmetic_v<T>);
  static T take(StableIValue value) {
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
  }
};

template <>
struct Boxed<ScalarType> {
  static ScalarType take(StableIValue value) { return scalar_type_of(Boxed<int32_t>::take(value)); }
};

template <>
struct Boxed<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
  static StableIValue give(Tensor& t) { return reinterpret_cast<StableIValue>(t.release()); }
};

template <class T>
struct Boxed<std::optional<T>> {  // a pointer to the value, ours to delete, or null
  static std::optional<T> take(StableIValue value) {
    auto* inner = reinterpret_cast<StableIValue*>(value);
    if (inner == nullptr) return std::nullopt;
    StableIValue held = *inner;
    delete inner;
    return Boxed<T>::take(held);
  }
};

template <class T>
struct Boxed<std::vector<T>> {  // a list, ours to delete
  static std::vector<T> take(StableIValue value) {
    auto list = reinterpret_cast<StableListHandle>(value);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    std::vector<T> result;
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      result.push_back(Boxed<T>::take(element));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    return result;
  }
};

inline void give(StableIValue* stack, Tensor result) { stack[0] = Boxed<Tensor>::give(result); }

template <class... T>
void give(StableIValue* stack, std::tuple<T...> results) {
  std::apply([&](auto&... result) { ((*stack++ = Boxed<Tensor>::give(result)), ...); }, results);
}

template <auto function>
struct Box;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Box<function> {
  static void call(StableIValue* stack, uint64_t, uint64_t) { call_with(stack, std::index_sequence_for<Arguments...>{}); }

 private:
  template <size_t... I>
  static void call_with(StableIValue* stack, std::index_sequence<I...>) {
    std::tuple<std::decay_t<Arguments>...> arguments{Boxed<std::decay_t<Arguments>>::take(stack[I])...};
    if constexpr (std::is_void_v<Result>) {
      std::apply([](auto&... a) { function(std::move(a)...); }, arguments);
    } else {
      give(stack, std::apply([](auto&... a) { return function(std::move(a)...); }, arguments));
    }
  }
};

}  // namespace eightfold::bindings

// The boxed form of a function, for a library's impl().
#define EF_BOX(function) (&::eightfold::bindings::Box<(function)>::call)
