// RMS norm backward. A block owns a run of consecutive rows and takes them one after the other: a thread has one to four octets of
// columns, whose share of dweight it sums in registers. Rows come through a ring in shared memory, filled by the copy engine `stages`
// rows ahead, and are taken two at a time; the barrier of their reduction is also the sign that their stages are free. The runs' sums of
// dweight are folded in order by a second kernel, which is launched early and waits for the first.
#include <algorithm>

#include "core/barrier.cuh"
#include "core/device.h"
#include "core/tma_stream.cuh"
#include "quant/block_sum.cuh"
#include "quant/norm.h"
#include "quant/norm_short.h"
#include "quant/row_cast.cuh"

namespace eightfold::quant {
namespace {

constexpr int kMaxThreads = kMostSumThreads;
constexpr int64_t kRingBytes = 192 * 1024;
constexpr int kMaxStages = 16;

// Two where registers allow: their reductions wait for the same barrier.
template <class T>
constexpr int rows_a_turn(int octets) {
  return sizeof(T) == 2 && octets <= 2 ? 2 : 1;
}

struct BackwardPlan {
  int octets, threads;  // octets a thread, threads a row
  int blocks, stages;
  uint32_t dy_bytes, s_bytes, stage_bytes;
};

template <class T, class X>
BackwardPlan plan_backward(const RmsNormBackward& op) {
  const int64_t octets = (op.cols + 7) / 8;
  const int each = octets <= kMaxThreads ? 1 : octets <= 2 * kMaxThreads ? 2 : 4;
  const int threads = static_cast<int>((octets + each - 1) / each + 31) / 32 * 32;
  const int64_t blocks = backward_runs(op.rows, op.cols), sharing = (blocks + kBackwardRuns - 1) / kBackwardRuns;
  const int64_t dy = op.cols * static_cast<int64_t>(sizeof(T)), s = (op.cols * static_cast<int64_t>(sizeof(X)) + 15) / 16 * 16;
  const int64_t stage = dy * (op.residual_grad ? 2 : 1) + s;
  const int64_t stages = std::max<int64_t>(std::min<int64_t>(kRingBytes / sharing / stage, kMaxStages), 1);
  return {each,
          threads,
          static_cast<int>(blocks),
          static_cast<int>(stages),
          static_cast<uint32_t>(dy),
          static_cast<uint32_t>(s),
          static_cast<uint32_t>(stage)};
}

// s as it was saved: itself, or its codes with the scale of their group.
template <class T>
struct SavedOctet {
  Octet<T> octet;
  __device__ void decode(float, float (&out)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = octet.value(j);
  }
  static __device__ __forceinline__ SavedOctet shared(const void* row, int col) { return {load_shared(static_cast<const T*>(row) + col)}; }
  static __device__ __forceinline__ SavedOctet global(const RmsNormBackward& op, int64_t row, int col, int count) {
    return {load_octet<false>(static_cast<const T*>(op.x) + row * op.cols + col, count)};
  }
};

template <>
struct SavedOctet<uint8_t> {
  uint2 codes;
  __device__ __forceinline__ void decode(float scale, float (&out)[8]) const {
    decode4(codes.x, out), decode4(codes.y, out + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = __fmul_rn(out[j], scale);
  }
  static __device__ __forceinline__ SavedOctet shared(const void* row, int col) {
    return {*reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(row) + col)};
  }
  static __device__ __forceinline__ SavedOctet global(const RmsNormBackward& op, int64_t row, int col, int count) {
    return {load_codes8<false>(op.x_codes.codes + row * op.cols + col, count)};
  }
};

template <class T, class X, int kOctets, bool kVector>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_kernel(const RmsNormBackward op, const BackwardPlan plan) {
  extern __shared__ __align__(128) unsigned char ring[];
  constexpr int kRows = rows_a_turn<T>(kOctets);
  __shared__ float partials[2][kRows][kMaxThreads / 32];
  __shared__ uint64_t barriers[kMaxStages];
  let_next_kernel_start();
  const int cols = static_cast<int>(op.cols);
  const int64_t begin = op.rows * blockIdx.x / gridDim.x, end = op.rows * (blockIdx.x + 1) / gridDim.x;

  auto fetch = [&](int64_t row, int stage) {
    if (!kVector || row >= end) return;
    const uint32_t barrier = shared_address(barriers + stage), s_bytes = static_cast<uint32_t>(cols * sizeof(X));
    unsigned char* to = ring + stage * plan.stage_bytes;
    barrier_arrive_expect(barrier, plan.dy_bytes * (op.residual_grad ? 2 : 1) + s_bytes);
    bulk_load(shared_address(to), static_cast<const T*>(op.dy) + row * op.cols, plan.dy_bytes, barrier);
    const void* s = op.x ? static_cast<const void*>(static_cast<const T*>(op.x) + row * op.cols) : op.x_codes.codes + row * op.cols;
    bulk_load(shared_address(to + plan.dy_bytes), s, s_bytes, barrier);
    if (op.residual_grad)
      bulk_load(shared_address(to + plan.dy_bytes + plan.s_bytes), static_cast<const T*>(op.residual_grad) + row * op.cols, plan.dy_bytes,
                barrier);
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < plan.stages; ++stage) barrier_init(shared_address(barriers + stage), 1);
    barrier_init_fence();
    for (int stage = 0; stage < plan.stages; ++stage) fetch(begin + stage, stage);
  }

