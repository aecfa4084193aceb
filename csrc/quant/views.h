// Where a cast writes: the two layouts of DESIGN "Numbers" as raw pointers. `codes == nullptr` means "not wanted".
#pragma once

#include <cstdint>

namespace eightfold {

constexpr int64_t kGroup = 128;

inline int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }

// Groups (1, 128): codes [rows, cols] row-major; the scale of (row, group) at scales[row + group * scale_ld].
struct RowCodes {
  uint8_t* codes = nullptr;
  float* scales = nullptr;
  int64_t scale_ld = 0;
};

// Groups (128, 1): code (row, col) at codes[row + col * code_ld], scale (row / 128, col) at scales[row / 128 * scale_ld + col].
// code_ld is a multiple of 16, `codes` 16-byte aligned.
struct ColCodes {
  uint8_t* codes = nullptr;
  int64_t code_ld = 0;
  float* scales = nullptr;
  int64_t scale_ld = 0;
};

// Codes to read, groups (1, 128), as RowCodes wrote them.
struct RowCodesIn {
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  int64_t scale_ld = 0;
};

}  // namespace eightfold
