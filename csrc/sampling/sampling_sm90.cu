// A block for a row: 1024 threads, four logits each at a time; of few rows a cluster of eight blocks for each. A select counts digits of
// keys, or adds masses up by digit, in 2048 bins in shared memory: after the first digit few keys are left that match. Sums are integers,
// so atomics leave no trace of their order.
#include <cuda_runtime.h>

#include <stdexcept>

#include "core/barrier.cuh"
#include "core/cluster.cuh"
#include "core/dependent_launch.cuh"
#include "sampling/sampling.h"

namespace eightfold {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kBins = 2048;
constexpr int kTeam = 8;              // blocks that share a row where rows are few
constexpr int64_t kSharedRows = 128;  // at one block a row they would not fill the device
constexpr uint32_t kAll = 0xFFFFFFFFu;

struct Shared {
  unsigned long long bins[kBins];
  unsigned long long of_warp[kWarps];
  unsigned long long of_block[2];  // taken in turns, so that one is read while the other is written
  unsigned long long above, at;    // of the digit that was found
  uint32_t digit;
  uint32_t score;  // order_key of the block's largest score after a turn
};

// The kBlocks blocks of a cluster that share a row, and this thread's place in them.
template <int kBlocks>
struct Team {
  Shared& shared;
  uint32_t turn = 0;

  static constexpr uint32_t kStep = kBlocks * kThreads * 4;
  __device__ __forceinline__ static uint32_t rank() { return kBlocks == 1 ? 0 : blockIdx.x % kBlocks; }
  __device__ __forceinline__ static uint32_t first_logit() { return (rank() * kThreads + threadIdx.x) * 4; }

  // What lies there in a block of the team.
  __device__ __forceinline__ static unsigned long long of_block(const unsigned long long* at, uint32_t block) {
    return load_cluster_word(cluster_address(shared_address(at), block));
  }

  // All threads have come here, and what they wrote before can be seen.
  __device__ __forceinline__ static void meet() {
    if constexpr (kBlocks == 1)
      __syncthreads();
    else
      cluster_meet_to_read();
  }

  // Folds a value of each thread; every thread gets the result.
  template <class Fold>
  __device__ uint64_t fold(unsigned long long mine, const Fold& fold) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) mine = fold(mine, __shfl_xor_sync(kAll, mine, mask));
    __syncthreads();  // of_warp may still be read
    if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = shared.of_warp[threadIdx.x % kWarps];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) mine = fold(mine, __shfl_xor_sync(kAll, mine, mask));
    if constexpr (kBlocks > 1) {
      unsigned long long* const slot = &shared.of_block[turn ^= 1];
      if (threadIdx.x == 0) *slot = mine;
      meet();
      mine = of_block(slot, 0);
#pragma unroll
      for (int block = 1; block < kBlocks; ++block) mine = fold(mine, of_block(slot, block));
    }
    return mine;
  }
  __device__ uint64_t largest(uint64_t mine) {
    return fold(mine, [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
  }
  __device__ uint64_t sum(uint64_t mine) {
    return fold(mine, [](unsigned long long a, unsigned long long b) { return a + b; });
  }

  // A bin of all blocks.
  __device__ __forceinline__ unsigned long long bin(int digit) const {
    if constexpr (kBlocks == 1) return shared.bins[digit];
    unsigned long long all = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) all += of_block(&shared.bins[digit], block);
    return all;
  }

  // Before a block ends whose shared memory the others may still read.
  __device__ __forceinline__ static void leave() {
    if constexpr (kBlocks > 1) cluster_meet_to_read();
  }
};

// body(index, logit) for this thread's part of the row.
template <bool kVector, class T, class Body>
__device__ __forceinline__ void each_logit(const T&, const float* row, uint32_t n, const Body& body) {
  for (uint32_t first = T::first_logit(); first < n; first += T::kStep) {
    if constexpr (kVector) {
      const float4 x = *reinterpret_cast<const float4*>(row + first);
      body(first, x.x), body(first + 1, x.y), body(first + 2, x.z), body(first + 3, x.w);
    } else {
      for (uint32_t v = first; v < min(first + 4, n); ++v) body(v, row[v]);
    }
  }
}

