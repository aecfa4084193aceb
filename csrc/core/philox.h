// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random words of a 128-bit counter
// and a 64-bit key. A counter-based generator has no state, so a bit depends on what it is for and not on who draws it:
// the same on CPU and CUDA, for any number of threads and any sharding.
#pragma once

#include <cstdint>

#include "core/fp8.h"

namespace eightfold {

struct PhiloxWords {
  uint32_t w[4];
};

constexpr int kPhiloxRounds = 10;

// The key of each round; a kernel that has them as parameters adds nothing to its rounds.
struct PhiloxKeys {
  uint32_t k[2 * kPhiloxRounds];

  EF_HD explicit PhiloxKeys(uint64_t key) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      k[2 * round] = static_cast<uint32_t>(key) + round * 0x9E3779B9u;
      k[2 * round + 1] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u;
    }
  }
};

EF_HD PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKeys& keys) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
    uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ keys.k[2 * round];
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ keys.k[2 * round + 1];
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace eightfold
