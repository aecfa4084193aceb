#include "quant/fused_cpu.h"

#include "core/fp8.h"
#include "core/threads.h"

namespace eightfold::quant {
namespace {

EF_CPU_CLONES void round_to_bf16(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_float(float_to_bf16(x[i]));
}

}  // namespace

void round_span(float* values, DType dtype, int64_t n) {
  if (dtype == DType::bf16) round_to_bf16(values, n);
}

}  // namespace eightfold::quant
