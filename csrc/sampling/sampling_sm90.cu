// A block for a row: 1024 threads, four logits each at a time. A select counts digits of keys, or adds masses up by digit, in 2048 bins in
// shared memory: after the first digit few keys are left that match. Sums are integers, so atomics leave no trace of their order.
#include <cuda_runtime.h>

#include <stdexcept>

#include "core/launch.cuh"
#include "sampling/sampling.h"

namespace eightfold {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kBins = 2048;
constexpr uint32_t kAll = 0xFFFFFFFFu;

struct Shared {
  unsigned long long bins[kBins];
  unsigned long long of_warp[kWarps];
  unsigned long long above, at;  // of the digit that was found
  uint32_t digit;
};

// body(index, logit) for this thread's part of the row.
template <bool kVector, class Body>
__device__ __forceinline__ void each_logit(const float* row, uint32_t n, const Body& body) {
  for (uint32_t first = threadIdx.x * 4; first < n; first += kThreads * 4) {
    if constexpr (kVector) {
      const float4 x = *reinterpret_cast<const float4*>(row + first);
      body(first, x.x), body(first + 1, x.y), body(first + 2, x.z), body(first + 3, x.w);
    } else {
      for (uint32_t v = first; v < min(first + 4, n); ++v) body(v, row[v]);
    }
  }
}

// Folds a value of each thread; every thread gets the result.
template <class Fold>
__device__ uint64_t over_block(Shared& shared, unsigned long long mine, const Fold& fold) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) mine = fold(mine, __shfl_xor_sync(kAll, mine, mask));
  __syncthreads();  // of_warp may still be read
  if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  mine = shared.of_warp[threadIdx.x % kWarps];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) mine = fold(mine, __shfl_xor_sync(kAll, mine, mask));
  return mine;
}
__device__ uint64_t largest_of_block(Shared& shared, uint64_t mine) {
  return over_block(shared, mine, [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
}
__device__ uint64_t sum_of_block(Shared& shared, uint64_t mine) {
  return over_block(shared, mine, [](unsigned long long a, unsigned long long b) { return a + b; });
}

// The largest digit such that the bins from it on, with `above`, reach `target`. A thread scans two bins, the first thread the largest.
__device__ void find_digit(Shared& shared, unsigned long long above, unsigned long long target) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, digit = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
  const unsigned long long high = shared.bins[digit], low = shared.bins[digit - 1];
  unsigned long long sum = high + low;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned long long below = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) shared.of_warp[warp] = sum;
  __syncthreads();
  unsigned long long before = above + sum - high - low;
  for (int w = 0; w < warp; ++w) before += shared.of_warp[w];
  if (before < target && before + high >= target) {
    shared.digit = digit, shared.above = before, shared.at = high;
  } else if (before + high < target && before + high + low >= target) {
    shared.digit = digit - 1, shared.above = before + high, shared.at = low;
  }
  __syncthreads();
}

// The largest key such that the weights of keys from it on reach `target`.
struct Selected {
  uint32_t key;
  uint64_t above, at;  // weights of larger keys, and of this one
};

// visit(add) calls add(key, weight) for this thread's part of the row; the row's weights add up to `target` at least.
template <class Visit>
__device__ Selected select(Shared& shared, uint64_t target, const Visit& visit) {
  Selected found{0, 0, 0};
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int bits = pass == 2 ? 10 : 11, shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const uint32_t mask = (1u << bits) - 1, matched = pass == 0 ? 0 : kAll << (shift + bits);
    __syncthreads();  // what find_digit wrote has been read
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
    __syncthreads();
    visit([&](uint32_t key, unsigned long long weight) {
      if ((key & matched) == found.key && weight > 0) atomicAdd(&shared.bins[key >> shift & mask], weight);
    });
    __syncthreads();
    find_digit(shared, found.above, target);
    found.key |= shared.digit << shift;
    found.above = shared.above;
    found.at = shared.at;
  }
  return found;
}

