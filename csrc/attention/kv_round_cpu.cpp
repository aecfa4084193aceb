#include <vector>

#include "attention/attention.h"
#include "core/fp8.h"
#include "core/threads.h"
#include "quant/fused_cpu.h"
#include "quant/span_cpu.h"

namespace eightfold {

void kv_round_cpu(const KvRound& op) {
  parallel_for(op.tokens, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(op.dim);
    std::vector<uint8_t> codes(op.dim);
    for (int64_t token = begin; token < end; ++token)
      for (int64_t head = 0; head < op.heads; ++head) {
        quant::widen(op.x.data, op.dtype, token * op.x.token_stride + head * op.x.head_stride, op.dim, wide.data());
        const float scale = group_scale(bits_float(quant::amax_bits(wide.data(), op.dim)), false);
        quant::encode(wide.data(), op.dim, scale, codes.data());
        quant::decode(codes.data(), op.dim, scale, wide.data());
        quant::round_span(wide.data(), DType::bf16, op.dim);  // as attention over pages does, whatever its dtype
        quant::narrow(wide.data(), op.dim, op.out.data, op.dtype, token * op.out.token_stride + head * op.out.head_stride);
      }
  });
}

}  // namespace eightfold
