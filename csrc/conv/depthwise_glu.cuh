// A block's part of images: a strip of rows, a tile of columns, and some octets of channels of the value half with the same of the gate
// half. It walks down the rows, three steps at once, one barrier a row:
//
//   silu      a row of x has come to shared memory by asynchronous copies, four rows ahead; each element's SiLU, in fp32, goes to
//             a row of pixels with one pixel more at either end. What lies outside the image came as zeros.
//   convolve  a thread has two channels of both halves and four columns: it reads the row before this one once and adds it to its
//             sums for three rows, above (which are then complete), here and below. Weights wait in its registers.
//   finish    what the kernel makes of a complete row.
//
// Only SiLUs at the edges of a part are taken by two blocks. Every sum runs over the taps in one order, wherever a pixel lies in a part.
#pragma once

#include <cuda_bf16.h>

#include "conv/depthwise_glu.h"
#include "core/barrier.cuh"
#include "core/fp8_vector.cuh"
#include "core/math.h"
#include "core/memory.cuh"

namespace eightfold::conv {

using Bf16 = __nv_bfloat16;

constexpr int kTaps = 9;
constexpr int kColumns = 4;  // of a thread that convolves
constexpr int kStages = 4;   // rows of x on their way; a power of two

// A pixel of kOctets octets of channels a half in shared memory: for each half the first four channels of every octet, then the
// last four, so that neither side has bank conflicts: octets come as two float4, and a thread reads a slot of two channels.
template <int kOctets>
struct Pixel {
  static constexpr int kSlots = 4 * kOctets, kHalf = 2 * kSlots, kFloats = 2 * kHalf;

  static __device__ __forceinline__ int channel(int slot) { return slot % (2 * kOctets) / 2 * 8 + slot / (2 * kOctets) * 4 + slot % 2 * 2; }
  static __device__ __forceinline__ void put_silu(const Octet<Bf16>& x, float* half, int octet) {
    float s[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) s[j] = __fmul_rn(x.value(j), sigmoid(x.value(j)));
    float4* to = reinterpret_cast<float4*>(half) + octet;
    to[0] = make_float4(s[0], s[1], s[2], s[3]);
    to[kOctets] = make_float4(s[4], s[5], s[6], s[7]);
  }
};

// Two channels of a half.
__device__ __forceinline__ void add_product(float2& sum, float2 a, float2 b) {
  sum.x = fmaf(a.x, b.x, sum.x), sum.y = fmaf(a.y, b.y, sum.y);
}
__device__ __forceinline__ float2 read_pair(const float* at) { return *reinterpret_cast<const float2*>(at); }
__device__ __forceinline__ float2 unpack_pair(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
}

// Two channels of both halves: values and gates.
struct Pair {
  float2 value, gate;
};

__device__ __forceinline__ float weight_at(const void* data, DType dtype, int64_t i) {
  return dtype == DType::bf16 ? __bfloat162float(__ldg(static_cast<const Bf16*>(data) + i)) : __ldg(static_cast<const float*>(data) + i);
}

// Of channels `channel` and `channel` + 1 of 2 C.
__device__ __forceinline__ float2 load_tap(const DepthwiseWeights& w, int64_t channel, int tap) {
  return make_float2(weight_at(w.weight, w.weight_dtype, channel * kTaps + tap),
                     weight_at(w.weight, w.weight_dtype, (channel + 1) * kTaps + tap));
}

struct Taps {
  Pair taps[kTaps], bias;

  // Of channels `channel` and `channel` + 1 of both halves, zeros from C on.
  __device__ __forceinline__ void load(const DepthwiseWeights& w, int64_t channel, int64_t channels) {
    const bool exist = channel < channels;
    const float2 zeros = make_float2(0.0f, 0.0f);
    auto biases = [&](int64_t c) { return make_float2(weight_at(w.bias, w.bias_dtype, c), weight_at(w.bias, w.bias_dtype, c + 1)); };
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      taps[t].value = exist ? load_tap(w, channel, t) : zeros;
      taps[t].gate = exist ? load_tap(w, channels + channel, t) : zeros;
    }
    bias.value = exist ? biases(channel) : zeros;
    bias.gate = exist ? biases(channels + channel) : zeros;
  }
};

