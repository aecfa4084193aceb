// One DRE group on 8 lanes: lane l holds elements 4 (l + 8 j) + i of its group, j, i < 4. Four neighbours make a granule, loaded
// and stored in one instruction; the lanes of a group read consecutive granules. A warp holds four groups.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "core/approx.cuh"
#include "optim/dre.h"

namespace eightfold::dre {

constexpr int kLanes = 8;
constexpr int kGranules = 4;

struct Scale {
  float maximum;
  uint32_t exponent;  // as stored: 16 k - 1
};

// Where a group lies: count is 0 past the last group.
struct Span {
  int64_t begin;
  int count;
};

__device__ __forceinline__ Span group_span(uint32_t group, uint32_t groups, uint32_t groups_per_row, int64_t row_length) {
  if (group >= groups) return {0, 0};
  if (row_length == static_cast<int64_t>(groups_per_row) * kDreGroup) return {static_cast<int64_t>(group) * kDreGroup, kDreGroup};
  uint32_t row = group / groups_per_row, in_row = group - row * groups_per_row;
  int64_t col = static_cast<int64_t>(in_row) * kDreGroup, left = row_length - col;
  return {row * row_length + col, static_cast<int>(left < kDreGroup ? left : kDreGroup)};
}

// First element of this lane's granule j, and how many of its four elements exist.
struct Granule {
  int64_t begin;
  int count;
};

__device__ __forceinline__ Granule granule_of(Span span, int j) {
  int col = 4 * (static_cast<int>(threadIdx.x) % kLanes + kLanes * j);
  int left = span.count - col;
  return {span.begin + col, left < 0 ? 0 : (left > 4 ? 4 : left)};
}

// `aligned`: granules are aligned and whole (row lengths are multiples of 4). Missing elements read as 0.
__device__ __forceinline__ void load_granule(const float* source, Granule g, bool aligned, float (&x)[4]) {
  if (aligned) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (g.count) four = *reinterpret_cast<const float4*>(source + g.begin);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = i < g.count ? source[g.begin + i] : 0.0f;
}

__device__ __forceinline__ void load_granule(const uint16_t* source, Granule g, bool aligned, float (&x)[4]) {
  if (aligned) {
    uint2 four = make_uint2(0, 0);
    if (g.count) four = *reinterpret_cast<const uint2*>(source + g.begin);
    x[0] = bits_float(four.x << 16), x[1] = bits_float(four.x & 0xFFFF0000u);
    x[2] = bits_float(four.y << 16), x[3] = bits_float(four.y & 0xFFFF0000u);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = i < g.count ? bf16_to_float(source[g.begin + i]) : 0.0f;
}

__device__ __forceinline__ uint32_t load_codes(const uint8_t* source, Granule g, bool aligned) {
  if (aligned) return g.count ? *reinterpret_cast<const uint32_t*>(source + g.begin) : 0u;
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < g.count) codes |= static_cast<uint32_t>(source[g.begin + i]) << (8 * i);
  return codes;
}

__device__ __forceinline__ void store_granule(float* target, Granule g, bool aligned, const float (&x)[4]) {
  if (aligned) {
    if (g.count) *reinterpret_cast<float4*>(target + g.begin) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < g.count) target[g.begin + i] = x[i];
}

__device__ __forceinline__ void store_granule(uint16_t* target, Granule g, bool aligned, const uint16_t (&x)[4]) {
  if (aligned) {
    if (g.count)
      *reinterpret_cast<uint2*>(target + g.begin) =
          make_uint2(x[0] | static_cast<uint32_t>(x[1]) << 16, x[2] | static_cast<uint32_t>(x[3]) << 16);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < g.count) target[g.begin + i] = x[i];
}

__device__ __forceinline__ void store_codes(uint8_t* target, Granule g, bool aligned, uint32_t codes) {
  if (aligned) {
    if (g.count) *reinterpret_cast<uint32_t*>(target + g.begin) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < g.count) target[g.begin + i] = static_cast<uint8_t>(codes >> (8 * i));
}

// Magnitudes of four codes (sign bits cleared by the caller), exact.
__device__ __forceinline__ void magnitudes(uint32_t codes, float (&x)[4]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes >> (16 * pair)), __NV_E4M3);
    float2 two = __half22float2(__half2(halves));
    x[2 * pair] = two.x, x[2 * pair + 1] = two.y;
  }
}

// M (value / 448)^(1/k), 0 for 0 and positive for positive; the root is taken of the root so that it cannot underflow before M.
__device__ __forceinline__ float decode_magnitude(float value, float maximum, float half_inverse_k, float log2_top) {
  float root = ex2_approx((lg2_approx(value) - log2_top) * half_inverse_k);
  float x = (maximum * root) * root;
  float least = value > 0.0f ? kSmallestFloat : 0.0f;
  return x < least ? least : x;
}

__device__ __forceinline__ void decode_granule(uint32_t codes, Scale scale, float (&x)[4]) {
  const float half_inverse_k = half_inverse(static_cast<uint8_t>(scale.exponent));
  const float log2_top = lg2_approx(kE4M3Max);  // by the instruction, so that code 448 cancels exactly
  magnitudes(codes & 0x7F7F7F7Fu, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float mag = decode_magnitude(x[i], scale.maximum, half_inverse_k, log2_top);
    x[i] = bits_float(float_bits(mag) | ((codes << (24 - 8 * i)) & 0x80000000u));
  }
}

struct Range {
  uint32_t max_bits = 0, min_less_one = 0xFFFFFFFFu;

  __device__ __forceinline__ void fold(float x) {
    max_bits = fold_amax(max_bits, x);
    min_less_one = fold_min_nonzero(min_less_one, x);
  }
  // Over the 8 lanes of the group; every lane of the warp calls it.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) {
      max_bits = max(max_bits, __shfl_xor_sync(0xFFFFFFFFu, max_bits, lane));
      min_less_one = min(min_less_one, __shfl_xor_sync(0xFFFFFFFFu, min_less_one, lane));
    }
  }
  // 0 for a group of zeros, NaN for one that holds NaN or Inf.
  __device__ __forceinline__ float maximum() const { return bits_float(max_bits < 0x7F800000u ? max_bits : kQuietNaN); }
  __device__ __forceinline__ uint32_t exponent() const {
    bool ordinary = max_bits != 0 && max_bits < 0x7F800000u;
    float high = ordinary ? bits_float(max_bits) : 1.0f, low = ordinary ? bits_float(min_less_one + 1u) : 1.0f;
    return range_exponent(high, low);
  }
};

struct Encoder {
  float maximum, k, log2_maximum;

  __device__ __forceinline__ explicit Encoder(Scale scale)
      : maximum(scale.maximum), k(expansion(static_cast<uint8_t>(scale.exponent))), log2_maximum(lg2_approx_subnormal(scale.maximum)) {}

  // 448 (|x| / M)^k, at least the value of code 1 unless x is 0.
  __device__ __forceinline__ float expand(float x) const {
    float mag = fabsf(x);
    float y = kE4M3Max * ex2_approx((lg2_approx_subnormal(mag) - log2_maximum) * k);
    return mag == 0.0f ? 0.0f : fmaxf(y, kE4M3Tiny);
  }

  __device__ __forceinline__ uint32_t nearest(const float (&x)[4]) const {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = copysignf(expand(x[i]), x[i]);
    uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(y[0], y[1]), __NV_SATFINITE, __NV_E4M3);
    uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(y[2], y[3]), __NV_SATFINITE, __NV_E4M3);
    return maximum == maximum ? low | high << 16 : 0x7F7F7F7Fu;
  }

  // random: bits [shift, shift + 16) of each word.
  __device__ __forceinline__ uint32_t stochastic(const float (&x)[4], const uint32_t (&random)[4], int shift, Scale scale) const {
    const float half_inverse_k = half_inverse(static_cast<uint8_t>(scale.exponent)), log2_top = lg2_approx(kE4M3Max);
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float mag = fabsf(x[i]), y = fminf(expand(x[i]), kE4M3Max);
      uint32_t low = e4m3_floor(y), high = low + (low < kE4M3Top);
      float a = decode_magnitude(e4m3_to_float(static_cast<uint8_t>(low)), maximum, half_inverse_k, log2_top);
      float b = decode_magnitude(e4m3_to_float(static_cast<uint8_t>(high)), maximum, half_inverse_k, log2_top);
      float threshold = (static_cast<float>((random[i] >> shift) & 0xFFFFu) + 0.5f) * (1.0f / 65536.0f);
      uint32_t code = mag - a > threshold * (b - a) ? high : low;
      codes |= ((mag == 0.0f ? 0u : code) | (float_bits(x[i]) >> 24 & 0x80u)) << (8 * i);
    }
    return maximum == maximum ? codes : 0x7F7F7F7Fu;
  }
};

}  // namespace eightfold::dre
