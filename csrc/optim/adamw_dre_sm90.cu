#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "optim/adamw_dre.h"
#include "optim/adamw_lane.cuh"

namespace eightfold {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kGroupsPerBlock = 256;  // at most: 32,768 elements
constexpr int kMaxTensors = 300;           // a launch's parameter block stays under 32,764 bytes

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
  uint32_t groups;
  bool aligned;  // every pack of neighbours is whole, aligned, and rounded with whole blocks of random words
};

struct Launch {
  const float *lr, *grad_scale;
  UnitConstants constants;
  PhiloxKeys keys;
  bool stochastic_states;
  int count;
  uint32_t first_block[kMaxTensors];
  Entry entries[kMaxTensors];
};
static_assert(sizeof(Launch) <= 32764);

// A parameter's update is p decay - m / (slope sqrt(v) + floor), with m and v in their units.
struct Scalars {
  float grad_unit, decay, slope, floor;
  uint32_t step;
};

__device__ __forceinline__ Scalars scalars_of(const Launch& launch, float step) {
  const UnitConstants& c = launch.constants;
  const float lr = *launch.lr, grad_scale = launch.grad_scale ? *launch.grad_scale : 1.0f;
  const AdamwScalars s = adamw_scalars(c.plain, lr, step, grad_scale);
  const float size = s.step_size * c.m_unit;
  Scalars result{s.grad_scale * kMomentUnit, s.decay, fminf(c.root_unit * s.root_scale / size, 1e38f), c.plain.eps / size,
                 static_cast<uint32_t>(step)};
  if (size == 0.0f) result.slope = 1.0f, result.floor = bits_float(0x7F800000u);  // nothing moves, whatever eps is
  return result;
}

// What a lane reads of a group: kPacks packs of kWidth neighbours, interleaved with those of the other lanes.
template <class Param, bool kMaster, class Grad, bool kGeneral>
struct Inputs {
  using Value = std::conditional_t<kMaster, float, Param>;
  static constexpr bool kNarrow = sizeof(Value) == 2;
  static constexpr int kLanes = 8;  // of a group
  static constexpr int kWidth = kNarrow ? 8 : 4;
  static constexpr int kPacks = kDreGroup / kLanes / kWidth;
  static constexpr bool kAhead = kNarrow;  // a group is loaded before the one before it is encoded
  static constexpr int kBlocks = kGeneral ? 2 : 3;

  int64_t at;  // of this lane's first element
  int count;   // of elements from there to the end of the group
  optim::Pack<Value, kWidth> p[kPacks];
  optim::Pack<Grad, kWidth> g[kPacks];
  optim::Pack<uint8_t, kWidth> m[kPacks], v[kPacks];
  float m_maximum, v_maximum;
  uint32_t m_exponent, v_exponent;

  static __device__ __forceinline__ bool vector(const Entry& t) { return !kGeneral || t.aligned; }
  // Of pack j behind the lane's first.
  static constexpr __device__ __forceinline__ int behind(int j) { return kWidth * kLanes * j; }

  __device__ __forceinline__ void load(const Entry& t, uint32_t groups_per_row, uint32_t group) {
    const uint32_t column = threadIdx.x % kLanes * kWidth;
    if constexpr (kGeneral) {
      const dre::Span span = dre::group_span(group, t.groups, groups_per_row, t.row_length);
      at = span.begin + column, count = span.count - static_cast<int>(column);
      group = span.count ? group : 0;
    } else {  // past the end the last group is read, and nothing written
      group = min(group, t.groups - 1);
      at = static_cast<int64_t>(group) * kDreGroup + column, count = kDreGroup;
    }
    const bool whole = vector(t);
    const uint8_t *m_at = t.m_codes + at, *v_at = t.v_codes + at;
    const Grad* g_at = static_cast<const Grad*>(t.grad) + at;
    const Value* p_at = (kMaster ? reinterpret_cast<const Value*>(t.master) : static_cast<const Value*>(t.param)) + at;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      m[j] = optim::load_pack<uint8_t, kWidth>(m_at + behind(j), count - behind(j), whole);
      v[j] = optim::load_pack<uint8_t, kWidth>(v_at + behind(j), count - behind(j), whole);
      g[j] = optim::load_pack<Grad, kWidth>(g_at + behind(j), count - behind(j), whole);
      p[j] = optim::load_pack<Value, kWidth>(p_at + behind(j), count - behind(j), whole);
    }
    m_maximum = t.m_maxima[group], m_exponent = t.m_exponents[group];
    v_maximum = t.v_maxima[group], v_exponent = t.v_exponents[group];
  }
};

