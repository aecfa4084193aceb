// The casts alone, on Hopper: sources for the tile kernel, and the two kernels that move codes without quantising.
#include "quant/cast.h"
#include "quant/tile_cast.cuh"

namespace eightfold::quant {
namespace {

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class T>
struct TensorSource {
  using Element = T;
  static constexpr int kOutputs = 1;
  int64_t rows, cols;
  bool vector;
  const T* data;
  int64_t ld;

  explicit TensorSource(const Input& x)
      : rows(x.rows),
        cols(x.cols),
        vector(aligned(x.data, 16) && x.ld * sizeof(T) % 16 == 0),
        data(static_cast<const T*>(x.data)),
        ld(x.ld) {}

  template <bool kVector>
  __device__ void load(int64_t row, int64_t col, Octet<T> (&out)[1]) const {
    out[0] = load_octet<kVector>(data + row * ld + col, row < rows ? cols - col : 0);
  }
};

// FP8 codes times their 1 x 128 scales, in fp32.
struct CodesSource {
  using Element = float;
  static constexpr int kOutputs = 1;
  int64_t rows, cols;
  bool vector;
  const uint8_t* codes;
  int64_t ld;
  const float* scales;
  int64_t scale_ld;

  explicit CodesSource(const RowCodes& x)
      : rows(x.rows),
        cols(x.cols),
        vector(aligned(x.codes, 8) && x.ld % 8 == 0),
        codes(x.codes),
        ld(x.ld),
        scales(x.scales),
        scale_ld(x.scale_ld) {}

  template <bool kVector>
  __device__ void load(int64_t row, int64_t col, Octet<float> (&out)[1]) const {
    const bool exists = row < rows && col < cols;
    const uint2 octet = load_codes8<kVector>(codes + row * ld + col, exists ? cols - col : 0);
    const float scale = exists ? __ldg(scales + row + col / 128 * scale_ld) : 0.0f;
    float values[8];
    decode4(octet.x, values);
    decode4(octet.y, values + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = col + j < cols ? values[j] * scale : 0.0f;  // 0 * NaN of a tail is not an element
    out[0].set(values);
  }
};

TileOutputs<1> outputs(const Quantized& rows, const Quantized& cols) {
  return {{{rows.codes, rows.scales, rows.scale_ld, cols.codes, cols.code_ld, cols.scales, cols.scale_ld}}};
}

// CTAs on an SM, by what the values cost in registers.
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 4 : 2;

template <class T>
void quantize_typed(const Input& x, Group group, const Quantized& out, bool power_of_two, cudaStream_t stream) {
  const TensorSource<T> source(x);
  const TileOutputs<1> to = outputs(out, out);
  switch (group) {
    case Group::row128: return launch_tile_cast<kBlocks<T>, kRows128>(source, to, power_of_two, stream);
    case Group::row16: return launch_tile_cast<kBlocks<T>, kRows16>(source, to, power_of_two, stream);
    case Group::col128: return launch_tile_cast<kBlocks<T>, kCols>(source, to, power_of_two, stream);
    case Group::square: return launch_tile_cast<kBlocks<T>, kSquare>(source, to, power_of_two, stream);
  }
}

}  // namespace

void quantize_sm90(const Input& x, Group group, const Quantized& out, bool power_of_two, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  x.dtype == DType::bf16 ? quantize_typed<__nv_bfloat16>(x, group, out, power_of_two, s)
                         : quantize_typed<float>(x, group, out, power_of_two, s);
}

void quantize_both_sm90(const Input& x, const Quantized& rows, const Quantized& cols, bool power_of_two, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  const TileOutputs<1> to = outputs(rows, cols);
  if (x.dtype == DType::bf16)
    launch_tile_cast<4, kRows128 | kCols>(TensorSource<__nv_bfloat16>(x), to, power_of_two, s);
  else
    launch_tile_cast<2, kRows128 | kCols>(TensorSource<float>(x), to, power_of_two, s);
}

void requantize_sm90(const RowCodes& x, const Quantized& cols, bool power_of_two, void* stream) {
  launch_tile_cast<2, kCols>(CodesSource(x), outputs({}, cols), power_of_two, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold::quant
