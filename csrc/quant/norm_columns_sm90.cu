// Column codes of a norm's output, from the codes of its input: one tile cast whose source is the norm of a row (norm.h).
#include "quant/norm.h"
#include "quant/row_cast.cuh"

namespace eightfold::quant {
namespace {

template <class T>
struct NormedCodes {
  using Element = T;
  int64_t rows, cols;
  bool vector;
  RowCodes x;
  const float* rstd;
  const void* weight;
  bool weight_bf16;

  explicit NormedCodes(const RmsNormColumns& op)
      : rows(op.x.rows),
        cols(op.x.cols),
        vector(aligned(op.x.codes, 8) && op.x.ld % 8 == 0 && aligned16(op.weight)),
        x(op.x),
        rstd(op.rstd),
        weight(op.weight),
        weight_bf16(op.weight_dtype == DType::bf16) {}

  template <bool kVector, bool kFull>
  __device__ __forceinline__ Octet<T> load(int64_t row, int64_t col) const {
    const int count = kFull ? 8 : octet_count(row, col, rows, cols);
    const uint2 codes = load_codes8<kVector, true>(x.codes + row * x.ld + col, count);
    float scale = 0.0f, inverse = 0.0f, w[8], v[8];
    if (count > 0) scale = __ldcg(x.scales + row + col / kTile * x.scale_ld), inverse = __ldcg(rstd + row);
    load_weights<kVector>(weight, weight_bf16, col, kFull ? 8 : octet_count(0, col, 1, cols), w);
    decode4(codes.x, v);
    decode4(codes.y, v + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = __fmul_rn(__fmul_rn(__fmul_rn(v[j], scale), inverse), w[j]);
    Octet<T> y;
    y.set(v);
    return y;
  }
};

}  // namespace

void rms_norm_columns_sm90(const RmsNormColumns& op, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const TileOutput out = tile_output({}, op.y_cols);
  if (op.dtype == DType::bf16)
    launch_tile_cast<4, kCols>(NormedCodes<__nv_bfloat16>(op), out, false, s);
  else
    launch_tile_cast<2, kCols>(NormedCodes<float>(op), out, false, s);
}

}  // namespace eightfold::quant
