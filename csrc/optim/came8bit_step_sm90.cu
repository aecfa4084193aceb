// CAME's last phase over matrices: m, parameters, and m in bytes. A warp has 2,048 consecutive elements, 64 a lane in packs that interleave
// with the other lanes', and keeps their m in registers until the range of all is known. Rows end wherever they do: each pack works out
// its row and column. The factors of columns are read once an element, from the L1 cache, which tensors are read past.
#include <type_traits>

#include "core/launch.cuh"
#include "core/nan_order.cuh"
#include "optim/came8bit.cuh"

namespace eightfold::came {
namespace {

// Quotient and remainder by the number of columns, for n below 2^31 + 2^12.
__device__ __forceinline__ uint2 split(const Entry& t, uint32_t n) {
  uint32_t row = __umulhi(n, t.inverse), col = n - row * t.cols;
  if (col >= t.cols) ++row, col -= t.cols;
  return make_uint2(row, col);
}

template <int kWidth>
__device__ __forceinline__ void load_factors(const float* at, float (&factors)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(at + i);
    factors[i] = four.x, factors[i + 1] = four.y, factors[i + 2] = four.z, factors[i + 3] = four.w;
  }
}

template <class Param, class Grad, bool kBytes, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) came_step_kernel(const __grid_constant__ Launch launch) {
  constexpr int kWidth = sizeof(Param) == 2 ? 8 : 4;
  constexpr int kPacks = kCameBlock / 32 / kWidth;
  const int index = tensor_of(launch, blockIdx.x);
  const Entry& t = launch.entries[index];
  const CameConstants& c = launch.constants;
  const Layout layout(t.rows, t.cols);
  const int lane = threadIdx.x % 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x - launch.first_block[index]) * kWarps + threadIdx.x / 32;
  const int64_t begin = block * kCameBlock;
  if (begin >= t.numel) return;
  const int count = static_cast<int>(min(static_cast<int64_t>(kCameBlock), t.numel - begin));
  const int64_t first_row = begin / t.cols;
  const uint32_t first_col = static_cast<uint32_t>(begin - first_row * t.cols);

  const float* scratch = t.scratch;
  const float mean_u = list_sum(scratch + layout.folds + 3 * layout.row_folds, layout.row_folds) / static_cast<float>(t.rows);
  const float lr = *launch.lr, decay = 1.0f - lr * c.weight_decay, size = lr * sqrtf(mean_u);
  const float feed = c.one_minus_beta1 * *scratch;
  const uint32_t step = static_cast<uint32_t>(*t.step);
  const float *row_v = scratch + layout.row_v + first_row, *row_u = scratch + layout.row_u + first_row;
  const float *col_v = scratch + layout.col_v, *col_u = scratch + layout.col_u;

  float m[kPacks][kWidth];
  float low = bits_float(0x7F800000u), high = -low;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int place = (j * 32 + lane) * kWidth;
    const int left = count - place;
    // Of whole packs those past the end are the last one again; what is made of it is not stored.
    const int from = kVector ? min(place, count - kWidth) : place;
    const int present = kVector ? kWidth : left;
    const int64_t at = begin + from;
    const auto g = optim::load_pack<Grad, kWidth, true>(static_cast<const Grad*>(t.grad) + at, present, kVector);
    const auto p = optim::load_pack<Param, kWidth, true>(static_cast<const Param*>(t.param) + at, present, kVector);
    Moments<kBytes, kWidth, kVector, true> old;
    old.load(t, at, present);
    float v_factor[kWidth], u_factor[kWidth];
    if constexpr (kVector) {
      const uint2 here = split(t, first_col + from);
      load_factors(col_v + here.y, v_factor);
      load_factors(col_u + here.y, u_factor);
      const float v_row = row_v[here.x] * feed, u_row = row_u[here.x] * size;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v_factor[i] *= v_row, u_factor[i] *= u_row;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (i >= left) {
          v_factor[i] = u_factor[i] = 0.0f;
          continue;
        }
        const uint2 here = split(t, first_col + from + i);
        v_factor[i] = col_v[here.y] * (row_v[here.x] * feed), u_factor[i] = col_u[here.y] * (row_u[here.x] * size);
      }
    }
    float fresh[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      m[j][i] = __fmaf_rn(c.beta1, old.value(i), g.value(i) * v_factor[i]);
      fresh[i] = __fmaf_rn(-u_factor[i], m[j][i], p.value(i) * decay);
      if (kBytes && (kVector || i < left)) low = min_nan(low, m[j][i]), high = max_nan(high, m[j][i]);
    }
    Param* to = static_cast<Param*>(t.param) + at;
    if constexpr (sizeof(Param) == 2) {
      const PhiloxWords random = optim::param_bits(static_cast<uint64_t>(t.offset + at), step, launch.keys, kVector);
      optim::store_pack(to, optim::round_stochastically(fresh, random), left, kVector);
    } else {
      optim::Pack<float, kWidth> pack;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) pack.words[i] = float_bits(fresh[i]);
      optim::store_pack(to, pack, left, kVector);
    }
    if constexpr (!kBytes) {
      optim::Pack<float, kWidth> pack;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) pack.words[i] = float_bits(m[j][i]);
      optim::store_pack(static_cast<float*>(t.m) + at, pack, left, kVector);
    }
  }

  if constexpr (kBytes) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      low = min_nan(low, __shfl_xor_sync(optim::kWarp, low, mask));
      high = max_nan(high, __shfl_xor_sync(optim::kWarp, high, mask));
    }
    const CameScale scale(low, high);
    if (lane == 0) t.m_scales[block] = make_float2(scale.scale, scale.minimum);
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int place = (j * 32 + lane) * kWidth;
      optim::Pack<uint8_t, kWidth> codes;
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        const uint32_t even = __byte_perm(scale.code(m[j][i]), scale.code(m[j][i + 1]), 0x0040);
        const uint32_t odd = __byte_perm(scale.code(m[j][i + 2]), scale.code(m[j][i + 3]), 0x0040);
        codes.words[i / 4] = __byte_perm(even, odd, 0x5410);
      }
      optim::store_pack(static_cast<uint8_t*>(t.m) + begin + place, codes, count - place, kVector);
    }
  }
}

template <class Param, class Grad>
void launch_step_of(int kind, uint32_t blocks, const Launch& launch, cudaStream_t stream) {
  if (kind & kByteMoments)
    kind& kAligned ? came_step_kernel<Param, Grad, true, true><<<blocks, kThreads, 0, stream>>>(launch)
                   : came_step_kernel<Param, Grad, true, false><<<blocks, kThreads, 0, stream>>>(launch);
  else
    kind& kAligned ? came_step_kernel<Param, Grad, false, true><<<blocks, kThreads, 0, stream>>>(launch)
                   : came_step_kernel<Param, Grad, false, false><<<blocks, kThreads, 0, stream>>>(launch);
  check_launch("came8bit_ (step)");
}

}  // namespace

void launch_step(int kind, uint32_t blocks, const Launch& launch, cudaStream_t stream) {
  if (kind & kBf16Param)
    kind& kBf16Grad ? launch_step_of<uint16_t, uint16_t>(kind, blocks, launch, stream)
                    : launch_step_of<uint16_t, float>(kind, blocks, launch, stream);
  else
    kind& kBf16Grad ? launch_step_of<float, uint16_t>(kind, blocks, launch, stream)
                    : launch_step_of<float, float>(kind, blocks, launch, stream);
}

}  // namespace eightfold::came