// The same with a few loads under way at once, for the pass that finds the row in the L2 cache.
template <bool kVector, class T, class Body>
__device__ __forceinline__ void each_far_logit(const T& team, const float* row, uint32_t n, const Body& body) {
  if constexpr (!kVector) return each_logit<kVector>(team, row, n, body);
  constexpr int kLoads = 5;  // a team's row of 160,000 in one go
  for (uint32_t begin = T::first_logit(); begin < n; begin += kLoads * T::kStep) {
    float4 x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (begin + i * T::kStep < n) x[i] = *reinterpret_cast<const float4*>(row + begin + i * T::kStep);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t v = begin + i * T::kStep;
      if (v < n) body(v, x[i].x), body(v + 1, x[i].y), body(v + 2, x[i].z), body(v + 3, x[i].w);
    }
  }
}

// The largest digit such that the bins from it on, with `above`, reach `target`. A thread scans two bins, the first thread the largest.
template <class T>
__device__ void find_digit(const T& team, unsigned long long above, unsigned long long target) {
  Shared& shared = team.shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, digit = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
  const unsigned long long high = team.bin(digit), low = team.bin(digit - 1);
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
template <class T, class Visit>
__device__ Selected select(const T& team, uint64_t target, const Visit& visit) {
  Shared& shared = team.shared;
  Selected found{0, 0, 0};
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int bits = pass == 2 ? 10 : 11, shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const uint32_t mask = (1u << bits) - 1, matched = pass == 0 ? 0 : kAll << (shift + bits);
    team.meet();  // the bins, and what find_digit wrote, have been read
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
    __syncthreads();
    visit([&](uint32_t key, unsigned long long weight) {
      if ((key & matched) == found.key && weight > 0) atomicAdd(&shared.bins[key >> shift & mask], weight);
    });
    team.meet();
    find_digit(team, found.above, target);
    found.key |= shared.digit << shift;
    found.above = shared.above;
    found.at = shared.at;
  }
  return found;
}

// Cuts the tokens that `cut` keeps where their weights reach `target`; equal tokens have equal weights, the lowest indices first.
template <bool kVector, class T, class Weight>
__device__ void narrow(const T& team, SampleCut& cut, const float* row, uint32_t n, uint64_t target, const Weight& weight) {
  const Selected found = select(team, target, [&](const auto& add) {
    each_logit<kVector>(team, row, n, [&](uint32_t v, float x) {
      const uint32_t key = order_key(x);
      if (cut.keeps(key, v)) add(key, weight(x));
    });
  });
  const uint64_t each = weight(of_order_key(found.key)), wanted = (target - found.above + each - 1) / each;
  uint32_t last = found.key == cut.key ? cut.last : kAll;
  if (wanted * each < found.at) {
    const Selected index = select(team, wanted, [&](const auto& add) {
      each_logit<kVector>(team, row, n, [&](uint32_t v, float x) {
        if (order_key(x) == found.key) add(kAll - v, 1);
      });
    });
    last = kAll - index.key;
  }
  cut.key = found.key, cut.last = last;
}

// At least sample_score, for less: with z leading zeros in the word, -log2(1 - u) >= u / ln 2 >= 2^(-z - 1) / ln 2.
__device__ __forceinline__ float score_bound(float log2_probability, uint32_t word) {
  return log2_probability + (static_cast<float>(__clz(static_cast<int>(word))) + 0.5f);
}