template <class Param, bool kMaster, class Grad, bool kGeneral>
__global__ void __launch_bounds__(kThreads, (Inputs<Param, kMaster, Grad, kGeneral>::kBlocks))
    adamw_kernel(const __grid_constant__ Launch launch) {
  using In = Inputs<Param, kMaster, Grad, kGeneral>;
  constexpr int kLanes = In::kLanes, kWidth = In::kWidth, kPacks = In::kPacks;
  constexpr uint32_t kGroupsPerPass = kThreads / kLanes;

  // The last tensor that starts at or before this block.
  int low = 0, high = launch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (launch.first_block[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  const Entry& t = launch.entries[low];
  const UnitConstants& c = launch.constants;
  const uint32_t groups_per_row = static_cast<uint32_t>((t.row_length + kDreGroup - 1) / kDreGroup);
  // The blocks of a tensor sweep it together: what is in flight at a time lies close together in memory.
  const uint32_t first_group = (blockIdx.x - launch.first_block[low]) * kGroupsPerPass;
  const uint32_t stride = (t.groups + kGroupsPerBlock - 1) / kGroupsPerBlock * kGroupsPerPass;
  const bool whole = In::vector(t);
  const bool odd = threadIdx.x & 1;  // even lanes work out the scale of m, odd lanes that of v
  const float unit = odd ? c.v_unit : c.m_unit;
  float* const maxima = odd ? t.v_maxima : t.m_maxima;
  uint8_t* const exponents = odd ? t.v_exponents : t.m_exponents;

  uint32_t group = first_group + threadIdx.x / kLanes;
  In in;
  if (In::kAhead) in.load(t, groups_per_row, group);
  __shared__ Scalars shared;
  if (threadIdx.x < 32) {
    const Scalars mine = scalars_of(launch, *t.step);
    if (threadIdx.x == 0) shared = mine;
  }
  __syncthreads();
  const Scalars s = shared;

#pragma unroll 1
  for (uint32_t first = first_group; first < t.groups; first += stride) {
    if (!In::kAhead) in.load(t, groups_per_row, group);
    const int64_t at = in.at;
    const int count = kGeneral ? in.count : group < t.groups ? kDreGroup : 0;

    // Decode, update with the fresh moments, store the parameter.
    float m[kPacks][kWidth], v[kPacks][kWidth];
    adamw::Range m_range, v_range;
    const adamw::Decoder m_decoder(in.m_maximum * c.m_feed, in.m_exponent), v_decoder(in.v_maximum * c.v_feed, in.v_exponent);
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      m_decoder.template powers<kWidth, true>(in.m[j], m[j]);
      v_decoder.template powers<kWidth, false>(in.v[j], v[j]);
      float p[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float g = in.g[j].value(i) * s.grad_unit;
        m[j][i] = __fmaf_rn(m_decoder.factor, m[j][i], g);
        v[j][i] = __fmaf_rn(v_decoder.factor, v[j][i], __fmul_rn(g, g));
        const float step = m[j][i] * rcp_approx(__fmaf_rn(sqrt_approx(v[j][i]), s.slope, s.floor));
        p[i] = __fmaf_rn(in.p[j].value(i), s.decay, -step);
      }
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        m_range.fold(float_bits(m[j][i]) & 0x7FFFFFFFu, float_bits(m[j][i + 1]) & 0x7FFFFFFFu);
        v_range.fold(float_bits(v[j][i]), float_bits(v[j][i + 1]));
      }
      const int left = count - In::behind(j);
      if constexpr (sizeof(typename In::Value) == 4) {
        optim::Pack<float, kWidth> pack;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) pack.words[i] = float_bits(p[i]);
        optim::store_pack((kMaster ? t.master : static_cast<float*>(t.param)) + at + In::behind(j), pack, left, whole);
        if constexpr (kMaster && std::is_same_v<Param, float>)
          optim::store_pack(static_cast<float*>(t.param) + at + In::behind(j), pack, left, whole);
      } else {
        const uint64_t element = t.offset + static_cast<uint64_t>(at + In::behind(j));
        const PhiloxWords random = optim::param_bits(element, s.step, launch.keys, whole);
        optim::store_pack(static_cast<uint16_t*>(t.param) + at + In::behind(j), optim::round_stochastically(p, random), left, whole);
      }
      if constexpr (kMaster && sizeof(Param) == 2)
        optim::store_pack(static_cast<uint16_t*>(t.param) + at + In::behind(j), optim::round_to_nearest<kWidth>(p), left, whole);
    }

    const uint32_t this_group = group;
    group += stride;
    if (In::kAhead) in.load(t, groups_per_row, group);

    // New scales. Elements past a row's end are zeros and change neither range. Even lanes work out m's, odd lanes v's.
    adamw::Range range = adamw::select(odd, v_range, m_range);
    range.fold(adamw::select(odd, m_range, v_range).of_lane(1));
#pragma unroll
    for (int mask = 2; mask < kLanes; mask *= 2) range.fold(range.of_lane(mask));
    const adamw::Stretch mine(range);
    const adamw::Encoder other{__shfl_xor_sync(adamw::kWarp, mine.encoder.k, 1), __shfl_xor_sync(adamw::kWarp, mine.encoder.offset, 1)};
    const adamw::Encoder m_encoder = odd ? other : mine.encoder, v_encoder = odd ? mine.encoder : other;
    if (this_group < t.groups && threadIdx.x % kLanes < 2) {
      maxima[this_group] = mine.maximum * unit;
      exponents[this_group] = static_cast<uint8_t>(mine.exponent);
    }

    if (kGeneral && launch.stochastic_states) {
      const dre::Scale here{mine.maximum * unit, mine.exponent};
      const dre::Scale there{__shfl_xor_sync(adamw::kWarp, here.maximum, 1), __shfl_xor_sync(adamw::kWarp, here.exponent, 1)};
      const dre::Scale m_scale = odd ? there : here, v_scale = odd ? here : there;
      const dre::Encoder m_random(m_scale), v_random(v_scale);
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        optim::Pack<uint8_t, kWidth> m_codes, v_codes;
#pragma unroll
        for (int quad = 0; quad < kWidth / 4; ++quad) {
          const uint64_t element = t.offset + static_cast<uint64_t>(at + In::behind(j) + 4 * quad);
          const PhiloxWords random = optim::state_bits(element, s.step, launch.keys, whole);
          float fresh_m[4], fresh_v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) fresh_m[i] = m[j][4 * quad + i] * c.m_unit, fresh_v[i] = v[j][4 * quad + i] * c.v_unit;
          m_codes.words[quad] = m_random.stochastic(fresh_m, random.w, 0, m_scale);
          v_codes.words[quad] = v_random.stochastic(fresh_v, random.w, 16, v_scale);
        }
        optim::store_pack(t.m_codes + at + In::behind(j), m_codes, count - In::behind(j), whole);
        optim::store_pack(t.v_codes + at + In::behind(j), v_codes, count - In::behind(j), whole);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int left = count - In::behind(j);
        optim::Pack<uint8_t, kWidth> m_codes, v_codes;
#pragma unroll
        for (int quad = 0; quad < kWidth / 4; ++quad) {
          m_codes.words[quad] = m_encoder.template quad<true>(m[j] + 4 * quad);
          v_codes.words[quad] = v_encoder.template quad<false>(v[j] + 4 * quad);
        }
        optim::store_pack(t.m_codes + at + In::behind(j), m_codes, left, whole);
        optim::store_pack(t.v_codes + at + In::behind(j), v_codes, left, whole);
      }
    }
  }
}
bool aligned_to(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int64_t groups_of(const AdamwTensor& t) { return t.rows * ((t.row_length + kDreGroup - 1) / kDreGroup); }

// Packs of 4 elements where a lane holds fp32 parameters, of 8 where it rounds bf16 ones.
bool is_aligned(const AdamwTensor& t) {
  const int width = t.param_type == DType::bf16 && !t.master ? 8 : 4;
  const auto bytes = [&](DType type) { return std::min(16, width * (type == DType::f32 ? 4 : 2)); };
  return t.row_length % width == 0 && t.offset % width == 0 && aligned_to(t.param, bytes(t.param_type)) &&
         aligned_to(t.grad, bytes(t.grad_type)) && aligned_to(t.master, 16) && aligned_to(t.m_codes, width) && aligned_to(t.v_codes, width);
}

// Tensors of one kind, kMaxTensors a launch.
template <class Param, bool kMaster, class Grad, bool kGeneral>
void launch_kind(const std::vector<const AdamwTensor*>& tensors, const AdamwOptions& o, cudaStream_t stream) {
  for (size_t begin = 0; begin < tensors.size();) {
    Launch launch{o.lr, o.grad_scale, unit_constants(o), PhiloxKeys(o.seed), o.stochastic_states, 0, {}, {}};
    int64_t blocks = 0;
    while (begin < tensors.size() && launch.count < kMaxTensors) {
      const AdamwTensor& t = *tensors[begin];
      const int64_t groups = groups_of(t), more = (groups + kGroupsPerBlock - 1) / kGroupsPerBlock;
      if (launch.count > 0 && blocks + more > 0x7FFFFFFF) break;
      launch.first_block[launch.count] = static_cast<uint32_t>(blocks);
      launch.entries[launch.count++] = {t.param,
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
                                        static_cast<uint32_t>(groups),
                                        is_aligned(t)};
      blocks += more;
      ++begin;
    }
    adamw_kernel<Param, kMaster, Grad, kGeneral><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(launch);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string("adamw_dre_: launch failed: ") + cudaGetErrorString(error));
  }
}

