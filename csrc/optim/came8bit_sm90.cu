// The host's side of CAME on CUDA: which tensors go together, and the launches of a batch.
#include <algorithm>
#include <vector>

#include "optim/came8bit.cuh"

namespace eightfold {
namespace {

using namespace came;

constexpr int kKinds = 2 * kNoMatrix;
constexpr int64_t kBatchElements = 1 << 26;  // of a batch of more than one tensor: 7 MB of scratch memory

bool aligned_to(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Packs of 8 neighbours are whole, aligned, in one row and one block, and rounded with whole blocks of random words.
bool is_aligned(const CameTensor& t) {
  return t.cols % 8 == 0 && t.offset % 8 == 0 && aligned_to(t.param, 16) && aligned_to(t.grad, 16) && aligned_to(t.m, 16);
}

int kind_of(const CameTensor& t) {
  int kind = (t.param_type == DType::bf16 ? kBf16Param : 0) | (t.grad_type == DType::bf16 ? kBf16Grad : 0);
  if (!t.factored()) return kind | kNoMatrix;
  return kind | (t.m_scales ? kByteMoments : 0) | (is_aligned(t) ? kAligned : 0);
}

int64_t scratch_of(const CameTensor& t) { return t.factored() ? Layout(t.rows, t.cols).total : padded(parts_of(t.numel(), kVectorChunk)); }

// Blocks of each phase.
int64_t tiles(const Entry& t) { return parts_of(t.rows, kTile) * parts_of(t.cols, kTile); }
int64_t folds(const Entry& t) { return parts_of(t.rows, kThreads) + parts_of(t.cols, kThreads); }
int64_t steps(const Entry& t) { return parts_of(parts_of(t.numel, kCameBlock), kWarps); }
int64_t chunks(const Entry& t) { return parts_of(t.numel, kVectorChunk); }

uint32_t place_blocks(Launch& launch, int64_t (*blocks_of)(const Entry&)) {
  int64_t blocks = 0;
  for (int i = 0; i < launch.count; ++i) {
    launch.first_block[i] = static_cast<uint32_t>(blocks);
    blocks += blocks_of(launch.entries[i]);
  }
  return static_cast<uint32_t>(blocks);
}

}  // namespace

CamePlan came8bit_plan(const CameTensor* tensors, int64_t count) {
  std::vector<const CameTensor*> kinds[kKinds];
  for (int64_t i = 0; i < count; ++i) kinds[kind_of(tensors[i])].push_back(&tensors[i]);
  CamePlan plan;
  for (int kind = 0; kind < kKinds; ++kind) {
    int64_t elements = 0, scratch = 0;
    for (const CameTensor* t : kinds[kind]) {
      const bool full =
          elements + t->numel() > kBatchElements || (!plan.batches.empty() && plan.batches.back().tensors.size() == kMaxTensors);
      if (elements == 0 || full) {
        plan.batches.push_back({kind, {}});
        elements = scratch = 0;
      }
      plan.batches.back().tensors.push_back(t);
      elements += t->numel(), scratch += scratch_of(*t);
      plan.scratch_floats = std::max(plan.scratch_floats, scratch);
    }
  }
  return plan;
}

void came8bit_cuda(const CamePlan& plan, const CameOptions& o, float* scratch, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  for (const CameBatch& batch : plan.batches) {
    Launch launch{o.lr, o.grad_scale, came_constants(o), PhiloxKeys(o.seed), static_cast<int>(batch.tensors.size()), {}, {}};
    float* room = scratch;
    for (int i = 0; i < launch.count; ++i) {
      const CameTensor& t = *batch.tensors[i];
      const uint32_t rows = t.factored() ? static_cast<uint32_t>(t.rows) : 1, cols = t.factored() ? static_cast<uint32_t>(t.cols) : 1;
      launch.entries[i] = {t.param,
                           t.grad,
                           t.m,
                           reinterpret_cast<float2*>(t.m_scales),
                           t.v_rows,
                           t.v_cols,
                           t.u_rows,
                           t.u_cols,
                           t.step,
                           room,
                           t.offset,
                           t.numel(),
                           rows,
                           cols,
                           0xFFFFFFFFu / cols};
      room += scratch_of(t);
    }
    if (batch.kind & kNoMatrix) {
      const uint32_t blocks = place_blocks(launch, chunks);
      for (bool step : {false, true}) launch_vectors(batch.kind, step, blocks, launch, s);
      continue;
    }
    for (bool instabilities : {false, true}) {
      launch_sums(batch.kind, instabilities, place_blocks(launch, tiles), launch, s);
      launch_folds(instabilities, place_blocks(launch, folds), launch, s);
    }
    launch_step(batch.kind, place_blocks(launch, steps), launch, s);
  }
}

}  // namespace eightfold
