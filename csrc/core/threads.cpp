#include "core/threads.h"

namespace eightfold {
namespace {

void serial(int64_t n, int64_t, RangeBody body, void* context) { body(0, n, context); }

ParallelForBackend backend = serial;

}  // namespace

void set_parallel_backend(ParallelForBackend b) { backend = b; }

void run_parallel(int64_t n, int64_t grain, RangeBody body, void* context) {
  if (n > 0) backend(n, grain, body, context);
}

}  // namespace eightfold
