// Forward: a block has 128 channels of either half, the width of a group of codes, and 16 columns; two share a multiprocessor. A finished
// row of y waits in shared memory, in bf16, for the next step, where 16 lanes have a pixel: they store it or cast it.
#include <algorithm>

#include "conv/depthwise_glu.cuh"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/quad.cuh"
#include "quant/row_cast.cuh"

namespace eightfold::conv {
namespace {

constexpr int kOctets = 16, kChannels = 8 * kOctets, kWidth = 16;
constexpr int kThreads = kWidth * kOctets;
using P = Pixel<kOctets>;
static_assert(kWidth / kColumns * P::kSlots == kThreads);

struct Shared {
  uint4 x[arrivals(kThreads)];
  Ends<kOctets> ends;
  float s[2][(kWidth + 2) * P::kFloats];
  uint32_t y[2][kWidth][kChannels / 2];
};

struct Plan {
  int chunks, tiles, strips;  // of channels, columns, rows
};

// kCodes: what is stored of y.
template <bool kCodes>
__global__ void __launch_bounds__(kThreads, 2) depthwise_glu_kernel(const DepthwiseGlu op, const Plan plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Images& images = op.images;
  uint32_t block = blockIdx.x;
  auto take = [&](int count) {
    const uint32_t index = block % count;
    block /= count;
    return static_cast<int64_t>(index);
  };
  const int64_t channel = take(plan.chunks) * kChannels, col = take(plan.tiles) * kWidth, strip = take(plan.strips), image = block;
  const int64_t first = images.height * strip / plan.strips, end = images.height * (strip + 1) / plan.strips;
  const int taken = static_cast<int>(end - first) + 2;  // rows of x

  Fetcher<kOctets> x(shared.x, shared.ends, images, op.x, image, first - 1, col, channel, kWidth);
  for (int i = 0; i < kStages; ++i) x.fetch(taken);
  const int slot = threadIdx.x % P::kSlots, mine = static_cast<int>(threadIdx.x) / P::kSlots * kColumns;  // column
  Taps w;
  w.load(op.weights, channel + P::channel(slot), images.channels);
  Sums sums = {};

  // The next row of y, from where convolution has left it.
  const int pixel = threadIdx.x / kOctets, octet = threadIdx.x % kOctets;
  const int count = col + pixel < images.width && channel + octet * 8 < images.channels ? 8 : 0;
  const int64_t at = (image * images.height + first) * images.width + col + pixel;
  Bf16* y = static_cast<Bf16*>(op.y) + (kCodes ? 0 : at * images.channels + channel + octet * 8);
  quant::Quantized codes = op.codes;  // from the first of the group on
  if (kCodes) codes.codes += at * images.channels + channel, codes.scales += at + channel / kChannels * codes.scale_ld;
  auto store = [&](const uint32_t (&row)[kWidth][kChannels / 2]) {
    const auto values = load_shared(reinterpret_cast<const Bf16*>(row[pixel]) + octet * 8);
    if constexpr (kCodes) {
      quant::cast_row_octet(values, codes, 0, octet * 8, 0, count, true);
      codes.codes += images.width * images.channels, codes.scales += images.width;
    } else {
      if (count > 0) store_octet_whole(y, values);
      y += images.width * images.channels;
    }
  };

  x.silu(0, taken, shared.s[0], kWidth);
  __syncthreads();
  for (int i = 0, turn = 0; i < taken; ++i, turn = turn == 2 ? 0 : turn + 1) {
    if (i + 1 < taken) x.silu(i + 1, taken, shared.s[(i + 1) % 2], kWidth);
    convolve_step<kOctets>(i, turn, taken, shared.s[i % 2] + mine * P::kFloats + slot * 2, w, sums, [&](int j, const Pair& d) {
      const float low = __fmul_rn(d.value.x, __fmul_rn(d.gate.x, sigmoid(d.gate.x)));
      const float high = __fmul_rn(d.value.y, __fmul_rn(d.gate.y, sigmoid(d.gate.y)));
      shared.y[i % 2][mine + j][P::channel(slot) / 2] = pack_bf16(low, high);
    });
    if (i > 2) store(shared.y[(i + 1) % 2]);
    __syncthreads();
  }
  store(shared.y[(taken + 1) % 2]);
}

// Strips of rows: as many as make the last wave of blocks end soonest. A strip costs about three rows more than it has.
Plan plan_of(const Images& images) {
  const int64_t chunks = (images.channels + kChannels - 1) / kChannels, tiles = (images.width + kWidth - 1) / kWidth;
  const int64_t at_once = 2 * multiprocessors(current_device());
  int64_t best = 1, least = INT64_MAX;
  for (int64_t strips = 1; strips <= std::min<int64_t>(images.height, 64); ++strips) {
    const int64_t waves = (images.batch * tiles * chunks * strips + at_once - 1) / at_once;
    const int64_t cost = waves * ((images.height + strips - 1) / strips + 3);
    if (cost < least) best = strips, least = cost;
  }
  return {static_cast<int>(chunks), static_cast<int>(tiles), static_cast<int>(best)};
}

template <bool kCodes>
void launch(const DepthwiseGlu& op, cudaStream_t stream) {
  const Plan plan = plan_of(op.images);
  allow_shared_memory<depthwise_glu_kernel<kCodes>>(sizeof(Shared), current_device(), "depthwise_glu: reserving shared memory");
  launch_kernel(false, "depthwise_glu_kernel", depthwise_glu_kernel<kCodes>, op.images.batch * plan.strips * plan.tiles * plan.chunks,
                kThreads, sizeof(Shared), stream, op, plan);
}

}  // namespace

void depthwise_glu_sm90(const DepthwiseGlu& op, void* stream) {
  if (op.images.pixels() == 0 || op.images.channels == 0) return;
  op.codes.codes ? launch<true>(op, static_cast<cudaStream_t>(stream)) : launch<false>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold::conv
