// Eight elements at a time on the device: 16-byte loads, packed maxima, and E4M3 conversion with the bytes of core/fp8.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "core/approx.cuh"
#include "core/fp8.h"

namespace eightfold {

// Eight consecutive elements of a row as they lie in memory. T is float or __nv_bfloat16. Maxima are taken on the words
// themselves, two bf16 at once; NaN is above Inf, Inf above all else. Between magnitude() and *_bits(), a word is a maximum whose signs
// mean nothing.
template <class T>
struct Octet;

template <>
struct Octet<float> {
  static constexpr int kPerWord = 1, kWords = 8;
  uint32_t words[8];

  __device__ float value(int j) const { return __uint_as_float(words[j]); }
  __device__ void set(const float (&v)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j] = __float_as_uint(v[j]);
  }
  static __device__ uint32_t magnitude(uint32_t word) { return word & 0x7FFFFFFFu; }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }
  static __device__ uint32_t amax_bits(uint32_t word, int) { return word; }  // as fp32, of the word's i-th element
  static __device__ uint32_t widest_bits(uint32_t word) { return word; }     // as fp32, over the word's elements
};

template <>
struct Octet<__nv_bfloat16> {
  static constexpr int kPerWord = 2, kWords = 4;
  uint32_t words[4];

  __device__ float value(int j) const { return __uint_as_float(j & 1 ? words[j / 2] & 0xFFFF0000u : words[j / 2] << 16); }
  __device__ void set(const float (&v)[8]) {  // rounds to nearest even
#pragma unroll
    for (int j = 0; j < 4; ++j) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[j]) : "f"(v[2 * j + 1]), "f"(v[2 * j]));
  }
  static __device__ uint32_t magnitude(uint32_t word) { return word; }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) {  // by magnitude, the signs multiplied; a NaN becomes 0x7FFF
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  }
  static __device__ uint32_t amax_bits(uint32_t word, int i) { return (i ? word : word << 16) & 0x7FFF0000u; }
  static __device__ uint32_t widest_bits(uint32_t word) { return max(amax_bits(word, 0), amax_bits(word, 1)); }
};

// Eight E4M3 codes of one row with the scale of their group: a third of the registers of the eight values.
struct ScaledCodes;

template <>
struct Octet<ScaledCodes> {
  static constexpr int kPerWord = 1, kWords = 3;
  uint32_t words[3];  // codes, codes, scale

  // Its maxima are fp32 bits.
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }
  static __device__ uint32_t amax_bits(uint32_t word, int) { return word; }

  __device__ float value(int j) const {
    const uint32_t pair = words[j / 4] >> (j / 2 % 2 * 16);
    const float2 codes = __half22float2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
    return __fmul_rn(j % 2 ? codes.y : codes.x, __uint_as_float(words[2]));
  }
};

// bf16(code * scale) of each.
__device__ __forceinline__ Octet<__nv_bfloat16> widened(const Octet<ScaledCodes>& codes) {
  float values[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = codes.value(j);
  Octet<__nv_bfloat16> wide;
  wide.set(values);
  return wide;
}

// Maxima of an octet, as one word, and of octets that lie below each other, as the words of an octet.
template <class T>
__device__ __forceinline__ uint32_t octet_maximum(const Octet<T>& x) {
  uint32_t word = Octet<T>::magnitude(x.words[0]);
#pragma unroll
  for (int w = 1; w < Octet<T>::kWords; ++w) word = Octet<T>::larger(word, Octet<T>::magnitude(x.words[w]));
  return word;
}

template <class T, int kRows>
__device__ __forceinline__ void octets_maxima(const Octet<T> (&x)[kRows], uint32_t (&words)[8 / Octet<T>::kPerWord]) {
#pragma unroll
  for (int w = 0; w < Octet<T>::kWords; ++w) {
    words[w] = Octet<T>::magnitude(x[0].words[w]);
#pragma unroll
    for (int p = 1; p < kRows; ++p) words[w] = Octet<T>::larger(words[w], Octet<T>::magnitude(x[p].words[w]));
  }
}

template <int kRows>
__device__ __forceinline__ void octets_maxima(const Octet<ScaledCodes> (&x)[kRows], uint32_t (&words)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    words[j] = 0;
#pragma unroll
    for (int p = 0; p < kRows; ++p) words[j] = max(words[j], __float_as_uint(x[p].value(j)) & 0x7FFFFFFFu);
  }
}

// The same octet, of which the compiler knows nothing: it unpacks the words again instead of keeping the eight values in registers
// from their last use on.
template <class T>
__device__ __forceinline__ Octet<T> unpacked_anew(Octet<T> x) {
#pragma unroll
  for (int w = 0; w < Octet<T>::kWords; ++w) asm volatile("" : "+r"(x.words[w]));
  return x;
}

// How many of the eight elements from (row, col) exist.
__device__ __forceinline__ int octet_count(int64_t row, int64_t col, int64_t rows, int64_t cols) {
  return row < rows ? static_cast<int>(max(min(cols - col, int64_t{8}), int64_t{0})) : 0;
}

// Loads eight elements of which the first `count` exist; the rest are zero. kVector: the address is a multiple of 16 bytes and
// all eight exist or none (count <= 0). kShared: another block of the same launch may have written them.
template <bool kVector, bool kShared = false, class T>
__device__ __forceinline__ Octet<T> load_octet(const T* at, int count) {
  Octet<T> octet{};
  if constexpr (kVector) {
    if (count <= 0) return octet;
#pragma unroll
    for (int i = 0; i < Octet<T>::kWords; i += 4) {
      const uint4* quads = reinterpret_cast<const uint4*>(at) + i / 4;
      const uint4 quad = kShared ? __ldcg(quads) : __ldg(quads);
      octet.words[i] = quad.x, octet.words[i + 1] = quad.y, octet.words[i + 2] = quad.z, octet.words[i + 3] = quad.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j >= count) continue;
      const T value = kShared ? __ldcg(at + j) : __ldg(at + j);
      if constexpr (sizeof(T) == 4)
        octet.words[j] = __float_as_uint(value);
      else
        octet.words[j / 2] |= static_cast<uint32_t>(__bfloat16_as_ushort(value)) << (j % 2 * 16);
    }
  }
  return octet;
}

