#include <cmath>

#include "core/threads.h"
#include "rotary/rotary_tables.h"

namespace eightfold {

void rotary_tables_cpu(const RotaryAngles& op) {
  parallel_for(op.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < op.half; ++i) {
        const float angle = static_cast<float>(op.positions[row]) * op.frequency[i];
        op.cos[row * op.half + i] = std::cos(angle);
        op.sin[row * op.half + i] = std::sin(angle);
      }
  });
}

}  // namespace eightfold
