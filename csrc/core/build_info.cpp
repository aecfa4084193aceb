#include <string>

#include "core/exports.h"
#include "gemm/fp8_gemm.h"

const char* eightfold_build_info() {
  static const std::string info = [] {
#ifdef EIGHTFOLD_WITH_CUDA
    std::string cuda = "\"cuda\": true, \"cuda_version\": \"" EIGHTFOLD_CUDA_VERSION "\"";
#else
    std::string cuda = "\"cuda\": false, \"cuda_version\": null";
#endif
    return "{" + cuda + ", \"compiler\": \"" __VERSION__ "\", \"cpu_gemm\": \"" + eightfold::fp8_gemm_cpu_isa() + "\"}";
  }();
  return info.c_str();
}