// From shared memory, 16-byte aligned.
template <class T>
__device__ __forceinline__ Octet<T> load_shared(const T* at) {
  Octet<T> octet;
#pragma unroll
  for (int i = 0; i < Octet<T>::kWords; i += 4) {
    const uint4 quad = reinterpret_cast<const uint4*>(at)[i / 4];
    octet.words[i] = quad.x, octet.words[i + 1] = quad.y, octet.words[i + 2] = quad.z, octet.words[i + 3] = quad.w;
  }
  return octet;
}

// Stores eight elements of which the first `count` exist.
template <class T>
__device__ __forceinline__ void store_octet(T* at, const Octet<T>& octet, int count, bool vector) {
  if (vector && count >= 8) {
#pragma unroll
    for (int i = 0; i < Octet<T>::kWords; i += 4)
      reinterpret_cast<uint4*>(at)[i / 4] = make_uint4(octet.words[i], octet.words[i + 1], octet.words[i + 2], octet.words[i + 3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j >= count) continue;
    if constexpr (sizeof(T) == 4)
      at[j] = octet.value(j);
    else
      at[j] = __ushort_as_bfloat16(static_cast<unsigned short>(octet.words[j / 2] >> (j % 2 * 16)));
  }
}

// All eight, 16-byte aligned, in global memory. Never in pieces, as the compiler may store words that assembly has made.
template <class T>
__device__ __forceinline__ void store_octet_whole(T* at, const Octet<T>& octet) {
#pragma unroll
  for (int i = 0; i < Octet<T>::kWords; i += 4)
    __stwb(reinterpret_cast<uint4*>(at) + i / 4, make_uint4(octet.words[i], octet.words[i + 1], octet.words[i + 2], octet.words[i + 3]));
}

// Division of a group's values by its scale. An IEEE division an element would cost more than the memory traffic of a cast, so the
// reciprocal is taken once a group. A quotient may miss IEEE division by one ulp, but never on a rounding boundary of E4M3, so that
// the codes are those of a true division; the order of signs keeps -0.
//
// fp32: each quotient is corrected by one Newton step. Checked exhaustively over the 2^23 scale mantissas, the boundaries between
// codes, and the fp32 neighbours of boundary * scale.
// bf16 (values and the maximum that gave the scale): the reciprocal in two parts, an instruction less a quotient. Any reciprocal up
// to 6 ulp too small will do, and too small keeps the second part positive: checked for every pair of a value and a maximum.
template <class T>
struct GroupDivider {
  static constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  float inverse;
  float aid;  // fp32: the scale; bf16: what `inverse` lacks

  static __device__ GroupDivider of(float scale) {
    if constexpr (!kBf16) return {reciprocal(scale), scale};
    const float below = __uint_as_float(__float_as_uint(rcp_approx(scale)) - 3);
    return {below, __fmul_rn(__fmaf_rn(-scale, below, 1.0f), below)};
  }
  __device__ float quotient(float x) const {
    if constexpr (!kBf16) {
      const float q = x * inverse;
      return fmaf(fmaf(aid, q, -x), -inverse, q);
    } else {
      return __fmaf_rn(x, inverse, __fmul_rn(x, aid));
    }
  }
};

// Two and four codes; the first element lies in the lowest byte. In a group whose scale is NaN every quotient is the positive NaN,
// whose code is 0x7F.
__device__ __forceinline__ uint32_t encode2(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint32_t encode4(float a, float b, float c, float d) { return encode2(a, b) | encode2(c, d) << 16; }

// Eight codes of one row in one group.
template <class T>
__device__ __forceinline__ uint2 encode_octet(const Octet<T>& x, GroupDivider<T> by) {
  float q[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) q[j] = by.quotient(x.value(j));
  return make_uint2(encode4(q[0], q[1], q[2], q[3]), encode4(q[4], q[5], q[6], q[7]));
}

// Four codes -> fp32, exact; NaN codes give a NaN.
__device__ __forceinline__ void decode4(uint32_t codes, float* out) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes >> (16 * i)), __NV_E4M3);
    float2 values = __half22float2(pair);
    out[2 * i] = values.x, out[2 * i + 1] = values.y;
  }
}

// Eight codes of a row, of which the first `count` exist. Vector: the address is a multiple of 8.
__device__ __forceinline__ void store_codes8(uint8_t* at, uint2 codes, int count, bool vector) {
  if (vector && count >= 8) {
    *reinterpret_cast<uint2*>(at) = codes;
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j < count) at[j] = static_cast<uint8_t>((j < 4 ? codes.x : codes.y) >> (j % 4 * 8));
}

template <bool kVector>
__device__ __forceinline__ uint2 load_codes8(const uint8_t* at, int count) {
  uint2 codes = make_uint2(0, 0);
  if constexpr (kVector) {
    if (count > 0) codes = __ldg(reinterpret_cast<const uint2*>(at));
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < count) (j < 4 ? codes.x : codes.y) |= static_cast<uint32_t>(__ldg(at + j)) << (j % 4 * 8);
  }
  return codes;
}

}  // namespace eightfold
