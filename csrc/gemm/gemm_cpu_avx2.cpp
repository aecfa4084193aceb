#if defined(__x86_64__)
#include "gemm/gemm_cpu.h"
#include "gemm/gemm_cpu_x86.h"
#include "gemm/isa_avx2.h"

namespace eightfold {

void gemm_cpu_avx2(const GemmArgs& args) { run_plain<X86Pack<Avx2>>(args); }

}  // namespace eightfold
#endif