  int col[kOctets], count[kOctets];
  constexpr bool kKeepWeight = kOctets < 4;  // else the registers are full, and every row reads the weights again
  float weight[kKeepWeight ? kOctets : 1][8], dweight[kOctets][8] = {};
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    col[i] = (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
    count[i] = min(cols - col[i], 8);
    if (kKeepWeight) load_weights<kVector>(op.weight, op.weight_dtype == DType::bf16, col[i], count[i], weight[i]);
  }
  auto weight_of = [&](int i) -> float (&)[8] {
    if (!kKeepWeight) load_weights<kVector>(op.weight, op.weight_dtype == DType::bf16, col[i], count[i], weight[0]);
    return weight[kKeepWeight ? i : 0];
  };
  // What comes outside the ring is asked for two turns ahead.
  struct Aside {
    float rstd[kRows], scale[kRows][kOctets];
  };
  auto ask_aside = [&](int64_t first) {
    Aside aside = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      if (row >= end) continue;
      aside.rstd[r] = __ldg(op.rstd + row);
      if constexpr (sizeof(X) == 1) {
#pragma unroll
        for (int i = 0; i < kOctets; ++i)
          if (count[i] > 0) aside.scale[r][i] = __ldg(op.x_codes.scales + row + col[i] / kTile * op.x_codes.scale_ld);
      }
    }
    return aside;
  };
  Aside next = ask_aside(begin), after = ask_aside(begin + kRows);
  __syncthreads();  // the barriers exist

  int stage = 0, turn = 0;
  uint32_t parity = 0;
  for (int64_t first = begin; first < end; first += kRows) {
    const Aside aside = next;
    next = after;
    after = ask_aside(first + 2 * kRows);
    const bool exists[2] = {true, first + 1 < end};
    int stages[kRows];

    Octet<T> dy[kRows][kOctets], residual[kRows][kOctets];
    SavedOctet<X> s[kRows][kOctets];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      stages[r] = stage;
      if (kVector && exists[r]) barrier_wait(shared_address(barriers + stage), parity);
      const unsigned char* from = ring + stage * plan.stage_bytes;
      if (++stage == plan.stages) stage = 0, parity ^= 1;
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        dy[r][i] = {}, residual[r][i] = {}, s[r][i] = {};
        if (count[i] <= 0 || !exists[r]) continue;
        if (kVector) {
          dy[r][i] = load_shared(reinterpret_cast<const T*>(from) + col[i]);
          s[r][i] = SavedOctet<X>::shared(from + plan.dy_bytes, col[i]);
          if (op.residual_grad) residual[r][i] = load_shared(reinterpret_cast<const T*>(from + plan.dy_bytes + plan.s_bytes) + col[i]);
        } else {
          dy[r][i] = load_octet<false>(static_cast<const T*>(op.dy) + row * op.cols + col[i], count[i]);
          s[r][i] = SavedOctet<X>::global(op, row, col[i], count[i]);
          if (op.residual_grad)
            residual[r][i] = load_octet<false>(static_cast<const T*>(op.residual_grad) + row * op.cols + col[i], count[i]);
        }
      }
    }

    float dot[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        float value[8];
        const float (&w)[8] = weight_of(i);
        s[r][i].decode(aside.scale[r][i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float xhat = __fmul_rn(value[j], aside.rstd[r]);
          dweight[i][j] = fmaf(dy[r][i].value(j), xhat, dweight[i][j]);
          dot[r] = fmaf(__fmul_rn(dy[r][i].value(j), w[j]), xhat, dot[r]);
        }
      }
    }
    block_totals(dot, partials[turn]);
    turn ^= 1;
    if (threadIdx.x == 0) {  // all have these rows in registers
#pragma unroll
      for (int r = 0; r < kRows; ++r) fetch(first + r + plan.stages, stages[r]);
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!exists[r]) break;
      const float mean = __fdiv_rn(dot[r], static_cast<float>(cols));
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        float value[8], v[8];
        const float (&w)[8] = weight_of(i);
        s[r][i].decode(aside.scale[r][i], value);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float xhat = __fmul_rn(value[j], aside.rstd[r]), g = __fmul_rn(dy[r][i].value(j), w[j]);
          v[j] = __fmul_rn(aside.rstd[r], fmaf(-xhat, mean, g));
          if (op.residual_grad) v[j] = __fadd_rn(v[j], residual[r][i].value(j));
        }
        Octet<T> dx;
        dx.set(v);
        store_octet(static_cast<T*>(op.dx) + (first + r) * op.cols + col[i], dx, count[i], kVector);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    Octet<float> sums;
    sums.set(dweight[i]);
    store_octet(op.partials + static_cast<int64_t>(blockIdx.x) * op.cols + col[i], sums, count[i], kVector);
  }
}

template <class T, class X, int kOctets, bool kVector>
void launch_backward(const RmsNormBackward& op, const BackwardPlan& plan, cudaStream_t stream) {
  constexpr auto kernel = norm_backward_kernel<T, X, kOctets, kVector>;
  const int bytes = kVector ? static_cast<int>(plan.stages * plan.stage_bytes) : 0;
  if (bytes > 0) allow_shared_memory<kernel>(bytes, current_device(), "rms_norm_backward: reserving shared memory");
  kernel<<<plan.blocks, plan.threads, bytes, stream>>>(op, plan);
  check_launch("norm_backward_kernel");
}

template <class T, class X, bool kVector>
void backward_octets(const RmsNormBackward& op, cudaStream_t stream) {
  const BackwardPlan plan = plan_backward<T, X>(op);
  if (plan.octets == 1)
    launch_backward<T, X, 1, kVector>(op, plan, stream);
  else if (plan.octets == 2)
    launch_backward<T, X, 2, kVector>(op, plan, stream);
  else
    launch_backward<T, X, 4, kVector>(op, plan, stream);
}

template <class T, class X>
void backward_typed(const RmsNormBackward& op, cudaStream_t stream) {
  const bool vector = op.cols % (16 / sizeof(X) < 8 ? 8 : 16 / sizeof(X)) == 0 && aligned16(op.dy) && aligned16(op.x) &&
                      aligned16(op.x_codes.codes) && aligned16(op.weight) && aligned16(op.residual_grad);
  if (vector && is_short(op) && !op.residual_grad) return norm_short_backward_sm90(op, stream);
  vector ? backward_octets<T, X, true>(op, stream) : backward_octets<T, X, false>(op, stream);
}

struct StoreSums {
  float* dweight;
  __device__ __forceinline__ void operator()(int64_t, int64_t col, float sum) const { dweight[col] = sum; }
};

}  // namespace

void rms_norm_backward_sm90(const RmsNormBackward& op, void* stream_pointer) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (op.cols == 0) return;
  if (op.rows > 0) {
    if (op.dtype == DType::bf16)
      op.x ? backward_typed<__nv_bfloat16, __nv_bfloat16>(op, stream) : backward_typed<__nv_bfloat16, uint8_t>(op, stream);
    else
      op.x ? backward_typed<float, float>(op, stream) : backward_typed<float, uint8_t>(op, stream);
  }
  fold_dweight_sm90(op.partials, op.rows, op.cols, op.dweight, stream);
}

void fold_dweight_sm90(const float* partials, int64_t rows, int64_t cols, float* dweight, void* stream) {
  fold_runs({partials, 1, 0, backward_runs(rows, cols), cols, cols}, StoreSums{dweight}, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold::quant
