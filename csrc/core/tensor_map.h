// Tensor maps for the bulk copy engine (core/tma.cuh), encoded on the host. The driver's encoder is looked up through the
// runtime, so that nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "core/cuda_check.h"
#include "core/recent.h"

namespace eightfold {

struct TensorMap2d {
  const void* base;                     // 16-byte aligned
  int64_t inner, outer;                 // sizes in elements, inner contiguous; both > 0
  int64_t stride_bytes;                 // from one outer index to the next, a multiple of 16
  uint32_t box_inner, box_outer;        // at most 256 each; what lies outside the tensor is filled with zeros
  CUtensorMapDataType type;             // of an element
  int64_t element_bytes;                // of `type`
  CUtensorMapSwizzle swizzle;           // SWIZZLE_128B wants box_inner * element_bytes <= 128
  CUtensorMapL2promotion l2_promotion;  // how much of a line the cache fetches
};

inline CUtensorMap encode_tensor_map_now(const TensorMap2d& t) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
               "looking up cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
      throw std::runtime_error("eightfold: this CUDA driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer is needed");
    }
    return reinterpret_cast<Encode>(entry);
  }();

  // The stride of a single row is never used, and callers may leave anything there.
  const int64_t row_bytes = (t.inner * t.element_bytes + 15) / 16 * 16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(t.inner), static_cast<cuuint64_t>(t.outer)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(t.outer == 1 ? row_bytes : t.stride_bytes)};
  const cuuint32_t box[2] = {t.box_inner, t.box_outer};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  CUresult result = encode(&map, t.type, 2, const_cast<void*>(t.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle,
                           t.l2_promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("eightfold: cuTensorMapEncodeTiled failed with code " + std::to_string(static_cast<int>(result)) +
                             " for a tensor of " + std::to_string(t.outer) + " x " + std::to_string(t.inner) + " elements of " +
                             std::to_string(t.element_bytes) + " bytes, row stride " + std::to_string(t.stride_bytes) +
                             " bytes, address % 16 = " + std::to_string(reinterpret_cast<uintptr_t>(t.base) % 16));
  }
  return map;
}

// A map is a function of these arguments alone, whatever has become of the memory since, and a step brings the same ones again.
inline CUtensorMap encode_tensor_map(const TensorMap2d& t) {
  static thread_local Recent<6, CUtensorMap, 256> recent;
  const auto word = [](auto value) { return static_cast<uint64_t>(value); };
  const uint64_t options = word(t.type) | word(t.element_bytes) << 16 | word(t.swizzle) << 32 | word(t.l2_promotion) << 48;
  return recent.get({reinterpret_cast<uintptr_t>(t.base), word(t.inner), word(t.outer), word(t.stride_bytes),
                     word(t.box_inner) << 32 | t.box_outer, options},
                    [&] { return encode_tensor_map_now(t); });
}

}  // namespace eightfold