// Cuts the tokens that `cut` keeps where their weights reach `target`; equal tokens have equal weights, the lowest indices first.
template <bool kVector, class Weight>
__device__ void narrow(Shared& shared, SampleCut& cut, const float* row, uint32_t n, uint64_t target, const Weight& weight) {
  const Selected found = select(shared, target, [&](const auto& add) {
    each_logit<kVector>(row, n, [&](uint32_t v, float x) {
      const uint32_t key = order_key(x);
      if (cut.keeps(key, v)) add(key, weight(x));
    });
  });
  const uint64_t each = weight(of_order_key(found.key)), wanted = (target - found.above + each - 1) / each;
  uint32_t last = found.key == cut.key ? cut.last : kAll;
  if (wanted * each < found.at) {
    const Selected index = select(shared, wanted, [&](const auto& add) {
      each_logit<kVector>(row, n, [&](uint32_t v, float x) {
        if (order_key(x) == found.key) add(kAll - v, 1);
      });
    });
    last = kAll - index.key;
  }
  cut.key = found.key, cut.last = last;
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const Sample op) {
  __shared__ Shared shared;
  const int64_t r = blockIdx.x;
  const uint32_t n = static_cast<uint32_t>(op.vocabulary);
  const float* row = op.logits + r * op.ld;
  const float temperature = op.temperatures[r], top_p = op.top_p[r];
  const int32_t top_k = op.top_k[r];

  bool nan = false;
  uint64_t best = 0;
  each_logit<kVector>(row, n, [&](uint32_t v, float x) {
    nan |= x != x;
    best = max(best, ranked(x, v));
  });
  if (__syncthreads_or(nan) || !sample_options_valid(temperature, top_k, top_p)) {
    if (threadIdx.x == 0) op.tokens[r] = -1;
    return;
  }
  best = largest_of_block(shared, best);

  if (temperature > 0.0f) {
    const float largest = of_order_key(static_cast<uint32_t>(best >> 32));
    const auto log2_of = [&](float x) { return sample_log2(x, largest, temperature); };
    const auto mass_of = [&](float x) { return sample_mass(log2_of(x)); };
    SampleCut cut;
    if (top_k > 0 && top_k < n) narrow<kVector>(shared, cut, row, n, top_k, [](float) { return uint64_t{1}; });
    if (top_p < 1.0f) {
      uint64_t total = 0;
      each_logit<kVector>(row, n, [&](uint32_t v, float x) {
        if (cut.keeps(order_key(x), v)) total += mass_of(x);
      });
      narrow<kVector>(shared, cut, row, n, sample_target(sum_of_block(shared, total), top_p), mass_of);
    }

    // A thread's four logits are a block of random words.
    const PhiloxKeys keys(static_cast<uint64_t>(op.seeds[r]));
    const uint64_t position = static_cast<uint64_t>(op.positions[r]);
    best = 0;
    for (uint32_t first = threadIdx.x * 4; first < n; first += kThreads * 4) {
      float x[4];
      bool kept = false;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] = kVector || first + j < n ? row[first + j] : 0.0f;
        kept |= (kVector || first + j < n) && cut.keeps(order_key(x[j]), first + j);
      }
      if (!kept) continue;
      const PhiloxWords words = philox4x32(first / 4, 0, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), keys);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((kVector || first + j < n) && cut.keeps(order_key(x[j]), first + j))
          best = max(best, ranked(sample_score(log2_of(x[j]), words.w[j]), first + j));
      }
    }
    best = largest_of_block(shared, best);
  }
  if (threadIdx.x == 0) op.tokens[r] = index_of(best);
}

}  // namespace

void sample_sm90(const Sample& op, void* stream) {
  if (op.rows == 0) return;
  if (op.rows > INT32_MAX) throw std::runtime_error("sample: logits has more than 2^31 - 1 rows");
  const bool vector = op.vocabulary % 4 == 0 && op.ld % 4 == 0 && reinterpret_cast<uintptr_t>(op.logits) % 16 == 0;
  const auto kernel = vector ? sample_kernel<true> : sample_kernel<false>;
  kernel<<<static_cast<unsigned>(op.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  check_launch("sample_kernel");
}

}  // namespace eightfold