template <bool kVector, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const Sample op) {
  __shared__ Shared shared;
  Team<kBlocks> team{shared};
  begin_rows(op.rows);
  const int64_t r = blockIdx.x / kBlocks;
  const uint32_t n = static_cast<uint32_t>(op.vocabulary);
  const float* row = op.logits + r * op.ld;
  const float temperature = op.temperatures[r], top_p = op.top_p[r];
  const int32_t top_k = op.top_k[r];
  const uint64_t seed = static_cast<uint64_t>(op.seeds[r]), position = static_cast<uint64_t>(op.positions[r]);

  if (threadIdx.x == 0) shared.score = 0;
  bool nan = false;
  uint64_t best = 0;
  each_far_logit<kVector>(team, row, n, [&](uint32_t v, float x) {
    nan |= x != x;
    best = max(best, ranked(x, v));
  });
  constexpr uint64_t kNaN = ~uint64_t{0};  // above every number's rank
  best = team.largest(nan ? kNaN : best);
  if (best == kNaN || !sample_options_valid(temperature, top_k, top_p)) {
    if (threadIdx.x == 0 && team.rank() == 0) op.tokens[r] = -1;
    team.leave();
    return;
  }

  if (temperature > 0.0f) {
    const float largest = of_order_key(static_cast<uint32_t>(best >> 32));
    const auto log2_of = [&](float x) { return sample_log2(x, largest, temperature); };
    const auto mass_of = [&](float x) { return sample_mass(log2_of(x)); };
    SampleCut cut;
    if (top_k > 0 && top_k < n) narrow<kVector>(team, cut, row, n, top_k, [](float) { return uint64_t{1}; });
    if (top_p < 1.0f) {
      uint64_t total = 0;
      each_logit<kVector>(team, row, n, [&](uint32_t v, float x) {
        if (cut.keeps(order_key(x), v)) total += mass_of(x);
      });
      narrow<kVector>(team, cut, row, n, sample_target(team.sum(total), top_p), mass_of);
    }

    // A thread's four logits are a block of random words.
    const PhiloxKeys keys(seed);
    const bool all = cut.key == 0;
    float score = -INFINITY;  // the largest so far, of the lowest index, which rises
    uint32_t index = kAll;
    float least = -INFINITY;  // what can win has at least this score
#pragma unroll 1
    for (uint32_t base = 0; base < n; base += team.kStep) {
      const uint32_t first = base + team.first_logit();
      alignas(16) float x[4];
      uint32_t kept = 0;  // a bit a logit
      if (first < n) {
        if constexpr (kVector) *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(row + first);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          if constexpr (!kVector) x[j] = first + j < n ? row[first + j] : 0.0f;
          kept |= (kVector || first + j < n) && (all || cut.keeps(order_key(x[j]), first + j)) ? 1u << j : 0;
        }
      }
      if (kept != 0) {
        PhiloxWords words = philox4x32(first / 4, 0, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), keys);
#pragma unroll 1  // a row is so few turns of these loops that bringing their instructions would take longer than what they do
        for (uint32_t v = first; kept != 0; ++v, kept >>= 1) {
          const float log2 = log2_of(x[0]);
          if (kept & 1 && score_bound(log2, words.w[0]) >= least) {
            const float mine = sample_score(log2, words.w[0]);
            if (mine > score || index == kAll) score = mine, index = v;
          }
#pragma unroll
          for (int j = 0; j < 3; ++j) x[j] = x[j + 1], words.w[j] = words.w[j + 1];
        }
      }
      if (base == 0 && n > team.kStep) {  // few of what follows can still win
        const uint32_t key = __reduce_max_sync(kAll, index == kAll ? 0 : order_key(score));
        if (threadIdx.x % 32 == 0) atomicMax(&shared.score, key);
        __syncthreads();
        if (shared.score != 0) least = of_order_key(shared.score);
      }
    }
    best = team.largest(index == kAll ? 0 : ranked(score, index));
  }
  if (threadIdx.x == 0 && team.rank() == 0) op.tokens[r] = index_of(best);
  team.leave();
}

template <bool kVector>
void launch(const Sample& op, cudaStream_t stream) {
  const char* name = "sample_kernel";
  if (op.rows <= kSharedRows && op.vocabulary > kThreads * 4)
    launch_clusters(true, kTeam, name, sample_kernel<kVector, kTeam>, op.rows * kTeam, kThreads, 0, stream, op);
  else
    launch_kernel(true, name, sample_kernel<kVector, 1>, op.rows, kThreads, 0, stream, op);
}

}  // namespace

void sample_sm90(const Sample& op, void* stream) {
  if (op.rows == 0) return;
  if (op.rows > INT32_MAX) throw std::runtime_error("sample: logits has more than 2^31 - 1 rows");
  const bool vector = op.vocabulary % 4 == 0 && op.ld % 4 == 0 && reinterpret_cast<uintptr_t>(op.logits) % 16 == 0;
  if (vector)
    launch<true>(op, static_cast<cudaStream_t>(stream));
  else
    launch<false>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold
