// Rows over threads. A row's loops over logits run in chunks of plain arrays, so that the compiler vectorises them.
#include <algorithm>
#include <limits>
#include <vector>

#include "core/threads.h"
#include "sampling/sampling.h"

namespace eightfold {
namespace {

constexpr int kDigitBits[] = {11, 11, 10};
constexpr int64_t kChunk = 1024;  // tokens whose noise is drawn at once

struct Row {
  const float* logits;
  int64_t vocabulary;
  float max, temperature;
};

// What a thread keeps between rows.
struct Workspace {
  std::vector<uint32_t> keys;
  std::vector<uint64_t> masses;
  std::vector<uint64_t> bins = std::vector<uint64_t>(1 << 11);
};

// The largest key such that the weights of keys from it on reach `target`.
struct Selected {
  uint32_t key;
  uint64_t above, at;  // weights of larger keys, and of this one
};

template <class Key, class Weight>
Selected select(int64_t n, std::vector<uint64_t>& bins, uint64_t target, const Key& key, const Weight& weight) {
  Selected found{0, 0, 0};
  int shift = 32;
  for (int bits : kDigitBits) {
    const uint64_t prefix = static_cast<uint64_t>(found.key) >> shift;
    shift -= bits;
    const uint32_t mask = (1u << bits) - 1;
    std::fill(bins.begin(), bins.end(), 0);
    for (int64_t v = 0; v < n; ++v) {
      const uint32_t k = key(v);
      if (static_cast<uint64_t>(k) >> (shift + bits) == prefix) bins[k >> shift & mask] += weight(v);
    }
    uint32_t digit = mask;
    while (digit > 0 && found.above + bins[digit] < target) found.above += bins[digit--];
    found.key |= digit << shift;
    found.at = bins[digit];
  }
  return found;
}

// Cuts the tokens that `cut` keeps where their weights reach `target`; equal tokens have equal weights, the lowest indices first.
template <class Weight, class Unit>
void narrow(SampleCut& cut, Workspace& work, int64_t n, uint64_t target, const Weight& weight, const Unit& unit) {
  const uint32_t* keys = work.keys.data();
  const auto kept = [&](int64_t v) { return cut.keeps(keys[v], static_cast<uint32_t>(v)) ? weight(v) : 0; };
  const Selected found = select(n, work.bins, target, [&](int64_t v) { return keys[v]; }, kept);
  const uint64_t each = unit(found.key), wanted = (target - found.above + each - 1) / each;
  uint32_t last = found.key == cut.key ? cut.last : 0xFFFFFFFFu;
  if (wanted * each < found.at) {
    const auto reversed = [](int64_t v) { return 0xFFFFFFFFu - static_cast<uint32_t>(v); };
    const auto equal = [&](int64_t v) { return static_cast<uint64_t>(keys[v] == found.key); };
    last = 0xFFFFFFFFu - select(n, work.bins, wanted, reversed, equal).key;
  }
  cut = {found.key, last};
}

EF_CPU_CLONES void make_keys(const float* x, int64_t n, uint32_t* keys) {
  for (int64_t v = 0; v < n; ++v) keys[v] = order_key(x[v]);
}

EF_CPU_CLONES bool holds_nan(const float* x, int64_t n) {
  int32_t nan = 0;
  for (int64_t v = 0; v < n; ++v) nan |= x[v] != x[v];
  return nan != 0;
}

EF_CPU_CLONES void make_masses(const Row& row, uint64_t* masses) {
  const float max = row.max, temperature = row.temperature;
  for (int64_t v = 0; v < row.vocabulary; ++v) masses[v] = sample_mass(sample_log2(row.logits[v], max, temperature));
}

// The scores of tokens [begin, begin + kChunk), whether they are kept or past the last.
EF_CPU_CLONES void make_scores(const Row& row, int64_t begin, int64_t position, const PhiloxKeys& keys, float* scores) {
  uint32_t words[kChunk];
  const uint32_t low = static_cast<uint32_t>(position), high = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  const uint32_t block = static_cast<uint32_t>(begin / 4);
  for (uint32_t i = 0; i < kChunk / 4; ++i) {
    const PhiloxWords drawn = philox4x32(block + i, 0, low, high, keys);
    for (int j = 0; j < 4; ++j) words[4 * i + j] = drawn.w[j];
  }
  const int64_t count = std::min(kChunk, row.vocabulary - begin);
  const float max = row.max, temperature = row.temperature;
  const float* x = row.logits + begin;
  for (int64_t i = 0; i < count; ++i) scores[i] = sample_score(sample_log2(x[i], max, temperature), words[i]);
}

int64_t draw(const Row& row, const SampleCut& cut, const uint32_t* keys, int64_t seed, int64_t position) {
  const PhiloxKeys philox(static_cast<uint64_t>(seed));
  float scores[kChunk], best = -std::numeric_limits<float>::infinity();
  int64_t token = -1;
  for (int64_t begin = 0; begin < row.vocabulary; begin += kChunk) {
    const int64_t count = std::min(kChunk, row.vocabulary - begin);
    const auto keeps = [&](int64_t i) { return cut.keeps(keys[begin + i], static_cast<uint32_t>(begin + i)); };
    int64_t i = 0;
    while (i < count && !keeps(i)) ++i;
    if (i == count) continue;
    make_scores(row, begin, position, philox, scores);
    for (; i < count; ++i)
      if (scores[i] > best && keeps(i)) best = scores[i], token = begin + i;
  }
  return token;
}

int64_t sample_row(const Sample& op, int64_t r, Workspace& work) {
  const int64_t n = op.vocabulary, k = op.top_k[r];
  const float top_p = op.top_p[r];
  Row row{op.logits + r * op.ld, n, 0.0f, op.temperatures[r]};
  if (!sample_options_valid(row.temperature, op.top_k[r], top_p) || holds_nan(row.logits, n)) return -1;
  work.keys.resize(n);
  make_keys(row.logits, n, work.keys.data());
  const int64_t first = std::max_element(work.keys.begin(), work.keys.end()) - work.keys.begin();
  if (row.temperature == 0.0f) return first;
  row.max = row.logits[first];
  SampleCut cut;
  if (k > 0 && k < n) narrow(cut, work, n, k, [](int64_t) -> uint64_t { return 1; }, [](uint32_t) -> uint64_t { return 1; });
  if (top_p < 1.0f) {
    work.masses.resize(n);
    make_masses(row, work.masses.data());
    uint64_t total = 0;
    for (int64_t v = 0; v < n; ++v) total += cut.keeps(work.keys[v], static_cast<uint32_t>(v)) ? work.masses[v] : 0;
    const auto mass_of_key = [&](uint32_t key) { return sample_mass(sample_log2(of_order_key(key), row.max, row.temperature)); };
    narrow(cut, work, n, sample_target(total, top_p), [&](int64_t v) { return work.masses[v]; }, mass_of_key);
  }
  return draw(row, cut, work.keys.data(), op.seeds[r], op.positions[r]);
}

}  // namespace

void sample_cpu(const Sample& op) {
  parallel_for(op.rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(op.vocabulary, 1)), [&](int64_t begin, int64_t end) {
    Workspace work;
    for (int64_t r = begin; r < end; ++r) op.tokens[r] = sample_row(op, r, work);
  });
}

}  // namespace eightfold
