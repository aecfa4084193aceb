// Forward: 16 lanes take up to four heads of one token, all of whose loads are on their way at once, and one octet of the tables for all
// of them. Backward: 16 lanes take a run of rows (quant/norm.h) one after the other, four at a time, fewer at the end of a token, so that
// here too the tables are read once for all.
#include "core/dependent_launch.cuh"
#include "quant/norm_short.cuh"
#include "quant/row_cast.cuh"
#include "rotary/rms_norm_rotary.h"
#include "rotary/rotate.cuh"

namespace eightfold {
namespace {

using namespace quant;
using T = __nv_bfloat16;

constexpr int kThreads = 128, kHeadsAtOnce = 4, kGroups = kThreads / kShortLanes;

struct Place {
  uint32_t batch, token, head;

  __device__ __forceinline__ const T* at(const Heads& x) const {
    return static_cast<const T*>(x.data) + batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
  }
  __device__ __forceinline__ int64_t table(const Heads& x, const RotaryTables& tables) const {
    return batch * tables.batch_stride + static_cast<int64_t>(token) * (x.dim / 2);
  }
};

__global__ void __launch_bounds__(kThreads) rms_norm_rotary_kernel(const RmsNormRotary op, uint32_t groups) {
  const Heads& x = op.x;
  const int lane = threadIdx.x % kShortLanes, cols = static_cast<int>(x.dim), half = cols / 16, count = 8 * lane < cols ? 8 : 0;
  const uint32_t heads = static_cast<uint32_t>(x.heads), tokens = static_cast<uint32_t>(x.tokens);
  const uint32_t group = blockIdx.x * kGroups + threadIdx.x / kShortLanes, each = (heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  const uint32_t row = group / each;
  const Place place{row / tokens, row % tokens, group % each * kHeadsAtOnce};
  const int exist = group < groups ? static_cast<int>(heads - place.head) : 0;

  const T* from = place.at(x) + 8 * lane;
  Octet<T> values[kHeadsAtOnce];
#pragma unroll
  for (int i = 0; i < kHeadsAtOnce; ++i) values[i] = load_octet<true>(from + i * x.head_stride, i < exist ? count : 0);
  const int64_t table = place.table(x, op.tables) + 8 * (lane < half ? lane : lane - half);
  const int turning = exist > 0 ? count : 0;
  const Octet<float> cos = load_octet<true>(op.tables.cos + table, turning), sin = load_octet<true>(op.tables.sin + table, turning);
  float weight[8];
  load_weights<true>(op.weight, op.weight_dtype == DType::bf16, 8 * lane, count, weight);

  const int64_t first = static_cast<int64_t>(row) * heads + place.head;
#pragma unroll
  for (int i = 0; i < kHeadsAtOnce; ++i) {
    const int here = i < exist ? count : 0;
    const float rstd = rstd_of(squares_of_group(values[i]), cols, op.eps);
    if (op.rstd && here > 0 && lane == 0) op.rstd[first + i] = rstd;
    const Octet<T> y = rotate_octet(normalise_octet(values[i], rstd, weight), cos, sin, half);
    if (here > 0) store_octet_whole(static_cast<T*>(op.y) + (first + i) * cols + 8 * lane, y);
    if (op.x_rows.codes) cast_row_octet(values[i], op.x_rows, first + i, 8 * lane, cols, here, true);
  }
}

__global__ void __launch_bounds__(kThreads, 4) rms_norm_rotary_backward_kernel(const RmsNormRotaryBackward op, int64_t runs) {
  let_next_kernel_start();
  const Heads& grads = op.dy;
  const int lane = threadIdx.x % kShortLanes, cols = static_cast<int>(grads.dim), half = cols / 16, count = 8 * lane < cols ? 8 : 0;
  const int64_t rows = grads.rows(), run = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kShortLanes;
  const uint32_t heads = static_cast<uint32_t>(grads.heads), tokens = static_cast<uint32_t>(grads.tokens);
  const int64_t end = run < runs ? rows * (run + 1) / runs : 0;
  int64_t first = run < runs ? rows * run / runs : 0;
  const uint32_t index = static_cast<uint32_t>(first / heads);
  Place place{index / tokens, index % tokens, static_cast<uint32_t>(first % heads)};
  float weight[8], dweight[8] = {};
  load_weights<true>(op.weight, op.weight_dtype == DType::bf16, 8 * lane, count, weight);

  while (__any_sync(kWholeWarp, first < end)) {  // so that the lanes of a warp, of two runs, stay together
    const int exist =
        static_cast<int>(min(static_cast<int64_t>(min(static_cast<int>(heads - place.head), kHeadsAtOnce)), max(end - first, int64_t{0})));
    const T* from = place.at(grads) + 8 * lane;
    Octet<T> dy[kHeadsAtOnce];
    uint2 codes[kHeadsAtOnce];
    float scale[kHeadsAtOnce], rstd[kHeadsAtOnce];
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      const int here = i < exist ? count : 0;
      dy[i] = load_octet<true>(from + i * grads.head_stride, here);
      codes[i] = load_codes8<true>(op.x_codes.codes + (first + i) * cols + 8 * lane, here);
      scale[i] = here > 0 ? __ldg(op.x_codes.scales + first + i) : 0.0f;
      rstd[i] = i < exist ? __ldg(op.rstd + first + i) : 0.0f;
    }
    const int64_t table = place.table(grads, op.tables) + 8 * (lane < half ? lane : lane - half);
    const int turning = exist > 0 ? count : 0;
    const Octet<float> cos = load_octet<true>(op.tables.cos + table, turning), sin = load_octet<true>(op.tables.sin + table, turning);
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      if (!__any_sync(kWholeWarp, i < exist)) break;  // a branch, so that all is asked for before any row is taken up
      float value[8];
      decode_octet(codes[i], scale[i], value);
      const Octet<T> g = rotate_octet<true>(dy[i], cos, sin, half);
      const Octet<T> dx = short_row_gradient(g, value, rstd[i], weight, dweight, cols, i < exist);
      if (i < exist && count > 0) store_octet_whole(static_cast<T*>(op.dx) + (first + i) * cols + 8 * lane, dx);
    }
    first += exist, place.head += exist;
    if (place.head == heads) {
      place.head = 0;
      if (++place.token == tokens) place.token = 0, ++place.batch;
    }
  }
  if (run >= runs || count == 0) return;
  Octet<float> sums;
  sums.set(dweight);
  store_octet_whole(op.partials + run * cols + 8 * lane, sums);
}

bool fits(const Heads& x, const RotaryTables& tables, const void* weight, const void* out) {
  const bool whole = x.batch_stride % 8 == 0 && x.token_stride % 8 == 0 && x.head_stride % 8 == 0;
  return x.dtype == DType::bf16 && x.dim > 0 && x.dim % 16 == 0 && x.dim <= kTile && x.rows() <= INT32_MAX && whole && aligned16(x.data) &&
         aligned16(tables.cos) && aligned16(tables.sin) && aligned16(weight) && aligned16(out);
}

}  // namespace

bool rms_norm_rotary_fits_sm90(const RmsNormRotary& op) { return fits(op.x, op.tables, op.weight, op.y); }

bool rms_norm_rotary_backward_fits_sm90(const RmsNormRotaryBackward& op) {
  return fits(op.dy, op.tables, op.weight, op.dx) && aligned16(op.x_codes.codes);
}

void rms_norm_rotary_sm90(const RmsNormRotary& op, void* stream) {
  const int64_t groups = op.x.batch * op.x.tokens * ((op.x.heads + kHeadsAtOnce - 1) / kHeadsAtOnce);
  if (groups == 0) return;
  launch_kernel(false, "rms_norm_rotary_kernel", rms_norm_rotary_kernel, (groups + kGroups - 1) / kGroups, kThreads, 0,
                static_cast<cudaStream_t>(stream), op, static_cast<uint32_t>(groups));
}

void rms_norm_rotary_backward_sm90(const RmsNormRotaryBackward& op, void* stream) {
  const int64_t rows = op.dy.rows(), runs = backward_runs(rows, op.dy.dim);
  if (rows > 0)
    launch_kernel(false, "rms_norm_rotary_backward_kernel", rms_norm_rotary_backward_kernel, (runs + kGroups - 1) / kGroups, kThreads, 0,
                  static_cast<cudaStream_t>(stream), op, runs);
  fold_dweight_sm90(op.partials, rows, op.dy.dim, op.dweight, stream);
}

}  // namespace eightfold
