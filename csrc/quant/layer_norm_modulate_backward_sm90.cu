// The backward pass of LayerNorm and modulation. A block owns a run of a sample's rows and takes one or two at a time: a thread has one or
// two octets of columns, whose shares of dshift, dscale and dgate it sums in registers. The next rows are asked for before those at hand
// are reduced. The runs' sums are folded in order by a second kernel, which starts early and waits for the first.
#include <algorithm>

#include "quant/block_sum.cuh"
#include "quant/layer_norm_modulate.cuh"

namespace eightfold::quant {
namespace {

constexpr int kMaxThreads = kMostSumThreads;
constexpr int kFewThreads = 288;  // up to 2,304 columns, an octet a thread: two blocks share a multiprocessor

// Eight columns of one row of every input.
template <class T>
struct Inputs {
  Octet<T> dy, x, residual, branch;
};

template <class T, int kOctets, bool kVector, bool kGated>
__global__ void __launch_bounds__(kOctets == 1 ? kFewThreads : kMaxThreads, kOctets == 1 && sizeof(T) == 2 ? 2 : 1)
    modulate_backward_kernel(const LayerNormModulateBackward op) {
  constexpr bool kAhead = kOctets == 1 && sizeof(T) == 2;  // as registers allow
  constexpr int kRows = kAhead && !kGated ? 2 : 1;
  constexpr int kSums = kGated ? 3 : 2;
  __shared__ float partials[2][2 * kRows][kMaxThreads / 32];
  let_next_kernel_start();
  const int64_t runs = modulate_runs(op.tokens), sample = blockIdx.x / runs, run = blockIdx.x % runs;
  const int64_t begin = sample * op.tokens + op.tokens * run / runs, end = sample * op.tokens + op.tokens * (run + 1) / runs;
  const int cols = static_cast<int>(op.cols);
  int col[kOctets];
  constexpr bool kKept = kOctets == 1;  // vectors in registers; else every row reads them again
  float one_scale[8] = {}, gate[8] = {}, sums[kSums][kOctets][8] = {};
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    col[i] = (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
    if (kKept && col[i] < cols) load_one_plus<kVector>(op.scale, op.vector_dtype, sample, col[i], one_scale);
    if (kKept && kGated && col[i] < cols) load_vector<kVector>(op.gate, op.vector_dtype, sample, col[i], gate);
  }

  auto ask = [&](int64_t first, Inputs<T>(&in)[kRows][kOctets], float (&mean)[kRows], float (&rstd)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      mean[r] = row < end ? __ldg(op.mean + row) : 0.0f, rstd[r] = row < end ? __ldg(op.rstd + row) : 0.0f;
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        const int64_t at = row * op.cols + col[i];
        const int count = row < end && col[i] < cols ? 8 : 0;
        in[r][i].dy = load_octet<kVector>(static_cast<const T*>(op.dy) + at, count);
        in[r][i].x = load_octet<kVector>(static_cast<const T*>(op.x) + at, count);
        in[r][i].residual = load_octet<kVector>(static_cast<const T*>(op.residual_grad) + at, op.residual_grad ? count : 0);
        if constexpr (kGated) in[r][i].branch = load_octet<kVector>(static_cast<const T*>(op.branch) + at, count);
      }
    }
  };
  Inputs<T> in[kRows][kOctets], next[kRows][kOctets];
  float mean[kRows], rstd[kRows], next_mean[kRows], next_rstd[kRows];
  if constexpr (kAhead) ask(begin, next, next_mean, next_rstd);

