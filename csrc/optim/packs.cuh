// What one lane holds of a tensor: packs of neighbouring elements as they lie in memory, the random bits that round them, and rounding.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "optim/random_bits.h"

namespace eightfold::optim {

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

// A word or vector of words; kPast: past the L1 cache, which keeps what is read again.
template <bool kPast, class Word>
__device__ __forceinline__ Word load_words(const void* at) {
  const Word* words = static_cast<const Word*>(at);
  if constexpr (kPast)
    return __ldcg(words);
  else
    return *words;
}

// Elements of which the first `count` exist; the others are 0. `vector`: all exist or none, and the address is aligned.
template <class T, int kWidth, bool kPast = false>
__device__ __forceinline__ Pack<T, kWidth> load_pack(const T* at, int count, bool vector) {
  using P = Pack<T, kWidth>;
  P pack{};
  if (vector) {
    if (count <= 0) return pack;
    if constexpr (P::kWords == 1) {
      pack.words[0] = load_words<kPast, uint32_t>(at);
    } else if constexpr (P::kWords == 2) {
      const uint2 two = load_words<kPast, uint2>(at);
      pack.words[0] = two.x, pack.words[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < P::kWords; i += 4) {
        const uint4 four = load_words<kPast, uint4>(reinterpret_cast<const uint4*>(at) + i / 4);
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

}  // namespace eightfold::optim
