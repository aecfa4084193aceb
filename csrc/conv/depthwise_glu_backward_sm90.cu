// Backward, from one read of x and dy: a block has 32 channels of either half and walks down the rows as in the forward pass; three rows
// behind the one whose SiLU is taken it finishes a row of dx.
//
//   finish    of a complete row d and dy comes a row of dd, in fp32, to a ring of four in shared memory
//   differentiate   a warp has eight columns, a lane two channels of one half: from three rows of dd around its pixels come ds, dx,
//             and what these pixels' SiLUs add to dweight, for the same products are at hand
//
// So a tile of columns has dd for one column more at either side than it writes dx for, but where it spans the whole image. A span of
// pixels is a block's part; its sums run down the columns of a lane, then over the warps in order.
#include <algorithm>

#include "conv/depthwise_glu.cuh"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/quad.cuh"
#include "quant/block_sum.cuh"

namespace eightfold::conv {
namespace {

constexpr int kOctets = 4, kChannels = 8 * kOctets;
constexpr int kMostWidth = 48;  // columns of dd
constexpr int kWide = 8;        // columns of a warp that differentiates
constexpr int kMostThreads = kMostWidth * kOctets;
constexpr int kDdRows = 4;
constexpr int64_t kStripRows = 32;
using P = Pixel<kOctets>;
static_assert(2 * P::kSlots == 32 && 2 * kColumns == kWide);

// Tiles of `width` columns of dd, a multiple of kWide, of which `step` have dx, the first of them `before` after the first of dd.
struct Plan {
  int chunks, tiles, strips, width, step, before;
  int64_t spans(const Images& images) const { return images.batch * strips * tiles; }
};

// The least work by columns that are convolved; a function of the image's size alone.
Plan plan_of(const Images& images) {
  const int64_t whole = (images.width + kWide - 1) / kWide * kWide;
  Plan plan{static_cast<int>((images.channels + kChannels - 1) / kChannels),
            1,
            static_cast<int>((images.height + kStripRows - 1) / kStripRows),
            static_cast<int>(whole),
            static_cast<int>(images.width),
            0};
  if (whole <= kMostWidth) return plan;
  int64_t least = INT64_MAX;
  for (int width = kWide; width <= kMostWidth; width += kWide) {
    const int64_t tiles = (images.width + width - 3) / (width - 2), work = tiles * (width + 2);
    if (work > least) continue;
    least = work;
    plan.tiles = static_cast<int>(tiles), plan.width = width, plan.step = width - 2, plan.before = 1;
  }
  return plan;
}

// Rows of s and of dd follow it, then x on its way. Weights are read again each row: the registers are full of sums.
struct Shared {
  Ends<kOctets> ends;
  float2 weights[kTaps + 1][2][P::kSlots];  // under each tap and the bias, of values and gates
};

constexpr int row_floats(int width) { return (width + 2) * P::kFloats; }
constexpr int shared_bytes(int width) {
  return static_cast<int>(sizeof(Shared)) + (2 + kDdRows) * row_floats(width) * 4 + arrivals(width * kOctets) * 16;
}

// Sums of a lane: for two channels, under each tap and of dd itself.
struct WeightSums {
  float2 taps[kTaps], bias;
};

// dx of kWide pixels of one row, for two channels of a half. dd: the lane's slot of the pixel left of the first, in the rows above, at
// and below. x and `owned`, a bit each: the pixels that this block has; of others x counts as zero.
__device__ __forceinline__ void differentiate_row(const float* const (&dd)[3], const float2 (&taps)[kTaps], const uint32_t (&x)[kWide],
                                                  uint32_t owned, WeightSums& sums, uint32_t (&dx)[kWide]) {
  float2 ds[kWide] = {}, s[kWide], slope[kWide];
  auto prepare = [&](int j) {
    const float2 v = unpack_pair(x[j]);
    const float low = sigmoid(v.x), high = sigmoid(v.y);
    s[j] = make_float2(__fmul_rn(v.x, low), __fmul_rn(v.y, high));
    slope[j] = make_float2(__fmul_rn(low, fmaf(v.x, 1.0f - low, 1.0f)), __fmul_rn(high, fmaf(v.y, 1.0f - high, 1.0f)));
  };
#pragma unroll
  for (int c = -1; c <= kWide; ++c) {
    if (c + 1 < kWide) prepare(c + 1);
#pragma unroll
    for (int down = 0; down < 3; ++down) {
      const float2 d = read_pair(dd[down] + (c + 1) * P::kFloats);
      if (down == 1 && c >= 0 && c < kWide && owned >> c & 1) sums.bias.x += d.x, sums.bias.y += d.y;
#pragma unroll
      for (int right = 2; right >= 0; --right) {
        const int j = c + 1 - right;  // d lies `down` - 1 below and `right` - 1 right of pixel j, which is under the opposite tap of it
        if (j < 0 || j >= kWide) continue;
        const int tap = (2 - down) * 3 + 2 - right;
        add_product(ds[j], taps[tap], d);
        add_product(sums.taps[tap], s[j], d);
      }
    }
    if (c >= 1) dx[c - 1] = pack_bf16(__fmul_rn(ds[c - 1].x, slope[c - 1].x), __fmul_rn(ds[c - 1].y, slope[c - 1].y));
  }
}

__global__ void __launch_bounds__(kMostThreads, 2) depthwise_glu_backward_kernel(const DepthwiseGluBackward op, const Plan plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int floats = row_floats(plan.width);
  float* s_rows = reinterpret_cast<float*>(memory + sizeof(Shared));
  float* dd_rows = s_rows + 2 * floats;
  let_next_kernel_start();
  const Images& images = op.images;
  uint32_t block = blockIdx.x;
  auto take = [&](int count) {
    const uint32_t index = block % count;
    block /= count;
    return static_cast<int64_t>(index);
  };
  const int64_t channel = take(plan.chunks) * kChannels, tile = take(plan.tiles), strip = take(plan.strips), image = block;
  const int64_t span = (image * plan.strips + strip) * plan.tiles + tile;
  const int64_t first = images.height * strip / plan.strips, end = images.height * (strip + 1) / plan.strips;
  const int64_t col = tile * plan.step - plan.before;                // of dd
  const int rows = static_cast<int>(end - first), taken = rows + 4;  // of dx, and of x

  uint4* slots = reinterpret_cast<uint4*>(dd_rows + kDdRows * floats);
  Fetcher<kOctets> fetcher(slots, shared.ends, images, op.x, image, first - 2, col, channel, plan.width);
  for (int i = 0; i < kStages; ++i) fetcher.fetch(taken);
  for (int i = threadIdx.x; i < kDdRows * 2 * P::kFloats; i += blockDim.x) {  // no dd beyond either end of a row
    const int row = i / (2 * P::kFloats), side = i / P::kFloats % 2;
    dd_rows[row * floats + side * (plan.width + 1) * P::kFloats + i % P::kFloats] = 0.0f;
  }

  // As convolving: a slot of both halves, four columns.
  const int slot = threadIdx.x % P::kSlots, mine = static_cast<int>(threadIdx.x) / P::kSlots * kColumns;
  const int64_t own_channel = channel + P::channel(slot);
  const bool channel_exists = own_channel < images.channels;
  if (threadIdx.x < P::kSlots) {
    Taps w;
    w.load(op.weights, own_channel, images.channels);
#pragma unroll
    for (int t = 0; t <= kTaps; ++t) {
      const Pair& pair = t < kTaps ? w.taps[t] : w.bias;
      shared.weights[t][0][slot] = pair.value, shared.weights[t][1][slot] = pair.gate;
    }
  }
  Sums sums = {};
  uint32_t exist = 0;  // a bit a column
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (channel_exists && col + mine + j >= 0 && col + mine + j < images.width) exist |= 1u << j;

  // As differentiating: a slot of one half, eight columns.
  const int half = static_cast<int>(threadIdx.x) / P::kSlots % 2, from = static_cast<int>(threadIdx.x) / 32 * kWide;
  const int64_t half_channel = half * images.channels + own_channel;
  WeightSums weight_sums{};
  uint32_t owned = 0;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const int64_t own = from + j - plan.before;
    if (channel_exists && own >= 0 && own < plan.step && tile * plan.step + own < images.width) owned |= 1u << j;
  }

