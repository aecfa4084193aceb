// Eight elements at a time on the device: 16-byte loads, packed maxima, and E4M3 conversion with the bytes of core/fp8.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "core/fp8.h"

namespace eightfold {

// Eight consecutive elements of a row as they lie in memory. T is float or __nv_bfloat16. Maxima are taken on the words
// themselves, two bf16 magnitudes at once; integer order puts NaN above Inf above all else.
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
    for (int j = 0; j < 4; ++j) {
      __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
      words[j] = static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
    }
  }
  static __device__ uint32_t magnitude(uint32_t word) { return word & 0x7FFF7FFFu; }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
  static __device__ uint32_t amax_bits(uint32_t word, int i) { return i ? word & 0xFFFF0000u : word << 16; }
  static __device__ uint32_t widest_bits(uint32_t word) { return max(word << 16, word & 0xFFFF0000u); }
};

// How many of the eight elements from (row, col) exist.
__device__ __forceinline__ int octet_count(int64_t row, int64_t col, int64_t rows, int64_t cols) {
  return row < rows ? static_cast<int>(max(min(cols - col, int64_t{8}), int64_t{0})) : 0;
}

// Loads eight elements of which the first `count` exist; the rest are zero. kVector: the address is a multiple of 16 bytes and
// all eight exist or none (count <= 0).
template <bool kVector, class T>
__device__ __forceinline__ Octet<T> load_octet(const T* at, int count) {
  Octet<T> octet{};
  if constexpr (kVector) {
    if (count <= 0) return octet;
#pragma unroll
    for (int i = 0; i < Octet<T>::kWords; i += 4) {
      uint4 quad = __ldg(reinterpret_cast<const uint4*>(at) + i / 4);
      octet.words[i] = quad.x, octet.words[i + 1] = quad.y, octet.words[i + 2] = quad.z, octet.words[i + 3] = quad.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j >= count) continue;
      if constexpr (sizeof(T) == 4)
        octet.words[j] = __float_as_uint(__ldg(at + j));
      else
        octet.words[j / 2] |= static_cast<uint32_t>(__bfloat16_as_ushort(__ldg(at + j))) << (j % 2 * 16);
    }
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

// Division by one group's scale. An IEEE division an element would cost more than the memory traffic of a cast, so the
// reciprocal is taken once a group and each quotient is corrected by one Newton step. The result may miss IEEE division by one
// ulp, but never on a rounding boundary of E4M3: checked exhaustively over the 2^23 scale mantissas, the boundaries between
// codes, and the fp32 neighbours of boundary * scale. The order of signs keeps -0.
struct GroupDivider {
  float scale, inverse;

  static __device__ GroupDivider of(float scale) { return {scale, __frcp_rn(scale)}; }
  __device__ float quotient(float x) const {
    float q = x * inverse;
    return fmaf(fmaf(scale, q, -x), -inverse, q);
  }
  __device__ bool is_nan() const { return scale != scale; }
};

// Two and four codes; the first element lies in the lowest byte. NaN groups are the caller's (nan_group).
__device__ __forceinline__ uint32_t encode2(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint32_t encode4(float a, float b, float c, float d) { return encode2(a, b) | encode2(c, d) << 16; }

constexpr uint32_t kE4M3NaN4 = 0x7F7F7F7Fu;

// Eight codes of one row in one group.
template <class T>
__device__ __forceinline__ uint2 encode_octet(const Octet<T>& x, GroupDivider by) {
  float q[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) q[j] = by.quotient(x.value(j));
  uint2 codes = make_uint2(encode4(q[0], q[1], q[2], q[3]), encode4(q[4], q[5], q[6], q[7]));
  return by.is_nan() ? make_uint2(kE4M3NaN4, kE4M3NaN4) : codes;
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
