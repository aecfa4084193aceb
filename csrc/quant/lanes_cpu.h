// Sums on the CPU in 16 lanes that end in one tree: the order depends on the length alone, not on the instruction set.
#pragma once

#include <cstdint>

namespace eightfold::quant {

constexpr int64_t kLanes = 16;

inline __attribute__((always_inline)) float fold_lanes(float* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace eightfold::quant
