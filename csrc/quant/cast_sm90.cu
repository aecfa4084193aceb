// The casts alone, on Hopper: sources for the tile kernel, and the two kernels that move codes without quantising.
#include "quant/cast.h"
#include "quant/row_cast.cuh"
#include "quant/tile_cast.cuh"

namespace eightfold::quant {
namespace {

template <class T>
struct TensorSource {
  using Element = T;
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
  __device__ TensorSource(const T* data, int64_t rows, int64_t cols, int64_t ld, bool vector)
      : rows(rows), cols(cols), vector(vector), data(data), ld(ld) {}

  template <bool kVector, bool kFull>
  __device__ __forceinline__ Octet<T> load(int64_t row, int64_t col) const {
    return load_octet<kVector, true>(data + row * ld + col, kFull ? 8 : octet_count(row, col, rows, cols));
  }
};

// FP8 codes with their 1 x 128 scales. A column that does not exist may hold 0 * NaN: its group is its own.
struct CodesSource {
  using Element = ScaledCodes;
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

  template <bool kVector, bool kFull>
  __device__ __forceinline__ Octet<ScaledCodes> load(int64_t row, int64_t col) const {
    const int count = kFull ? 8 : octet_count(row, col, rows, cols);
    const uint2 octet = load_codes8<kVector, true>(codes + row * ld + col, count);
    return {{octet.x, octet.y, count ? __float_as_uint(__ldcg(scales + row + col / 128 * scale_ld)) : 0}};
  }
};

// CTAs on an SM, by what the values cost in registers.
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 4 : 2;

// Of few rows a tile would be mostly empty: a warp takes 256 columns of a row, an octet a lane.
constexpr int kSliceThreads = 128, kSlice = kSliceThreads * 8;

template <class T, bool kVector>
__global__ void __launch_bounds__(kSliceThreads) row_cast_kernel(const TensorSource<T> source, const Quantized out) {
  begin_rows(source.rows);
  const unsigned across = static_cast<unsigned>((source.cols + kSlice - 1) / kSlice);
  const int64_t row = blockIdx.x / across, col = static_cast<int64_t>(blockIdx.x % across) * kSlice + threadIdx.x * 8;
  const Octet<T> x = source.template load<kVector, false>(row, col);
  cast_row_octet(x, out, row, col, source.cols, octet_count(row, col, source.rows, source.cols), kVector);
}

template <class T>
void launch_row_cast(const TensorSource<T>& source, const Quantized& out, cudaStream_t stream) {
  const bool vector = source.vector && source.cols % 8 == 0;
  const int64_t blocks = source.rows * ((source.cols + kSlice - 1) / kSlice);
  if (blocks == 0) return;
  launch_kernel(true, "row_cast_kernel", vector ? row_cast_kernel<T, true> : row_cast_kernel<T, false>, blocks, kSliceThreads, 0, stream,
                source, out);
}

template <class T>
void quantize_typed(const Input& x, Group group, const Quantized& out, bool power_of_two, cudaStream_t stream) {
  const TensorSource<T> source(x);
  if (group == Group::row128 && source.rows <= kFewRows && !power_of_two) return launch_row_cast(source, out, stream);
  const TileOutput to = tile_output(out, out);
  switch (group) {
    case Group::row128: return launch_tile_cast<kBlocks<T>, kRows128>(source, to, power_of_two, stream);
    case Group::row16: return launch_tile_cast<kBlocks<T>, kRows16>(source, to, power_of_two, stream);
    case Group::col128: return launch_tile_cast<kBlocks<T>, kCols>(source, to, power_of_two, stream);
    case Group::square: return launch_tile_cast<kBlocks<T>, kSquare>(source, to, power_of_two, stream);
  }
}

template <class T>
struct PartsOf {
  int64_t rows, cols;
  bool vector;  // every part may be read with vector loads
  const T* data[kMostParts];
  int64_t ld[kMostParts], first[kMostParts];
  int count;

