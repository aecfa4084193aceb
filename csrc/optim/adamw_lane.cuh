// What one lane of the AdamW kernel holds of a group: packs of neighbouring elements as they lie in memory, their random bits, and
// both directions of the DRE power. Moments are in units that make them cheap (adamw_dre_sm90.cu says which): a power and its
// factor are one multiply-add of the update, no value is subnormal, and a group's constants are worked out once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "core/approx.cuh"
#include "optim/adamw_dre.h"
#include "optim/dre_group.cuh"

namespace eightfold::adamw {

constexpr uint32_t kWarp = 0xFFFFFFFFu;

template <class T, int kWidth>
struct Pack {
  static constexpr int kWords = kWidth * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(T) == 4)
      return bits_float(words[i]);
    else
      return bits_float(i & 1 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
  }
};

// Elements of which the first `count` exist; the others are 0. `vector`: all exist or none, and the address is aligned.
template <class T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> load_pack(const T* at, int count, bool vector) {
  using P = Pack<T, kWidth>;
  P pack{};
  if (vector) {
    if (count <= 0) return pack;
    if constexpr (P::kWords == 1) {
      pack.words[0] = *reinterpret_cast<const uint32_t*>(at);
    } else if constexpr (P::kWords == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      pack.words[0] = two.x, pack.words[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < P::kWords; i += 4) {
        const uint4 four = reinterpret_cast<const uint4*>(at)[i / 4];
        pack.words[i] = four.x, pack.words[i + 1] = four.y, pack.words[i + 2] = four.z, pack.words[i + 3] = four.w;
      }
    }
    return pack;
  }
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) {
      if constexpr (sizeof(T) == 4)
        pack.words[i] = float_bits(at[i]);
      else
        pack.words[i / kPerWord] |= static_cast<uint32_t>(at[i]) << (i % kPerWord * 8 * sizeof(T));
    }
  return pack;
}

template <class T, int kWidth>
__device__ __forceinline__ void store_pack(T* at, const Pack<T, kWidth>& pack, int count, bool vector) {
  using P = Pack<T, kWidth>;
  if (vector) {
    if (count <= 0) return;
    if constexpr (P::kWords == 1) {
      *reinterpret_cast<uint32_t*>(at) = pack.words[0];
    } else if constexpr (P::kWords == 2) {
      *reinterpret_cast<uint2*>(at) = make_uint2(pack.words[0], pack.words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < P::kWords; i += 4)
        reinterpret_cast<uint4*>(at)[i / 4] = make_uint4(pack.words[i], pack.words[i + 1], pack.words[i + 2], pack.words[i + 3]);
    }
    return;
  }
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) {
      if constexpr (sizeof(T) == 4)
        at[i] = bits_float(pack.words[i]);
      else
        at[i] = static_cast<T>(pack.words[i / kPerWord] >> (i % kPerWord * 8 * sizeof(T)));
    }
}

// Eight neighbours' bits, two a word. `vector`: `first` is a multiple of 8.
__device__ __forceinline__ PhiloxWords param_bits(uint64_t first, uint32_t step, const PhiloxKeys& keys, bool vector) {
  if (vector) return random_words(first >> 3, step, 0, keys);
  PhiloxWords words{};
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = random_for_param(first + i, step, keys) << (i % 2 * 16);
#pragma unroll
    for (int word = 0; word < 4; ++word) words.w[word] |= i / 2 == word ? bits : 0u;
  }
  return words;
}

// Four neighbours' words. `vector`: `first` is a multiple of 4.
__device__ __forceinline__ PhiloxWords state_bits(uint64_t first, uint32_t step, const PhiloxKeys& keys, bool vector) {
  if (vector) return random_words(first >> 2, step, 1, keys);
  PhiloxWords words{};
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = random_for_states(first + i, step, keys);
#pragma unroll
    for (int target = 0; target < 4; ++target) words.w[target] = i == target ? word : words.w[target];
  }
  return words;
}

// Adding the bits below the cut and cutting is right for all but NaN, whose payload may overflow into the sign: products of
// neighbours find a NaN (or an Inf, or a product that overflows) at half an instruction an element, and then each is looked at.
__device__ __forceinline__ Pack<uint16_t, 8> round_stochastically(const float (&x)[8], PhiloxWords random) {
  Pack<uint16_t, 8> rounded;
  float watch = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t even = __dp2a_lo(random.w[i], 1u, float_bits(x[2 * i]));  // + (random.w[i] & 0xFFFF)
    const uint32_t odd = float_bits(x[2 * i + 1]) + (random.w[i] >> 16);
    rounded.words[i] = __byte_perm(even, odd, 0x7632);
    watch = fmaf(x[2 * i], x[2 * i + 1], watch);
  }
  if (!(fabsf(watch) <= 3e38f)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (x[2 * i] != x[2 * i]) rounded.words[i] = (rounded.words[i] & 0xFFFF0000u) | 0x7FC0u;
      if (x[2 * i + 1] != x[2 * i + 1]) rounded.words[i] = (rounded.words[i] & 0xFFFFu) | 0x7FC00000u;
    }
  }
  return rounded;
}

