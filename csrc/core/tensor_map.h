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

// Dimensions from the contiguous one on; unused ones have size, stride and box 0.
struct TensorMap {
  static constexpr int kMost = 5;
  const void* base;                     // 16-byte aligned
  int64_t sizes[kMost];                 // in elements, > 0
  int64_t strides[kMost];               // in bytes, multiples of 16, from one index of the dimension to the next; [0] is not used
  uint32_t box[kMost];                  // at most 256 each; what lies outside the tensor is filled with zeros
  CUtensorMapDataType type;             // of an element
  int64_t element_bytes;                // of `type`
  CUtensorMapSwizzle swizzle;           // SWIZZLE_128B wants box[0] * element_bytes <= 128
  CUtensorMapL2promotion l2_promotion;  // how much of a line the cache fetches

  int rank() const {
    int count = 0;
    while (count < kMost && sizes[count] > 0) ++count;
    return count;
  }
};

inline CUtensorMap encode_tensor_map_now(const TensorMap& t) {
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

  const int rank = t.rank();
  // The stride of a single index is never used, and callers may leave anything there.
  const int64_t row_bytes = (t.sizes[0] * t.element_bytes + 15) / 16 * 16;
  cuuint64_t sizes[TensorMap::kMost], strides[TensorMap::kMost];
  cuuint32_t box[TensorMap::kMost], steps[TensorMap::kMost];
  for (int i = 0; i < rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(t.sizes[i]);
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(t.sizes[i] == 1 ? row_bytes : t.strides[i]);
    box[i] = t.box[i];
    steps[i] = 1;
  }
  CUtensorMap map;
  CUresult result = encode(&map, t.type, static_cast<cuuint32_t>(rank), const_cast<void*>(t.base), sizes, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle, t.l2_promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::string dimensions;
    for (int i = 0; i < rank; ++i) {
      dimensions += (i ? " x " : "") + std::to_string(t.sizes[i]) + (i ? " (stride " + std::to_string(t.strides[i]) + ")" : "");
    }
    throw std::runtime_error("eightfold: cuTensorMapEncodeTiled failed with code " + std::to_string(static_cast<int>(result)) + " for " +
                             dimensions + " elements of " + std::to_string(t.element_bytes) +
                             " bytes, address % 16 = " + std::to_string(reinterpret_cast<uintptr_t>(t.base) % 16));
  }
  return map;
}

// A map is a function of these arguments alone, whatever has become of the memory since, and a step brings the same ones again.
inline CUtensorMap encode_tensor_map(const TensorMap& t) {
  static thread_local Recent<2 + 3 * TensorMap::kMost, CUtensorMap, 256> recent;
  const auto word = [](auto value) { return static_cast<uint64_t>(value); };
  std::array<uint64_t, 2 + 3 * TensorMap::kMost> key{
      reinterpret_cast<uintptr_t>(t.base), word(t.type) | word(t.element_bytes) << 16 | word(t.swizzle) << 32 | word(t.l2_promotion) << 48};
  for (int i = 0; i < TensorMap::kMost; ++i) {
    key[2 + 3 * i] = word(t.sizes[i]);
    key[3 + 3 * i] = word(t.strides[i]);
    key[4 + 3 * i] = t.box[i];
  }
  return recent.get(key, [&] { return encode_tensor_map_now(t); });
}

}  // namespace eightfold
