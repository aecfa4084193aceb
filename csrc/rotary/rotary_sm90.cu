// One thread for eight elements of the first half of a head and the eight that pair with them: two 16-byte loads and stores
// (bf16), a grid over all of them, no shared memory. Tables are read through the cache, once from memory.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "core/fp8_vector.cuh"
#include "core/launch.cuh"
#include "rotary/rotary.h"
#include "rotary/rotate.cuh"

namespace eightfold {
namespace {

constexpr int kThreads = 256;

struct Shape {
  uint32_t items, per_token, per_head, tokens, half;  // items: octets of first halves in all
  int64_t batch_stride, token_stride, head_stride, table_batch_stride;
  bool inverse;
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const T* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin, T* __restrict__ y, Shape shape) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= shape.items) return;
  const uint32_t row = item / shape.per_token, within = item % shape.per_token;
  const uint32_t head = within / shape.per_head, at = within % shape.per_head * 8;
  const uint32_t batch = row / shape.tokens, token = row % shape.tokens;
  const int count = min(8, static_cast<int>(shape.half - at));

  const T* from = x + batch * shape.batch_stride + token * shape.token_stride + head * shape.head_stride + at;
  const Octet<T> first = load_octet<kVector>(from, count), second = load_octet<kVector>(from + shape.half, count);
  const int64_t table = batch * shape.table_batch_stride + static_cast<int64_t>(token) * shape.half + at;
  const Octet<float> c = load_octet<kVector>(cos + table, count), s = load_octet<kVector>(sin + table, count);

  float out_first[8], out_second[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float a = first.value(j), b = second.value(j), sine = shape.inverse ? -s.value(j) : s.value(j);
    out_first[j] = rotated(a, -b, c.value(j), sine);
    out_second[j] = rotated(b, a, c.value(j), sine);
  }
  T* to = y + (static_cast<int64_t>(row) * (shape.per_token / shape.per_head) + head) * 2 * shape.half + at;
  Octet<T> octet;
  octet.set(out_first);
  store_octet(to, octet, count, kVector);
  octet.set(out_second);
  store_octet(to + shape.half, octet, count, kVector);
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
void typed(const Rotary& op, cudaStream_t stream) {
  const int64_t half = op.dim / 2, per_head = (half + 7) / 8, items = op.batch * op.tokens * op.heads * per_head;
  if (items > INT32_MAX) {
    throw std::runtime_error("rotary: x has more than 2^31 - 1 groups of 16 elements");
  }
  const auto whole = [](int64_t stride) { return stride % (16 / static_cast<int64_t>(sizeof(T))) == 0; };
  const bool vector = half % 8 == 0 && whole(op.x_batch_stride) && whole(op.x_token_stride) && whole(op.x_head_stride) && aligned16(op.x) &&
                      aligned16(op.y) && aligned16(op.cos) && aligned16(op.sin);
  const Shape shape{static_cast<uint32_t>(items),
                    static_cast<uint32_t>(op.heads * per_head),
                    static_cast<uint32_t>(per_head),
                    static_cast<uint32_t>(op.tokens),
                    static_cast<uint32_t>(half),
                    op.x_batch_stride,
                    op.x_token_stride,
                    op.x_head_stride,
                    op.table_batch_stride,
                    op.inverse};
  const auto kernel = vector ? rotary_kernel<T, true> : rotary_kernel<T, false>;
  kernel<<<static_cast<unsigned>((items + kThreads - 1) / kThreads), kThreads, 0, stream>>>(static_cast<const T*>(op.x), op.cos, op.sin,
                                                                                            static_cast<T*>(op.y), shape);
  check_launch("rotary_kernel");
}

}  // namespace

void rotary_sm90(const Rotary& op, void* stream) {
  if (op.batch == 0 || op.tokens == 0 || op.heads == 0 || op.dim == 0) return;
  if (op.dtype == DType::bf16)
    typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    typed<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold
