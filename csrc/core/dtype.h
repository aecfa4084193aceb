// Element types that kernels speak; the bindings map torch's to these.
#pragma once

#include <cstdint>

namespace eightfold {

enum class DType : int32_t { f32, bf16, e4m3, u8 };

}  // namespace eightfold