  explicit PartsOf(const Parts& x) : rows(x.rows), cols(x.cols), vector(true), count(x.count) {
    for (int i = 0; i < kMostParts; ++i) {
      const int part = i < x.count ? i : 0;
      data[i] = static_cast<const T*>(x.data[part]), ld[i] = x.ld[part], first[i] = x.first[part];
      vector = vector && aligned(x.data[part], 16) && x.ld[part] * sizeof(T) % 16 == 0;
    }
  }
};

// A tile of several tensors lies in one of them, which then reads as if it were the whole.
template <int kMinBlocks, unsigned kWrites, bool kStacked, class T>
__global__ void __launch_bounds__(kTileThreads, kMinBlocks) parts_cast_kernel(const PartsOf<T> parts, TileOutput out) {
  __shared__ __align__(16) TileShared<T, 8> shared;
  const TileShape tile = tile_of(parts.rows, parts.cols, blockIdx.x);
  const int64_t at = kStacked ? tile.row : tile.col;
  const T* data = parts.data[0];
  int64_t ld = parts.ld[0], first = 0;
#pragma unroll
  for (int i = 1; i < kMostParts; ++i)
    if (i < parts.count && at >= parts.first[i]) data = parts.data[i], ld = parts.ld[i], first = parts.first[i];
  const TensorSource<T> source(data - (kStacked ? first * ld : first), parts.rows, parts.cols, ld, parts.vector);
  if (source.vector && tile.full())
    cast_source<kWrites, true>(source, out, tile, shared, false);
  else
    cast_source<kWrites, false>(source, out, tile, shared, false);
}

template <unsigned kWrites, bool kStacked, class T>
void launch_parts_cast(const Parts& x, const TileOutput& out, cudaStream_t stream) {
  const int64_t tiles = ((x.rows + kTile - 1) / kTile) * ((x.cols + kTile - 1) / kTile);
  if (tiles == 0) return;
  parts_cast_kernel<kBlocks<T>, kWrites, kStacked><<<static_cast<unsigned>(tiles), kTileThreads, 0, stream>>>(PartsOf<T>(x), out);
  check_launch("parts_cast_kernel");
}

template <class T>
void quantize_stacked_typed(const Parts& x, const Quantized& out, bool transposed, cudaStream_t stream) {
  if (transposed)  // the same codes, by columns
    launch_parts_cast<kSquareTurned, true, T>(x, tile_output(out, out), stream);
  else
    launch_parts_cast<kSquare, true, T>(x, tile_output(out, {}), stream);
}

template <class T>
void quantize_beside_typed(const Parts& x, const Quantized& rows, const Quantized& cols, cudaStream_t stream) {
  if (cols.codes)
    launch_parts_cast<kRows128 | kCols, false, T>(x, tile_output(rows, cols), stream);
  else
    launch_parts_cast<kRows128, false, T>(x, tile_output(rows, {}), stream);
}

// A 4 x 4 block of bytes, one row a word, to one column a word.
__device__ __forceinline__ void transpose_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t (&columns)[4]) {
  const uint32_t ab01 = __byte_perm(a, b, 0x5140), cd01 = __byte_perm(c, d, 0x5140);
  const uint32_t ab23 = __byte_perm(a, b, 0x7362), cd23 = __byte_perm(c, d, 0x7362);
  columns[0] = __byte_perm(ab01, cd01, 0x5410), columns[1] = __byte_perm(ab01, cd01, 0x7632);
  columns[2] = __byte_perm(ab23, cd23, 0x5410), columns[3] = __byte_perm(ab23, cd23, 0x7632);
}

// Eight rows of eight codes to eight columns of eight.
__device__ __forceinline__ void transpose_octets(const uint2 (&rows)[8], uint2 (&columns)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t w[8], top[4], bottom[4];
#pragma unroll
    for (int p = 0; p < 8; ++p) w[p] = half ? rows[p].y : rows[p].x;
    transpose_bytes(w[0], w[1], w[2], w[3], top);
    transpose_bytes(w[4], w[5], w[6], w[7], bottom);
#pragma unroll
    for (int j = 0; j < 4; ++j) columns[half * 4 + j] = make_uint2(top[j], bottom[j]);
  }
}

template <bool kVector>
__device__ __forceinline__ void load_rows(const uint8_t* codes, int64_t ld, const TileShape& tile, uint2 (&rows)[8]) {
  const TileThread<8> me;
#pragma unroll
  for (int p = 0; p < 8; ++p) {
    const int64_t row = tile.row + me.band * 8 + p, col = tile.col + me.octet * 8;
    rows[p] = load_codes8<kVector>(codes + row * ld + col, octet_count(row, col, tile.rows, tile.cols));
  }
}

__global__ void __launch_bounds__(kTileThreads)
    transpose_codes_kernel(const uint8_t* codes, int64_t rows, int64_t cols, int64_t ld, uint8_t* out, bool vector_in, bool vector_out) {
  __shared__ __align__(16) ColumnCodes shared;
  const TileThread<8> me;
  const TileShape tile = tile_of(rows, cols, blockIdx.x);
  uint2 in[8], columns[8];
  if (vector_in && tile.col + kTile <= cols)
    load_rows<true>(codes, ld, tile, in);
  else
    load_rows<false>(codes, ld, tile, in);
  transpose_octets(in, columns);
#pragma unroll
  for (int j = 0; j < 8; ++j) shared.put(me.octet * 8 + j, me.band, columns[j]);
  __syncthreads();
  if (vector_out && tile.full())
    shared.store<true, kTileThreads>(out, rows, tile, true);
  else
    shared.store<false, kTileThreads>(out, rows, tile, vector_out);
}