  int turn = 0;
  for (int64_t first = begin; first < end; first += kRows) {
    if constexpr (kAhead) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        mean[r] = next_mean[r], rstd[r] = next_rstd[r];
#pragma unroll
        for (int i = 0; i < kOctets; ++i) in[r][i] = next[r][i];
      }
      ask(first + kRows, next, next_mean, next_rstd);
    } else {
      ask(first, in, mean, rstd);
    }

    float totals[2 * kRows] = {};  // of g and g * xhat
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        if (col[i] >= cols) continue;
        if (!kKept) load_one_plus<kVector>(op.scale, op.vector_dtype, sample, col[i], one_scale);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float dy = in[r][i].dy.value(j), xhat = __fmul_rn(__fsub_rn(in[r][i].x.value(j), mean[r]), rstd[r]);
          const float g = __fmul_rn(dy, one_scale[j]);
          sums[0][i][j] = __fadd_rn(sums[0][i][j], dy);
          sums[1][i][j] = fmaf(dy, xhat, sums[1][i][j]);
          totals[2 * r] = __fadd_rn(totals[2 * r], g);
          totals[2 * r + 1] = fmaf(g, xhat, totals[2 * r + 1]);
        }
      }
    }
    block_totals(totals, partials[turn]);
    turn ^= 1;

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= end) break;
      const float mean_g = __fdiv_rn(totals[2 * r], static_cast<float>(cols)),
                  along = __fdiv_rn(totals[2 * r + 1], static_cast<float>(cols));
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        if (col[i] >= cols) continue;
        if (!kKept) load_one_plus<kVector>(op.scale, op.vector_dtype, sample, col[i], one_scale);
        const int64_t at = (first + r) * op.cols + col[i];
        const Octet<T> dy = unpacked_anew(in[r][i].dy), x = unpacked_anew(in[r][i].x);
        float dx[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float xhat = __fmul_rn(__fsub_rn(x.value(j), mean[r]), rstd[r]), g = __fmul_rn(dy.value(j), one_scale[j]);
          dx[j] = __fmul_rn(rstd[r], fmaf(-xhat, along, __fsub_rn(g, mean_g)));
          if (op.residual_grad) dx[j] = __fadd_rn(dx[j], in[r][i].residual.value(j));
        }
        Octet<T> out;
        out.set(dx);
        store_octet(static_cast<T*>(op.dx) + at, out, 8, kVector);
        if constexpr (kGated) {
          if (!kKept) load_vector<kVector>(op.gate, op.vector_dtype, sample, col[i], gate);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            sums[2][i][j] = fmaf(dx[j], in[r][i].branch.value(j), sums[2][i][j]);
            dx[j] = __fmul_rn(gate[j], dx[j]);
          }
          out.set(dx);
          store_octet(static_cast<T*>(op.dbranch) + at, out, 8, kVector);
        }
      }
    }
  }

#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (col[i] >= cols) continue;
      Octet<float> out;
      out.set(sums[s][i]);
      store_octet_whole(op.partials + (static_cast<int64_t>(blockIdx.x) * kSums + s) * op.cols + col[i], out);
    }
  }
}

// Column c of a sample's sums: of dshift, dscale and dgate, one after the other.
struct StoreVectors {
  float *dshift, *dscale, *dgate;
  int64_t cols;
  __device__ __forceinline__ void operator()(int64_t sample, int64_t col, float sum) const {
    const int64_t which = col / cols;
    (which == 0 ? dshift : which == 1 ? dscale : dgate)[sample * cols + col % cols] = sum;
  }
};

template <class T, bool kVector, bool kGated>
void launch_backward(const LayerNormModulateBackward& op, cudaStream_t stream) {
  const int64_t octets = op.cols / 8;
  const int each = octets <= kFewThreads ? 1 : 2;
  static_assert(kMaxModulateCols <= 2 * 8 * kMaxThreads);
  const auto kernel = each == 1 ? modulate_backward_kernel<T, 1, kVector, kGated> : modulate_backward_kernel<T, 2, kVector, kGated>;
  launch_kernel(false, "modulate_backward_kernel", kernel, op.samples * modulate_runs(op.tokens),
                static_cast<int>((octets + each * 32 - 1) / (each * 32) * 32), 0, stream, op);
}

template <class T>
void backward_typed(const LayerNormModulateBackward& op, cudaStream_t stream) {
  const bool vector = aligned16(op.dy) && aligned16(op.x) && aligned16(op.residual_grad) && aligned16(op.branch) &&
                      vectors_aligned(op.scale, op.vector_dtype) && vectors_aligned(op.gate, op.vector_dtype);
  if (op.gate.data)
    vector ? launch_backward<T, true, true>(op, stream) : launch_backward<T, false, true>(op, stream);
  else
    vector ? launch_backward<T, true, false>(op, stream) : launch_backward<T, false, false>(op, stream);
}

}  // namespace

void layer_norm_modulate_backward_sm90(const LayerNormModulateBackward& op, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (op.samples == 0 || op.cols == 0) return;
  if (op.tokens > 0) {
    if (op.dtype == DType::bf16)
      backward_typed<__nv_bfloat16>(op, stream);
    else
      backward_typed<float>(op, stream);
  }
  const int64_t runs = modulate_runs(op.tokens), width = op.sums() * op.cols;
  fold_runs({op.partials, op.samples, runs * width, runs, width, width}, StoreVectors{op.dshift, op.dscale, op.dgate, op.cols}, stream);
}

}  // namespace eightfold::quant
