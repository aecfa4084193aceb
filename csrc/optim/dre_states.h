// Quantise and dequantise alone: what the optimizer does to a moment between two steps, as ops of their own.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace eightfold {

// x: rows x row_length, f32 or bf16, contiguous. maxima, exponents: rows x ceil(row_length / 128).
void dre_quantize_cpu(const void* x, DType type, int64_t rows, int64_t row_length, uint8_t* codes, float* maxima, uint8_t* exponents);
void dre_dequantize_cpu(const uint8_t* codes, const float* maxima, const uint8_t* exponents, int64_t rows, int64_t row_length, float* x);

// At most 2^31 - 1 groups.
void dre_quantize_cuda(const void* x, DType type, int64_t rows, int64_t row_length, uint8_t* codes, float* maxima, uint8_t* exponents,
                       void* stream);
void dre_dequantize_cuda(const uint8_t* codes, const float* maxima, const uint8_t* exponents, int64_t rows, int64_t row_length, float* x,
                         void* stream);

}  // namespace eightfold
