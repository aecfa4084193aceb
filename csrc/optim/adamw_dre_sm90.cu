#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "optim/adamw_dre.h"
#include "optim/dre_group.cuh"

namespace eightfold {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kGroupsPerPass = kThreads / dre::kLanes;
constexpr uint32_t kGroupsPerBlock = 4 * kGroupsPerPass;  // 16,384 elements
constexpr int kMaxTensors = 32;                           // a launch's parameter block stays under 4 KB

struct Entry {
  void* param;
  const void* grad;
  float* master;
  uint8_t *m_codes, *v_codes;
  float *m_maxima, *v_maxima;
  uint8_t *m_exponents, *v_exponents;
  const float* step;
  int64_t row_length;
  uint64_t offset;
  uint32_t groups, groups_per_row;
  uint32_t first_block;
  bool aligned;  // every granule of 4 elements is whole, aligned, and one block of random words
};

struct Launch {
  const float *lr, *grad_scale;
  AdamwConstants constants;
  uint64_t seed;
  bool stochastic_states;
  int count;
  Entry entries[kMaxTensors];
};
static_assert(sizeof(Launch) <= 4096);

// The random words of a granule: element e uses word e % 4 of block e / 4.
__device__ __forceinline__ void granule_random(const Entry& t, int64_t begin, uint32_t step, uint32_t purpose, uint64_t seed,
                                               uint32_t (&words)[4]) {
  const uint64_t first = t.offset + static_cast<uint64_t>(begin);
  if (t.aligned) {
    PhiloxWords four = random_words(first >> 2, step, purpose, seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = four.w[i];
  } else {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      uint32_t word = random_word(first + i, step, purpose, seed);
#pragma unroll
      for (int target = 0; target < 4; ++target) words[target] = i == target ? word : words[target];
    }
  }
}

template <class Param, bool kMaster>
__device__ __forceinline__ void load_param(const Entry& t, dre::Granule granule, float (&p)[4]) {
  if constexpr (kMaster)
    dre::load_granule(t.master, granule, t.aligned, p);
  else
    dre::load_granule(static_cast<const Param*>(t.param), granule, t.aligned, p);
}

template <class Param, bool kMaster>
__device__ __forceinline__ void store_param(const Entry& t, dre::Granule granule, uint32_t step, uint64_t seed, const float (&p)[4]) {
  if constexpr (kMaster) dre::store_granule(t.master, granule, t.aligned, p);
  if constexpr (std::is_same_v<Param, float>) {
    dre::store_granule(static_cast<float*>(t.param), granule, t.aligned, p);
  } else {
    uint16_t rounded[4];
    uint32_t random[4] = {};
    if constexpr (!kMaster) granule_random(t, granule.begin, step, 0, seed, random);
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = kMaster ? float_to_bf16(p[i]) : float_to_bf16_stochastic(p[i], random[i]);
    dre::store_granule(static_cast<uint16_t*>(t.param), granule, t.aligned, rounded);
  }
}

template <class Param, bool kMaster, class Grad>
__global__ void __launch_bounds__(kThreads, 2) adamw_kernel(const __grid_constant__ Launch launch) {
  // The last tensor that starts at or before this block.
  int low = 0, high = launch.count - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (launch.entries[middle].first_block <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  const Entry& t = launch.entries[low];
  const AdamwConstants& c = launch.constants;
  const float step_value = *t.step;
  const uint32_t step = static_cast<uint32_t>(step_value);
  const AdamwScalars s = adamw_scalars(c, *launch.lr, step_value, launch.grad_scale ? *launch.grad_scale : 1.0f);
  const bool aligned = t.aligned;
  uint32_t group = (blockIdx.x - t.first_block) * kGroupsPerBlock + threadIdx.x / dre::kLanes;

#pragma unroll 1
  for (uint32_t done = 0; done < kGroupsPerBlock; done += kGroupsPerPass, group += kGroupsPerPass) {
    const dre::Span span = dre::group_span(group, t.groups, t.groups_per_row, t.row_length);
    float p[dre::kGranules][4], g[dre::kGranules][4], m[dre::kGranules][4], v[dre::kGranules][4];
    uint32_t m_codes[dre::kGranules], v_codes[dre::kGranules];
    dre::Scale m_scale{0.0f, 0}, v_scale{0.0f, 0};

    // Everything this group reads, in flight at once.
#pragma unroll
    for (int j = 0; j < dre::kGranules; ++j) {
      const dre::Granule granule = dre::granule_of(span, j);
      m_codes[j] = dre::load_codes(t.m_codes, granule, aligned);
      v_codes[j] = dre::load_codes(t.v_codes, granule, aligned);
      dre::load_granule(static_cast<const Grad*>(t.grad), granule, aligned, g[j]);
      load_param<Param, kMaster>(t, granule, p[j]);
    }
    if (span.count) {
      m_scale = {t.m_maxima[group], t.m_exponents[group]};
      v_scale = {t.v_maxima[group], t.v_exponents[group]};
    }

    // Update with the fresh moments.
    dre::Range m_range, v_range;
#pragma unroll
    for (int j = 0; j < dre::kGranules; ++j) {
      dre::decode_granule(m_codes[j], m_scale, m[j]);
      dre::decode_granule(v_codes[j], v_scale, v[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float grad = g[j][i] * s.grad_scale;
        m[j][i] = fmaf(c.beta1, m[j][i], c.one_minus_beta1 * grad);
        v[j][i] = fmaf(c.beta2, v[j][i], (c.one_minus_beta2 * grad) * grad);
        float denominator = fmaf(sqrt_approx(v[j][i]), s.root_scale, c.eps);
        p[j][i] = fmaf(-s.step_size, __fdividef(m[j][i], denominator), p[j][i] * s.decay);
        m_range.fold(m[j][i]);
        v_range.fold(v[j][i]);
      }
      store_param<Param, kMaster>(t, dre::granule_of(span, j), step, launch.seed, p[j]);
    }

    // New scales. Elements past a row's end are zeros and change neither range. Even lanes find m's exponent, odd lanes v's.
    m_range.reduce();
    v_range.reduce();
    const bool odd = threadIdx.x & 1;
    const dre::Range mine = odd ? v_range : m_range;
    const uint32_t exponent = mine.exponent(), other = __shfl_xor_sync(0xFFFFFFFFu, exponent, 1);
    m_scale = {m_range.maximum(), odd ? other : exponent};
    v_scale = {v_range.maximum(), odd ? exponent : other};
    if (span.count && threadIdx.x % dre::kLanes == 0) {
      t.m_maxima[group] = m_scale.maximum, t.m_exponents[group] = static_cast<uint8_t>(m_scale.exponent);
      t.v_maxima[group] = v_scale.maximum, t.v_exponents[group] = static_cast<uint8_t>(v_scale.exponent);
    }

    const dre::Encoder m_encoder(m_scale), v_encoder(v_scale);
#pragma unroll
    for (int j = 0; j < dre::kGranules; ++j) {
      const dre::Granule granule = dre::granule_of(span, j);
      if (launch.stochastic_states) {
        uint32_t random[4] = {};
        granule_random(t, granule.begin, step, 1, launch.seed, random);
        m_codes[j] = m_encoder.stochastic(m[j], random, 0, m_scale);
        v_codes[j] = v_encoder.stochastic(v[j], random, 16, v_scale);
      } else {
        m_codes[j] = m_encoder.nearest(m[j]);
        v_codes[j] = v_encoder.nearest(v[j]);
      }
      dre::store_codes(t.m_codes, granule, aligned, m_codes[j]);
      dre::store_codes(t.v_codes, granule, aligned, v_codes[j]);
    }
  }
}

bool aligned_to(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

uintptr_t granule_bytes(DType type) { return type == DType::f32 ? 16 : 8; }

Entry entry_of(const AdamwTensor& t, uint32_t first_block) {
  const int64_t per_row = (t.row_length + kDreGroup - 1) / kDreGroup;
  const bool aligned = t.row_length % 4 == 0 && t.offset % 4 == 0 && aligned_to(t.param, granule_bytes(t.param_type)) &&
                       aligned_to(t.grad, granule_bytes(t.grad_type)) && aligned_to(t.master, 16) && aligned_to(t.m_codes, 4) &&
                       aligned_to(t.v_codes, 4);
  return {t.param,
          t.grad,
          t.master,
          t.m_codes,
          t.v_codes,
          t.m_maxima,
          t.v_maxima,
          t.m_exponents,
          t.v_exponents,
          t.step,
          t.row_length,
          static_cast<uint64_t>(t.offset),
          static_cast<uint32_t>(t.rows * per_row),
          static_cast<uint32_t>(per_row),
          first_block,
          aligned};
}

// Tensors of one kind, kMaxTensors a launch.
template <class Param, bool kMaster, class Grad>
void launch_kind(const std::vector<const AdamwTensor*>& tensors, const AdamwOptions& o, cudaStream_t stream) {
  for (size_t begin = 0; begin < tensors.size();) {
    Launch launch{o.lr, o.grad_scale, adamw_constants(o), o.seed, o.stochastic_states, 0, {}};
    int64_t blocks = 0;
    while (begin < tensors.size() && launch.count < kMaxTensors) {
      const AdamwTensor& t = *tensors[begin];
      int64_t groups = t.rows * ((t.row_length + kDreGroup - 1) / kDreGroup);
      int64_t more = (groups + kGroupsPerBlock - 1) / kGroupsPerBlock;
      if (launch.count > 0 && blocks + more > 0x7FFFFFFF) break;
      launch.entries[launch.count++] = entry_of(t, static_cast<uint32_t>(blocks));
      blocks += more;
      ++begin;
    }
    adamw_kernel<Param, kMaster, Grad><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(launch);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string("adamw_dre_: launch failed: ") + cudaGetErrorString(error));
  }
}

}  // namespace

void adamw_dre_cuda(const AdamwTensor* tensors, int64_t count, const AdamwOptions& o, void* stream) {
  std::vector<const AdamwTensor*> kinds[2][2][2];  // [parameter is bf16][has a master][gradient is bf16]
  for (int64_t i = 0; i < count; ++i) {
    const AdamwTensor& t = tensors[i];
    kinds[t.param_type == DType::bf16][t.master != nullptr][t.grad_type == DType::bf16].push_back(&t);
  }
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  launch_kind<float, false, float>(kinds[0][0][0], o, s);
  launch_kind<float, false, uint16_t>(kinds[0][0][1], o, s);
  launch_kind<float, true, float>(kinds[0][1][0], o, s);
  launch_kind<float, true, uint16_t>(kinds[0][1][1], o, s);
  launch_kind<uint16_t, false, float>(kinds[1][0][0], o, s);
  launch_kind<uint16_t, false, uint16_t>(kinds[1][0][1], o, s);
  launch_kind<uint16_t, true, float>(kinds[1][1][0], o, s);
  launch_kind<uint16_t, true, uint16_t>(kinds[1][1][1], o, s);
}

}  // namespace eightfold
