// The buffers of the blocked product.
#include "gemm/blocked_cpu.h"

#include <cstdlib>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace eightfold {

float* gemm_cpu_scratch(GemmScratch slot, int64_t floats) {
  constexpr int64_t kHugePage = 2 << 20;  // the shared buffers are walked with strides that miss small pages' translations
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<float, Free> memory;
    int64_t floats = 0;
  };
  thread_local Buffer buffers[static_cast<int>(GemmScratch::count)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.floats < floats) {
    buffer.memory.reset();
    buffer.floats = 0;
    int64_t page = floats * 4 < kHugePage / 2 ? 4096 : kHugePage;
    int64_t bytes = round_up(floats * 4, page);
    buffer.memory.reset(static_cast<float*>(std::aligned_alloc(page, bytes)));
    if (!buffer.memory) throw std::bad_alloc();
#if defined(__linux__)
    if (page == kHugePage) madvise(buffer.memory.get(), bytes, MADV_HUGEPAGE);
#endif
    buffer.floats = bytes / 4;
  }
  return buffer.memory.get();
}

}  // namespace eightfold