// Row-major codes are read in place; codes stored by columns come through shared memory and are turned in registers.
template <class T, bool kColumnMajor>
__global__ void __launch_bounds__(kTileThreads) dequantize_kernel(AnyCodes x, T* out, bool vector_in) {
  const TileThread<8> me;
  const TileShape tile = tile_of(x.rows, x.cols, blockIdx.x);
  uint2 rows[8];
  if constexpr (kColumnMajor) {
    __shared__ __align__(16) ColumnCodes shared;
    shared.load<kTileThreads>(x.codes, x.col_stride, tile, vector_in);
    __syncthreads();
    uint2 columns[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) columns[j] = shared.get(me.octet * 8 + j, me.band);
    transpose_octets(columns, rows);
  } else {
    if (vector_in && tile.col + kTile <= x.cols)
      load_rows<true>(x.codes, x.row_stride, tile, rows);
    else
      load_rows<false>(x.codes, x.row_stride, tile, rows);
  }
  const bool vector_out = x.cols % 8 == 0;
  const int64_t first_row = tile.row + me.band * 8, col = tile.col + me.octet * 8;
  const int count = octet_count(0, col, 1, x.cols);
  int64_t offsets[8];  // of the eight columns' scales; one 64-bit division a thread
  int64_t group = col / x.group_cols, left = x.group_cols - col % x.group_cols;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    offsets[j] = group * x.scale_col_stride;
    if (--left == 0) ++group, left = x.group_cols;
  }
  group = first_row / x.group_rows, left = x.group_rows - first_row % x.group_rows;
#pragma unroll
  for (int p = 0; p < 8; ++p) {
    if (first_row + p < x.rows) {
      const float* scales = x.scales + group * x.scale_row_stride;
      float values[8];
      decode4(rows[p].x, values);
      decode4(rows[p].y, values + 4);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < count) values[j] *= __ldg(scales + offsets[j]);
      Octet<T> octet;
      octet.set(values);
      store_octet(out + (first_row + p) * x.cols + col, octet, count, vector_out);
    }
    if (--left == 0) ++group, left = x.group_rows;
  }
}

unsigned tile_count(int64_t rows, int64_t cols) {
  return static_cast<unsigned>(((rows + kTile - 1) / kTile) * ((cols + kTile - 1) / kTile));
}

template <class T>
void dequantize_typed(const AnyCodes& x, T* out, cudaStream_t stream) {
  const unsigned tiles = tile_count(x.rows, x.cols);
  if (tiles == 0) return;
  if (x.col_stride == 1)
    dequantize_kernel<T, false><<<tiles, kTileThreads, 0, stream>>>(x, out, aligned(x.codes, 8) && x.row_stride % 8 == 0);
  else
    dequantize_kernel<T, true><<<tiles, kTileThreads, 0, stream>>>(x, out, aligned(x.codes, 16) && x.col_stride % 16 == 0);
  check_launch("dequantize_kernel");
}

}  // namespace

void quantize_sm90(const Input& x, Group group, const Quantized& out, bool power_of_two, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  x.dtype == DType::bf16 ? quantize_typed<__nv_bfloat16>(x, group, out, power_of_two, s)
                         : quantize_typed<float>(x, group, out, power_of_two, s);
}

void quantize_both_sm90(const Input& x, const Quantized& rows, const Quantized& cols, bool power_of_two, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  const TileOutput to = tile_output(rows, cols);
  if (x.dtype == DType::bf16)
    launch_tile_cast<4, kRows128 | kCols>(TensorSource<__nv_bfloat16>(x), to, power_of_two, s);
  else
    launch_tile_cast<2, kRows128 | kCols>(TensorSource<float>(x), to, power_of_two, s);
}

void quantize_stacked_sm90(const Parts& x, const Quantized& out, bool transposed, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  x.dtype == DType::bf16 ? quantize_stacked_typed<__nv_bfloat16>(x, out, transposed, s)
                         : quantize_stacked_typed<float>(x, out, transposed, s);
}

void quantize_beside_sm90(const Parts& x, const Quantized& rows, const Quantized& cols, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  x.dtype == DType::bf16 ? quantize_beside_typed<__nv_bfloat16>(x, rows, cols, s) : quantize_beside_typed<float>(x, rows, cols, s);
}

void requantize_sm90(const RowCodes& x, const Quantized& cols, bool power_of_two, void* stream) {
  launch_tile_cast<4, kCols>(CodesSource(x), tile_output({}, cols), power_of_two, static_cast<cudaStream_t>(stream));
}

void transpose_codes_sm90(const uint8_t* codes, int64_t rows, int64_t cols, int64_t ld, uint8_t* out, void* stream) {
  const unsigned tiles = tile_count(rows, cols);
  if (tiles == 0) return;
  transpose_codes_kernel<<<tiles, kTileThreads, 0, static_cast<cudaStream_t>(stream)>>>(codes, rows, cols, ld, out,
                                                                                        aligned(codes, 8) && ld % 8 == 0, rows % 16 == 0);
  check_launch("transpose_codes_kernel");
}

void dequantize_sm90(const AnyCodes& x, void* out, DType dtype, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  dtype == DType::bf16 ? dequantize_typed(x, static_cast<__nv_bfloat16*>(out), s) : dequantize_typed(x, static_cast<float*>(out), s);
}

}  // namespace eightfold::quant
