#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "conv/pixels.h"
#include "core/fp8_vector.cuh"
#include "core/launch.cuh"
#include "core/math.h"

namespace eightfold::conv {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kAll = 0xFFFFFFFFu;

template <class V>
__device__ __forceinline__ Octet<V> eight_of(const PixelVector& vector, int64_t col) {
  return load_octet<true>(static_cast<const V*>(vector.data) + col, 8);
}

template <class T, class V>
__global__ void __launch_bounds__(kThreads) bias_silu_kernel(const BiasSilu op, uint32_t octets_of_row, int64_t octets) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= octets) return;
  const Octet<T> x = load_octet<true>(static_cast<const T*>(op.x) + 8 * index, 8);
  const Octet<V> bias = eight_of<V>(op.bias, 8 * (index % octets_of_row));
  float values[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float s = x.value(j) + bias.value(j);
    values[j] = s * sigmoid(s);
  }
  Octet<T> y;
  y.set(values);
  store_octet(static_cast<T*>(op.y) + 8 * index, y, 8, true);
}

// Lanes of a row, and octets of a lane: `lane`, lane + kLanes, ...
template <class T, class V, int kLanes, int kOctets>
__global__ void __launch_bounds__(kThreads) rms_norm_add_kernel(const RmsNormAdd op) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool exists = row < op.rows;
  Octet<T> x[kOctets], residual[kOctets];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int64_t col = 8 * (i * kLanes + lane);
    const int count = exists && col < op.cols ? 8 : 0;
    x[i] = load_octet<true>(static_cast<const T*>(op.x) + row * op.cols + col, count);
    residual[i] = load_octet<true>(static_cast<const T*>(op.residual) + row * op.cols + col, count);
  }
#pragma unroll
  for (int i = 0; i < kOctets; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = __fmaf_rn(x[i].value(j), x[i].value(j), sum);
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
  const float rstd = rsqrtf(sum / static_cast<float>(op.cols) + op.eps);
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int64_t col = 8 * (i * kLanes + lane);
    if (!exists || col >= op.cols) continue;
    const Octet<V> weight = eight_of<V>(op.weight, col), bias = eight_of<V>(op.bias, col);
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = x[i].value(j) * rstd * weight.value(j) + bias.value(j) + residual[i].value(j);
    Octet<T> y;
    y.set(values);
    store_octet(static_cast<T*>(op.y) + row * op.cols + col, y, 8, true);
  }
}

unsigned blocks_for(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

template <class T, class V>
void launch_norm(const RmsNormAdd& op, cudaStream_t stream) {
  const auto run = [&]<int kLanes, int kOctets>(std::integral_constant<int, kLanes>, std::integral_constant<int, kOctets>) {
    rms_norm_add_kernel<T, V, kLanes, kOctets><<<blocks_for(op.rows, kThreads / kLanes), kThreads, 0, stream>>>(op);
  };
  using std::integral_constant;
  if (op.cols <= 128)
    run(integral_constant<int, 16>{}, integral_constant<int, 1>{});
  else if (op.cols <= 256)
    run(integral_constant<int, 32>{}, integral_constant<int, 1>{});
  else if (op.cols <= 512)
    run(integral_constant<int, 32>{}, integral_constant<int, 2>{});
  else if (op.cols <= 1024)
    run(integral_constant<int, 32>{}, integral_constant<int, 4>{});
  else
    run(integral_constant<int, 32>{}, integral_constant<int, 8>{});
  check_launch("rms_norm_add_kernel");
}

template <class T, class V>
void launch_silu(const BiasSilu& op, cudaStream_t stream) {
  const int64_t octets = op.rows * op.cols / 8;
  bias_silu_kernel<T, V><<<blocks_for(octets, kThreads), kThreads, 0, stream>>>(op, static_cast<uint32_t>(op.cols / 8), octets);
  check_launch("bias_silu_kernel");
}

// call<T, V>() of the dtypes of pixels and vectors.
template <class Call>
void typed(DType pixels, DType vectors, const Call& call) {
  if (pixels == DType::bf16)
    vectors == DType::bf16 ? call.template operator()<__nv_bfloat16, __nv_bfloat16>() : call.template operator()<__nv_bfloat16, float>();
  else
    vectors == DType::bf16 ? call.template operator()<float, __nv_bfloat16>() : call.template operator()<float, float>();
}

}  // namespace

void bias_silu_sm90(const BiasSilu& op, void* stream) {
  if (op.rows == 0 || op.cols == 0) return;
  typed(op.dtype, op.bias.dtype, [&]<class T, class V>() { launch_silu<T, V>(op, static_cast<cudaStream_t>(stream)); });
}

void rms_norm_add_sm90(const RmsNormAdd& op, void* stream) {
  if (op.rows == 0 || op.cols == 0) return;
  typed(op.dtype, op.weight.dtype, [&]<class T, class V>() { launch_norm<T, V>(op, static_cast<cudaStream_t>(stream)); });
}

}  // namespace eightfold::conv