template <int kWidth>
__device__ __forceinline__ Pack<uint16_t, kWidth> round_to_nearest(const float (&x)[kWidth]) {
  Pack<uint16_t, kWidth> rounded;
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    rounded.words[i] = static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
  }
  return rounded;
}

// code -> power (|code| / 448)^(1/k), to be multiplied by `factor`, which is the group's maximum in some unit.
struct Decoder {
  float factor, inverse_k, offset;

  __device__ __forceinline__ Decoder(float maximum, uint32_t exponent) : factor(maximum) {
    inverse_k = 16.0f * rcp_approx(static_cast<float>(exponent + 1));
    offset = lg2_approx(kE4M3Max) * inverse_k;  // by the instruction, so that code 448 cancels
    if (exponent < 2) {                         // powers down to 2^-269: part of the factor moves into them
      const float shift = exponent ? 16.0f : 125.0f;
      offset -= shift, factor *= ex2_approx(-shift);
    }
  }

  template <int kWidth, bool kSigned>
  __device__ __forceinline__ void powers(const Pack<uint8_t, kWidth>& codes, float (&r)[kWidth]) const {
#pragma unroll
    for (int pair = 0; pair < kWidth / 2; ++pair) {
      const uint32_t two = codes.words[pair / 2] >> (pair % 2 * 16);
      const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
      const float2 values = __half22float2(__half2(halves));
      r[2 * pair] = power<kSigned>(values.x), r[2 * pair + 1] = power<kSigned>(values.y);
    }
  }

 private:
  template <bool kSigned>
  __device__ __forceinline__ float power(float value) const {
    const float y = ex2_approx(__fmaf_rn(lg2_approx(fabsf(value)), inverse_k, -offset));
    return kSigned ? bits_float(float_bits(y) | (float_bits(value) & 0x80000000u)) : y;
  }
};

// Largest and smallest non-zero magnitude, as integers: NaN is above Inf above all else.
struct Range {
  uint32_t max_bits = 0, min_less_one = 0xFFFFFFFFu;

  __device__ __forceinline__ void fold(uint32_t a, uint32_t b) {  // magnitudes
    max_bits = __vimax3_u32(a, b, max_bits);
    min_less_one = __viaddmin_u32(a, 0xFFFFFFFFu, min_less_one);
    min_less_one = __viaddmin_u32(b, 0xFFFFFFFFu, min_less_one);
  }
  __device__ __forceinline__ void fold(Range other) {
    max_bits = max(max_bits, other.max_bits);
    min_less_one = min(min_less_one, other.min_less_one);
  }
  __device__ __forceinline__ Range of_lane(int mask) const {
    return {__shfl_xor_sync(kWarp, max_bits, mask), __shfl_xor_sync(kWarp, min_less_one, mask)};
  }
};

__device__ __forceinline__ Range select(bool first, Range a, Range b) {
  return {first ? a.max_bits : b.max_bits, first ? a.min_less_one : b.min_less_one};
}

// value -> code: log2 of the expanded value is k log2|x| + offset.
struct Encoder {
  float k, offset;

  // Four neighbours; a group with a NaN has a NaN offset and codes 0x7F.
  template <bool kSigned>
  __device__ __forceinline__ uint32_t quad(const float* x) const {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = ex2_approx(__fmaf_rn(lg2_approx(fabsf(x[i])), k, offset));
      if (kSigned) y[i] = bits_float(float_bits(y[i]) | (float_bits(x[i]) & 0x80000000u));
    }
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(y[0], y[1]), __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(y[2], y[3]), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
  }
};

// A group's new scale: dre.h's rule on approximate logarithms. k is a rounded number and only differs from range_exponent's where
// that is a coin's toss. Elements below 2^-126 of the unit count as 2^-126.
struct Stretch {
  Encoder encoder;
  float maximum;      // in the unit of the range
  uint32_t exponent;  // 16 k - 1

  __device__ __forceinline__ explicit Stretch(Range range) {
    constexpr uint32_t kSmallestNormal = 0x00800000u;
    constexpr float kInteger = 8388608.0f;  // 2^23: adding it rounds to integers
    maximum = bits_float(range.max_bits < 0x7F800000u ? range.max_bits : kQuietNaN);
    const float log2_high = lg2_approx(bits_float(max(float_bits(maximum), kSmallestNormal)));
    const float log2_low = lg2_approx(bits_float(max(range.min_less_one + 1u, kSmallestNormal)));
    const float inverse = rcp_approx(fmaxf(log2_high - log2_low, 1.0f));
    const float k16 = fminf(__fmaf_rn(inverse, 16.0f * kDreBoundLog2, 0.5f), inverse * (16.0f * kDreTopLog2));
    const float shifted = __fadd_rz(fminf(k16, 256.0f), kInteger);
    exponent = float_bits(shifted) - float_bits(kInteger) - 1u;
    encoder.k = (shifted - kInteger) * 0.0625f;
    encoder.offset = __fmaf_rn(-encoder.k, log2_high, kE4M3MaxLog2);
  }
};

}  // namespace eightfold::adamw
