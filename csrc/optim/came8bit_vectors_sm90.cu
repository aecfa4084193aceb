// CAME over tensors that are no matrices: second moments and the RMS of w, then the step. Neighbouring threads have neighbouring elements.
#include "core/launch.cuh"
#include "optim/came8bit.cuh"

namespace eightfold::came {
namespace {

template <class T>
__device__ __forceinline__ float element(const void* x, int64_t i) {
  if constexpr (sizeof(T) == 4)
    return static_cast<const float*>(x)[i];
  else
    return bf16_to_float(static_cast<const uint16_t*>(x)[i]);
}

template <class Grad>
__global__ void __launch_bounds__(kThreads) came_second_moments_kernel(const __grid_constant__ Launch launch) {
  const int index = tensor_of(launch, blockIdx.x);
  const Entry& t = launch.entries[index];
  const CameConstants& c = launch.constants;
  const float grad_scale = launch.grad_scale ? *launch.grad_scale : 1.0f;
  const int64_t chunk = blockIdx.x - launch.first_block[index], end = min((chunk + 1) * kVectorChunk, t.numel);
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = chunk * kVectorChunk + threadIdx.x; i < end; i += kThreads) {
    const float g = element<Grad>(t.grad, i) * grad_scale;
    const float v = t.v_rows[i] = c.beta2 * t.v_rows[i] + c.one_minus_beta2 * (g * g + c.eps1);
    const float w = g * rsqrtf(v);
    sum = __fmaf_rn(w, w, sum);
  }
  __shared__ float room[kWarps];
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) t.scratch[chunk] = sum;
}

template <class Param, class Grad>
__global__ void __launch_bounds__(kThreads) came_vector_step_kernel(const __grid_constant__ Launch launch) {
  const int index = tensor_of(launch, blockIdx.x);
  const Entry& t = launch.entries[index];
  const CameConstants& c = launch.constants;
  const int64_t chunk = blockIdx.x - launch.first_block[index], end = min((chunk + 1) * kVectorChunk, t.numel);
  const float mean_ww = list_sum(t.scratch, parts_of(t.numel, kVectorChunk)) / static_cast<float>(t.numel);
  const float factor = c.one_minus_beta1 * came_clip(c, sqrtf(mean_ww)) * (launch.grad_scale ? *launch.grad_scale : 1.0f);
  const float lr = *launch.lr, decay = 1.0f - lr * c.weight_decay;
  const uint32_t step = static_cast<uint32_t>(*t.step);
  float* moments = static_cast<float*>(t.m);
#pragma unroll 4
  for (int64_t i = chunk * kVectorChunk + threadIdx.x; i < end; i += kThreads) {
    const float m = moments[i] = __fmaf_rn(c.beta1, moments[i], element<Grad>(t.grad, i) * rsqrtf(t.v_rows[i]) * factor);
    const float p = __fmaf_rn(-lr, m, element<Param>(t.param, i) * decay);
    if constexpr (sizeof(Param) == 4)
      static_cast<float*>(t.param)[i] = p;
    else
      static_cast<uint16_t*>(t.param)[i] =
          float_to_bf16_stochastic(p, random_for_param(static_cast<uint64_t>(t.offset + i), step, launch.keys));
  }
}

template <class Param, class Grad>
void launch_vectors_of(bool step, uint32_t blocks, const Launch& launch, cudaStream_t stream) {
  if (step)
    came_vector_step_kernel<Param, Grad><<<blocks, kThreads, 0, stream>>>(launch);
  else
    came_second_moments_kernel<Grad><<<blocks, kThreads, 0, stream>>>(launch);
  check_launch("came8bit_ (no matrices)");
}

}  // namespace

void launch_vectors(int kind, bool step, uint32_t blocks, const Launch& launch, cudaStream_t stream) {
  if (kind & kBf16Param)
    kind& kBf16Grad ? launch_vectors_of<uint16_t, uint16_t>(step, blocks, launch, stream)
                    : launch_vectors_of<uint16_t, float>(step, blocks, launch, stream);
  else
    kind& kBf16Grad ? launch_vectors_of<float, uint16_t>(step, blocks, launch, stream)
                    : launch_vectors_of<float, float>(step, blocks, launch, stream);
}

}  // namespace eightfold::came
