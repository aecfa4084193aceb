#include <algorithm>

#include "core/threads.h"
#include "optim/dre_group_cpu.h"
#include "optim/dre_states.h"

namespace eightfold {
namespace {

constexpr int64_t kGrain = 64;  // groups a thread takes at least

struct Span {
  int64_t begin;
  int count;
};

inline Span group_span(int64_t group, int64_t groups_per_row, int64_t row_length) {
  int64_t row = group / groups_per_row, col = (group - row * groups_per_row) * kDreGroup;
  return {row * row_length + col, static_cast<int>(std::min<int64_t>(kDreGroup, row_length - col))};
}

struct Job {
  const void* x;
  DType type;
  int64_t groups_per_row, row_length;
  const uint8_t* codes_in;
  uint8_t* codes;
  const float* maxima_in;
  float* maxima;
  const uint8_t* exponents_in;
  uint8_t* exponents;
  float* out;
};

EF_CPU_CLONES void quantize_range(const Job& job, int64_t begin, int64_t end) {
  float x[kDreGroup];
  for (int64_t group = begin; group < end; ++group) {
    Span span = group_span(group, job.groups_per_row, job.row_length);
    if (job.type == DType::f32) {
      const float* source = static_cast<const float*>(job.x) + span.begin;
      for (int i = 0; i < span.count; ++i) x[i] = source[i];
    } else {
      const uint16_t* source = static_cast<const uint16_t*>(job.x) + span.begin;
      for (int i = 0; i < span.count; ++i) x[i] = bf16_to_float(source[i]);
    }
    DreScale scale = encode_group<false>(x, span.count, job.codes + span.begin, nullptr, 0);
    job.maxima[group] = scale.maximum;
    job.exponents[group] = scale.exponent;
  }
}

EF_CPU_CLONES void dequantize_range(const Job& job, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    Span span = group_span(group, job.groups_per_row, job.row_length);
    DreScale scale{job.maxima_in[group], job.exponents_in[group]};
    decode_group(job.codes_in + span.begin, span.count, scale, job.out + span.begin);
  }
}

}  // namespace

void dre_quantize_cpu(const void* x, DType type, int64_t rows, int64_t row_length, uint8_t* codes, float* maxima, uint8_t* exponents) {
  int64_t groups_per_row = (row_length + kDreGroup - 1) / kDreGroup;
  Job job{x, type, groups_per_row, row_length, nullptr, codes, nullptr, maxima, nullptr, exponents, nullptr};
  parallel_for(rows * groups_per_row, kGrain, [&](int64_t begin, int64_t end) { quantize_range(job, begin, end); });
}

void dre_dequantize_cpu(const uint8_t* codes, const float* maxima, const uint8_t* exponents, int64_t rows, int64_t row_length, float* x) {
  int64_t groups_per_row = (row_length + kDreGroup - 1) / kDreGroup;
  Job job{nullptr, DType::f32, groups_per_row, row_length, codes, nullptr, maxima, nullptr, exponents, nullptr, x};
  parallel_for(rows * groups_per_row, kGrain, [&](int64_t begin, int64_t end) { dequantize_range(job, begin, end); });
}

}  // namespace eightfold
