// cos and sin of position * frequency, fp32, as rotary.h reads them.
//
// Floor: both tables written once. A thread makes an element of each. The angle is one fp32 product of the position, rounded to fp32.
#pragma once

#include <cstdint>

namespace eightfold {

struct RotaryAngles {
  const float* frequency;    // [half]
  const int64_t* positions;  // [rows]
  int64_t rows, half;
  float *cos, *sin;  // [rows, half]
};

void rotary_tables_cpu(const RotaryAngles& op);
void rotary_tables_sm90(const RotaryAngles& op, void* stream);

}  // namespace eightfold