// A thread's sums for its columns of three rows, which take turns as that above, at and below the one that is read.
using Sums = Pair[3][kColumns];

// `row`: the thread's slot of the pixel left of its first column. Each row above is complete after its right neighbour was read:
// finish(column, sums) then. The flags say which of the three rows are wanted.
template <int kOctets, bool kAbove, bool kHere, bool kBelow, class Finish>
__device__ __forceinline__ void convolve_row(const float* row, const Taps& w, Pair (&above)[kColumns], Pair (&here)[kColumns],
                                             Pair (&below)[kColumns], const Finish& finish) {
#pragma unroll
  for (int c = -1; c <= kColumns; ++c) {
    const float* at = row + (c + 1) * Pixel<kOctets>::kFloats;
    const Pair s = {read_pair(at), read_pair(at + Pixel<kOctets>::kHalf)};
#pragma unroll
    for (int right = 2; right >= 0; --right) {  // the tap that this column is of column j
      const int j = c + 1 - right;
      if (j < 0 || j >= kColumns) continue;
      auto add = [&](Pair& sum, int tap) {
        add_product(sum.value, w.taps[tap].value, s.value);
        add_product(sum.gate, w.taps[tap].gate, s.gate);
      };
      if (kAbove) add(above[j], 6 + right);
      if (kHere) add(here[j], 3 + right);
      if (kBelow && right == 0) below[j] = w.bias;
      if (kBelow) add(below[j], right);
      if (kAbove && right == 2) finish(j, above[j]);
    }
  }
}

template <int kOctets, int kTurn, class Finish>
__device__ __forceinline__ void convolve_turn(bool last, const float* row, const Taps& w, Sums& sums, const Finish& finish) {
  auto &above = sums[kTurn], &here = sums[(kTurn + 1) % 3], &below = sums[(kTurn + 2) % 3];
  if (last)
    convolve_row<kOctets, true, false, false>(row, w, above, here, below, finish);
  else
    convolve_row<kOctets, true, true, true>(row, w, above, here, below, finish);
}

// Row `index` of `count` rows of a part, `turn` being index % 3: the first two complete none, the last begins none. The turns are code of
// their own, so that sums stay in their registers.
template <int kOctets, class Finish>
__device__ __forceinline__ void convolve_step(int index, int turn, int count, const float* row, const Taps& w, Sums& sums,
                                              const Finish& finish) {
  const bool last = index == count - 1;
  if (index == 0)
    convolve_row<kOctets, false, false, true>(row, w, sums[0], sums[1], sums[2], finish);
  else if (index == 1)
    convolve_row<kOctets, false, true, true>(row, w, sums[1], sums[2], sums[0], finish);
  else if (turn == 0)
    convolve_turn<kOctets, 0>(last, row, w, sums, finish);
  else if (turn == 1)
    convolve_turn<kOctets, 1>(last, row, w, sums, finish);
  else
    convolve_turn<kOctets, 2>(last, row, w, sums, finish);
}

// Rows of x on their way, and the steps that take their SiLU. A thread has an octet of one pixel of a row, in both halves; of the two
// pixels at the ends one warp has the octets, another one each row. What a thread reads it has fetched itself: no barrier. But where an
// octet of the ends came, another warp's will come next: twice the stages, so that a barrier lies between.
constexpr int arrivals(int threads) { return kStages * 2 * threads; }  // octets
template <int kOctets>
using Ends = uint4[2 * kStages][2][2 * kOctets];

// Which warp's turn it is, over rows.
struct Turn {
  int warp = 0;
  __device__ __forceinline__ bool is_mine() const { return threadIdx.x / 32 == warp; }
  __device__ __forceinline__ void pass() { warp = warp + 1 == static_cast<int>(blockDim.x / 32) ? 0 : warp + 1; }
};