  fetcher.silu(0, taken, s_rows, plan.width);
  __syncthreads();
  for (int i = 0, turn = 0; i <= taken; ++i, turn = turn == 2 ? 0 : turn + 1) {
    // dy of row i - 3 (convolving) and x of row i - 5 (differentiating), counted from the first of dx
    uint32_t dy[kColumns] = {}, x[kWide] = {};
    const int64_t d_row = first + i - 3;
    const uint32_t inside = i >= 2 && i < taken && d_row >= 0 && d_row < images.height ? exist : 0;
    const auto* dy_at =
        static_cast<const Bf16*>(op.dy) + ((image * images.height + d_row) * images.width + col + mine) * images.channels + own_channel;
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      if (inside >> j & 1) dy[j] = __ldg(reinterpret_cast<const uint32_t*>(dy_at + j * images.channels));
    const int64_t at = ((image * images.height + first + i - 5) * images.width + col + from) * 2 * images.channels + half_channel;
    if (i >= 5) {
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        if (owned >> j & 1) x[j] = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const Bf16*>(op.x) + at + j * 2 * images.channels));
    }

    if (i + 1 < taken) fetcher.silu(i + 1, taken, s_rows + (i + 1) % 2 * floats, plan.width);
    if (i < taken) {
      Taps w;
#pragma unroll
      for (int t = 0; t <= kTaps; ++t) (t < kTaps ? w.taps[t] : w.bias) = {shared.weights[t][0][slot], shared.weights[t][1][slot]};
      float* to = dd_rows + ((i - 1) & (kDdRows - 1)) * floats + (1 + mine) * P::kFloats + slot * 2;
      convolve_step<kOctets>(i, turn, taken, s_rows + i % 2 * floats + mine * P::kFloats + slot * 2, w, sums, [&](int j, const Pair& d) {
        const float2 grad = unpack_pair(dy[j]);
        Pair dd = {make_float2(0.0f, 0.0f), make_float2(0.0f, 0.0f)};
        auto gradient = [](float grad, float value, float gate, float& dvalue, float& dgate) {
          const float s = sigmoid(gate);
          dvalue = __fmul_rn(grad, __fmul_rn(gate, s));
          dgate = __fmul_rn(__fmul_rn(grad, value), __fmul_rn(s, fmaf(gate, 1.0f - s, 1.0f)));
        };
        if (inside >> j & 1) {
          gradient(grad.x, d.value.x, d.gate.x, dd.value.x, dd.gate.x);
          gradient(grad.y, d.value.y, d.gate.y, dd.value.y, dd.gate.y);
        }
        *reinterpret_cast<float2*>(to + j * P::kFloats) = dd.value;
        *reinterpret_cast<float2*>(to + j * P::kFloats + P::kHalf) = dd.gate;
      });
    }
    if (i >= 5) {
      const float* dd[3];
#pragma unroll
      for (int down = 0; down < 3; ++down)
        dd[down] = dd_rows + ((i - 4 + down) & (kDdRows - 1)) * floats + from * P::kFloats + half * P::kHalf + slot * 2;
      float2 taps[kTaps];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) taps[t] = shared.weights[t][half][slot];
      uint32_t dx[kWide];
      differentiate_row(dd, taps, x, owned, weight_sums, dx);
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        if (owned >> j & 1) *reinterpret_cast<uint32_t*>(static_cast<Bf16*>(op.dx) + at + j * 2 * images.channels) = dx[j];
    }
    __syncthreads();
  }

  // The span's sums: a lane's of every warp, in order.
  float* of_warp = dd_rows + threadIdx.x / 32 * (kTaps + 1) * 64 + threadIdx.x % 32 * 2;
#pragma unroll
  for (int t = 0; t <= kTaps; ++t) *reinterpret_cast<float2*>(of_warp + t * 64) = t < kTaps ? weight_sums.taps[t] : weight_sums.bias;
  __syncthreads();
  for (int i = threadIdx.x; i < (kTaps + 1) * 64; i += blockDim.x) {
    const int lane = i % 64 / 2;
    const int64_t c = channel + P::channel(lane % P::kSlots) + i % 2;
    if (c >= images.channels) continue;
    float sum = dd_rows[i];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) sum += dd_rows[warp * (kTaps + 1) * 64 + i];
    op.partials[((span * (kTaps + 1) + i / 64) * 2 + lane / P::kSlots) * images.channels + c] = sum;
  }
}

// Column i of the sums: tap i / (2 C) of channel i % (2 C).
struct StoreWeights {
  float *dweight, *dbias;
  int64_t channels;
  __device__ __forceinline__ void operator()(int64_t, int64_t i, float sum) const {
    const int64_t tap = i / channels, c = i % channels;
    (tap < kTaps ? dweight[c * kTaps + tap] : dbias[c]) = sum;
  }
};

}  // namespace

int64_t depthwise_glu_spans_sm90(const Images& images) { return images.pixels() > 0 ? plan_of(images).spans(images) : 0; }

void depthwise_glu_backward_sm90(const DepthwiseGluBackward& op, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const Images& images = op.images;
  if (images.channels == 0) return;
  if (images.pixels() > 0) {
    const Plan plan = plan_of(images);
    static_assert(kMostThreads / 32 * (kTaps + 1) * 64 <= kDdRows * row_floats(kMostWidth));
    allow_shared_memory<depthwise_glu_backward_kernel>(shared_bytes(kMostWidth), current_device(),
                                                       "depthwise_glu_backward: reserving shared memory");
    launch_kernel(false, "depthwise_glu_backward_kernel", depthwise_glu_backward_kernel, plan.spans(images) * plan.chunks,
                  plan.width * kOctets, shared_bytes(plan.width), stream, op, plan);
  }
  const int64_t width = (kTaps + 1) * 2 * images.channels;
  quant::fold_runs({op.partials, 1, 0, depthwise_glu_spans_sm90(images), width, width},
                   StoreWeights{op.dweight, op.dbias, 2 * images.channels}, stream);
}

}  // namespace eightfold::conv