template <class Param, bool kMaster, class Grad>
void launch_both(const std::vector<const AdamwTensor*> (&tensors)[2], const AdamwOptions& o, cudaStream_t stream) {
  launch_kind<Param, kMaster, Grad, false>(tensors[0], o, stream);
  launch_kind<Param, kMaster, Grad, true>(tensors[1], o, stream);
}

}  // namespace

void adamw_dre_cuda(const AdamwTensor* tensors, int64_t count, const AdamwOptions& o, void* stream) {
  std::vector<const AdamwTensor*> kinds[2][2][2][2];  // [parameter is bf16][has a master][gradient is bf16][takes the general kernel]
  for (int64_t i = 0; i < count; ++i) {
    const AdamwTensor& t = tensors[i];
    const bool general = o.stochastic_states || !is_aligned(t) || t.row_length % kDreGroup;
    kinds[t.param_type == DType::bf16][t.master != nullptr][t.grad_type == DType::bf16][general].push_back(&t);
  }
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  launch_both<float, false, float>(kinds[0][0][0], o, s);
  launch_both<float, false, uint16_t>(kinds[0][0][1], o, s);
  launch_both<float, true, float>(kinds[0][1][0], o, s);
  launch_both<float, true, uint16_t>(kinds[0][1][1], o, s);
  launch_both<uint16_t, false, float>(kinds[1][0][0], o, s);
  launch_both<uint16_t, false, uint16_t>(kinds[1][0][1], o, s);
  launch_both<uint16_t, true, float>(kinds[1][1][0], o, s);
  launch_both<uint16_t, true, uint16_t>(kinds[1][1][1], o, s);
}

}  // namespace eightfold