template <int kOctets>
struct Fetcher {
  uint4* mine;  // of arrivals(blockDim.x) octets
  Ends<kOctets>& ends;
  const Bf16 *values, *gates;  // the thread's octet in the next row to fetch
  int64_t row_stride, to_end;  // to_end: from the thread's octet of values to the one of an end that its lane has
  int row, height, index = 0;  // the next row to fetch: of the image, and of this part
  bool exists, end_exists;
  Turn fetching, taking;

  // `col`: the image's column of the first pixel but one of a row in shared memory.
  __device__ __forceinline__ Fetcher(uint4* slots, Ends<kOctets>& end_slots, const Images& images, const void* x, int64_t image,
                                     int64_t first_row, int64_t col, int64_t channel, int width)
      : mine(slots + threadIdx.x),
        ends(end_slots),
        row_stride(2 * images.width * images.channels),
        row(static_cast<int>(first_row)),
        height(static_cast<int>(images.height)) {
    const int lane = threadIdx.x % 32, octet = threadIdx.x % kOctets;
    const int64_t pixel = col + threadIdx.x / kOctets, end = lane < kOctets ? col - 1 : col + width, c = channel + octet * 8;
    exists = pixel >= 0 && pixel < images.width && c < images.channels;
    end_exists = has_end() && end >= 0 && end < images.width && c < images.channels;
    values = static_cast<const Bf16*>(x) + (image * images.height + first_row) * row_stride + pixel * 2 * images.channels + c;
    gates = values + images.channels;
    to_end = (end - pixel) * 2 * images.channels;
  }

  static __device__ __forceinline__ bool has_end() { return threadIdx.x % 32 < 2 * kOctets; }

  __device__ __forceinline__ uint4& slot(int i, int half) { return mine[((i & (kStages - 1)) * 2 + half) * blockDim.x]; }

  __device__ __forceinline__ void fetch(int rows) {
    if (index < rows) {
      const bool inside = row >= 0 && row < height;
      copy_async_or_zero(shared_address(&slot(index, 0)), values, inside && exists);
      copy_async_or_zero(shared_address(&slot(index, 1)), gates, inside && exists);
      if (fetching.is_mine() && has_end()) {
        const int lane = threadIdx.x % 32;
        auto& to = ends[index & (2 * kStages - 1)];
        copy_async_or_zero(shared_address(&to[0][lane]), values + to_end, inside && end_exists);
        copy_async_or_zero(shared_address(&to[1][lane]), gates + to_end, inside && end_exists);
      }
      values += row_stride, gates += row_stride;
      ++row;
    }
    ++index;
    fetching.pass();
    commit_copies();
  }

  // SiLU of row `i`, the oldest that has not been taken, to `to`; then the fetch of another.
  __device__ __forceinline__ void silu(int i, int rows, float* to, int width) {
    using P = Pixel<kOctets>;
    wait_for_copy_batches<kStages - 1>();
    auto put = [&](const uint4& from, float* half) {
      Octet<Bf16> x;
      x.words[0] = from.x, x.words[1] = from.y, x.words[2] = from.z, x.words[3] = from.w;
      P::put_silu(x, half, threadIdx.x % kOctets);
    };
    float* at = to + (1 + threadIdx.x / kOctets) * P::kFloats;
#pragma unroll
    for (int half = 0; half < 2; ++half) put(slot(i, half), at + half * P::kHalf);
    if (taking.is_mine() && has_end()) {
      const int lane = threadIdx.x % 32;
      at = to + (lane < kOctets ? 0 : width + 1) * P::kFloats;
#pragma unroll
      for (int half = 0; half < 2; ++half) put(ends[i & (2 * kStages - 1)][half][lane], at + half * P::kHalf);
    }
    taking.pass();
    fetch(rows);
  }
};

}  // namespace eightfold::conv
