#include <cuda_runtime.h>

#include "confidence/uncover.h"
#include "core/dependent_launch.cuh"

namespace eightfold {
namespace {

constexpr int kThreads = static_cast<int>(kUncoverRows);

// A bit for each of the block's tokens; every thread gets them all.
__device__ __forceinline__ uint64_t bits_of_block(uint32_t (&of_warp)[2], bool mine) {
  const uint32_t word = __ballot_sync(0xFFFFFFFFu, mine);
  __syncthreads();  // what was there has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = word;
  __syncthreads();
  return static_cast<uint64_t>(of_warp[1]) << 32 | of_warp[0];
}

__global__ void __launch_bounds__(kThreads) uncover_kernel(const __grid_constant__ Uncover op) {
  __shared__ float confidences[kThreads];
  __shared__ uint32_t of_warp[2];
  begin_rows(op.batch);
  const int64_t b = blockIdx.x, first = op.at[b];
  if (first < 0 || first + op.rows > op.max_tokens) return;
  const int i = static_cast<int>(threadIdx.x);
  const bool exists = i < op.rows;
  int64_t* token = op.tokens + b * op.ld + first + i;
  int64_t now = exists ? *token : -1;
  const int64_t id = exists ? op.ids[b * op.rows + i] : -1;
  const float confidence = exists ? op.confidence[b * op.rows + i] : 0.0f;
  const bool masked = exists && now == op.mask_id, candidate = masked && id >= 0 && id != op.mask_id && confidence == confidence;

  confidences[i] = confidence;
  const uint64_t candidates = bits_of_block(of_warp, candidate);
  const int count = __popcll(candidates);
  int before = 0;  // of the candidates, how many rank before this one
  for (uint64_t rest = candidates; rest != 0; rest &= rest - 1) {
    const int j = __ffsll(static_cast<long long>(rest)) - 1;
    before += confidences[j] > confidence || (confidences[j] == confidence && j < i);
  }
  const int most = op.counts == nullptr ? count : op.counts[b];
  const bool reaches = candidate && (before == 0 || (before < most && confidence >= op.bounds[before]));
  const int taken = __popcll(bits_of_block(of_warp, reaches));
  const bool take = reaches || (op.last_too && candidate && before + 1 == count && taken == before);
  if (take) *token = now = id;

  const uint64_t masks = bits_of_block(of_warp, exists && now == op.mask_id);
  if (i == 0) op.left[b] = __popcll(masks);
  if (op.ended == nullptr) return;
  bool ends = false;
  for (int64_t e = 0; exists && e < op.eos_count; ++e) ends |= now == op.eos_ids[e];
  const uint64_t before_masks = masks == 0 ? ~uint64_t{0} : (masks & -masks) - 1;
  if ((bits_of_block(of_warp, ends) & before_masks) != 0 && i == 0) op.ended[b] = 1;
}

}  // namespace

void uncover_sm90(const Uncover& op, void* stream) {
  if (op.batch == 0) return;
  launch_kernel(true, "uncover_kernel", uncover_kernel, op.batch, kThreads, 0, static_cast<cudaStream_t>(stream), op);
}

}  // namespace eightfold
