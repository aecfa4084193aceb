// Threads of the CPU kernels. Kernels know no framework, so the host program installs its own pool: the torch bindings
// install torch's, and torch.set_num_threads governs our kernels too.
#pragma once

#include <cstdint>

namespace eightfold {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelForBackend = void (*)(int64_t n, int64_t grain, RangeBody body, void* context);

void set_parallel_backend(ParallelForBackend backend);
void run_parallel(int64_t n, int64_t grain, RangeBody body, void* context);

// body(begin, end) over disjoint ranges that cover [0, n); a range holds at least `grain` items. Results may not depend on the split.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  run_parallel(n, grain, call, const_cast<Body*>(&body));
}

}  // namespace eightfold

// Compiles a function for several instruction sets and picks one at load time. It does not reach into lambdas: write the
// loop as a named function and call that from the lambda.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define EF_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EF_CPU_CLONES
#endif
