#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "optim/dre_group.cuh"
#include "optim/dre_states.h"

namespace eightfold {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kGroupsPerBlock = kThreads / dre::kLanes;

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ x, uint32_t groups, uint32_t groups_per_row, int64_t row_length, bool aligned,
                    uint8_t* __restrict__ codes, float* __restrict__ maxima, uint8_t* __restrict__ exponents) {
  const uint32_t group = blockIdx.x * kGroupsPerBlock + threadIdx.x / dre::kLanes;
  const dre::Span span = dre::group_span(group, groups, groups_per_row, row_length);
  float values[dre::kGranules][4];
  dre::Range range;
#pragma unroll
  for (int j = 0; j < dre::kGranules; ++j) dre::load_granule(x, dre::granule_of(span, j), aligned, values[j]);
#pragma unroll
  for (int j = 0; j < dre::kGranules; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) range.fold(values[j][i]);
  range.reduce();
  const dre::Scale scale{range.maximum(), range.exponent()};
  const dre::Encoder encoder(scale);
#pragma unroll
  for (int j = 0; j < dre::kGranules; ++j) dre::store_codes(codes, dre::granule_of(span, j), aligned, encoder.nearest(values[j]));
  if (span.count && threadIdx.x % dre::kLanes == 0) {
    maxima[group] = scale.maximum;
    exponents[group] = static_cast<uint8_t>(scale.exponent);
  }
}

__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* __restrict__ codes, const float* __restrict__ maxima, const uint8_t* __restrict__ exponents,
                      uint32_t groups, uint32_t groups_per_row, int64_t row_length, bool aligned, float* __restrict__ x) {
  const uint32_t group = blockIdx.x * kGroupsPerBlock + threadIdx.x / dre::kLanes;
  const dre::Span span = dre::group_span(group, groups, groups_per_row, row_length);
  if (span.count == 0) return;
  const dre::Scale scale{maxima[group], exponents[group]};
#pragma unroll
  for (int j = 0; j < dre::kGranules; ++j) {
    const dre::Granule granule = dre::granule_of(span, j);
    float values[4];
    dre::decode_granule(dre::load_codes(codes, granule, aligned), scale, values);
    dre::store_granule(x, granule, aligned, values);
  }
}

struct Grid {
  uint32_t groups, groups_per_row, blocks;
};

Grid grid_of(int64_t rows, int64_t row_length) {
  int64_t per_row = (row_length + kDreGroup - 1) / kDreGroup, groups = rows * per_row;
  return {static_cast<uint32_t>(groups), static_cast<uint32_t>(per_row),
          static_cast<uint32_t>((groups + kGroupsPerBlock - 1) / kGroupsPerBlock)};
}

bool aligned_to(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

void check_launch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": launch failed: " + cudaGetErrorString(error));
}

}  // namespace

void dre_quantize_cuda(const void* x, DType type, int64_t rows, int64_t row_length, uint8_t* codes, float* maxima, uint8_t* exponents,
                       void* stream) {
  const Grid grid = grid_of(rows, row_length);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const bool whole = row_length % 4 == 0 && aligned_to(codes, 4);
  if (type == DType::f32)
    quantize_kernel<<<grid.blocks, kThreads, 0, s>>>(static_cast<const float*>(x), grid.groups, grid.groups_per_row, row_length,
                                                     whole && aligned_to(x, 16), codes, maxima, exponents);
  else
    quantize_kernel<<<grid.blocks, kThreads, 0, s>>>(static_cast<const uint16_t*>(x), grid.groups, grid.groups_per_row, row_length,
                                                     whole && aligned_to(x, 8), codes, maxima, exponents);
  check_launch("dre_quantize");
}

void dre_dequantize_cuda(const uint8_t* codes, const float* maxima, const uint8_t* exponents, int64_t rows, int64_t row_length, float* x,
                         void* stream) {
  const Grid grid = grid_of(rows, row_length);
  const bool aligned = row_length % 4 == 0 && aligned_to(codes, 4) && aligned_to(x, 16);
  dequantize_kernel<<<grid.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(codes, maxima, exponents, grid.groups,
                                                                                     grid.groups_per_row, row_length, aligned, x);
  check_launch("dre_dequantize");
}

}  // namespace eightfold
