// The casts alone, on the CPU: rows, or tiles of 128 x 128, over the threads.
#include <algorithm>
#include <vector>

#include "core/fp8.h"
#include "core/threads.h"
#include "quant/cast.h"
#include "quant/span_cpu.h"

namespace eightfold::quant {
namespace {

constexpr int64_t kTile = kSpanTile;
constexpr int64_t kGrainElements = 1 << 15;  // a task worth a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(row, col, height, width) over the tiles of a matrix.
template <class Body>
void for_tiles(int64_t rows, int64_t cols, const Body& body) {
  const int64_t across = ceil_div(cols, kTile);
  parallel_for(ceil_div(rows, kTile) * across, kGrainElements / (kTile * kTile), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / across * kTile, col = t % across * kTile;
      body(row, col, std::min(kTile, rows - row), std::min(kTile, cols - col));
    }
  });
}

struct Tile {
  alignas(64) float values[kTile * kTile];
  float* row(int64_t r) { return values + r * kTile; }
};

void load_tile(const Input& x, int64_t row, int64_t col, int64_t height, int64_t width, Tile& tile) {
  for (int64_t r = 0; r < height; ++r) widen(x.data, x.dtype, (row + r) * x.ld + col, width, tile.row(r));
}

// The part that holds row or column `at`.
int part_of(const Parts& x, int64_t at) {
  int part = x.count - 1;
  while (part > 0 && at < x.first[part]) --part;
  return part;
}

void store_columns(const Tile& tile, int64_t row, int64_t col, int64_t height, int64_t width, const Quantized& out, bool power_of_two) {
  cast_columns(tile.values, height, width, power_of_two, out.codes + col * out.code_ld + row, out.code_ld,
               out.scales + row / kTile * out.scale_ld + col);
}

void quantize_rows(const Input& x, int64_t group, const Quantized& out, bool power_of_two) {
  constexpr int64_t kSpan = 2048;  // fp32 copies that stay in the first-level cache; a multiple of both groups
  parallel_for(x.rows, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, x.cols)), [&](int64_t begin, int64_t end) {
    float values[kSpan];
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < x.cols; c += kSpan) {
        const int64_t n = std::min(kSpan, x.cols - c);
        widen(x.data, x.dtype, r * x.ld + c, n, values);
        encode_groups(values, n, group, power_of_two, out.codes + r * x.cols + c, out.scales + c / group * out.scale_ld + r, out.scale_ld);
      }
    }
  });
}

void quantize_columns(const Input& x, const Quantized& out, bool power_of_two) {
  for_tiles(x.rows, x.cols, [&](int64_t row, int64_t col, int64_t height, int64_t width) {
    Tile tile;
    load_tile(x, row, col, height, width, tile);
    store_columns(tile, row, col, height, width, out, power_of_two);
  });
}

Parts as_parts(const Input& x) { return {{x.data}, {x.ld}, {0}, 1, x.dtype, x.rows, x.cols}; }

void cast_squares(const Parts& x, const Quantized& out, bool transposed, bool power_of_two) {
  const int64_t down = ceil_div(x.rows, kTile), across = ceil_div(x.cols, kTile);
  for_tiles(x.rows, x.cols, [&](int64_t row, int64_t col, int64_t height, int64_t width) {
    Tile tile;
    const int part = part_of(x, row);
    load_tile({x.data[part], x.dtype, x.rows, x.cols, x.ld[part]}, row - x.first[part], col, height, width, tile);
    uint32_t amax = 0;
    for (int64_t r = 0; r < height; ++r) amax = std::max(amax, amax_bits(tile.row(r), width));
    const float scale = group_scale(bits_float(amax), power_of_two);
    if (!transposed) {
      out.scales[row / kTile * across + col / kTile] = scale;
      for (int64_t r = 0; r < height; ++r) encode(tile.row(r), width, scale, out.codes + (row + r) * x.cols + col);
      return;
    }
    uint8_t codes[kTile * kTile];
    out.scales[col / kTile * down + row / kTile] = scale;
    for (int64_t r = 0; r < height; ++r) encode(tile.row(r), width, scale, codes + r * kTile);
    transpose_bytes(codes, kTile, height, width, out.codes + col * out.code_ld + row, out.code_ld);
  });
}

void cast_rows_and_columns(const Parts& x, const Quantized& rows, const Quantized& cols, bool power_of_two) {
  for_tiles(x.rows, x.cols, [&](int64_t row, int64_t col, int64_t height, int64_t width) {
    Tile tile;
    const int part = part_of(x, col);
    load_tile({x.data[part], x.dtype, x.rows, x.cols, x.ld[part]}, row, col - x.first[part], height, width, tile);
    for (int64_t r = 0; r < height; ++r)
      encode_groups(tile.row(r), width, kTile, power_of_two, rows.codes + (row + r) * x.cols + col,
                    rows.scales + col / kTile * rows.scale_ld + row + r, rows.scale_ld);
    if (cols.codes) store_columns(tile, row, col, height, width, cols, power_of_two);
  });
}

}  // namespace

void quantize_cpu(const Input& x, Group group, const Quantized& out, bool power_of_two) {
  switch (group) {
    case Group::row128: return quantize_rows(x, 128, out, power_of_two);
    case Group::row16: return quantize_rows(x, 16, out, power_of_two);
    case Group::col128: return quantize_columns(x, out, power_of_two);
    case Group::square: return cast_squares(as_parts(x), out, false, power_of_two);
  }
}

void quantize_both_cpu(const Input& x, const Quantized& rows, const Quantized& cols, bool power_of_two) {
  cast_rows_and_columns(as_parts(x), rows, cols, power_of_two);
}

void quantize_stacked_cpu(const Parts& x, const Quantized& out, bool transposed) { cast_squares(x, out, transposed, false); }

void quantize_beside_cpu(const Parts& x, const Quantized& rows, const Quantized& cols) { cast_rows_and_columns(x, rows, cols, false); }

void requantize_cpu(const RowCodes& x, const Quantized& cols, bool power_of_two) {
  for_tiles(x.rows, x.cols, [&](int64_t row, int64_t col, int64_t height, int64_t width) {
    Tile tile;
    for (int64_t r = 0; r < height; ++r)
      decode(x.codes + (row + r) * x.ld + col, width, x.scales[col / kTile * x.scale_ld + row + r], tile.row(r));
    store_columns(tile, row, col, height, width, cols, power_of_two);
  });
}

void transpose_codes_cpu(const uint8_t* codes, int64_t rows, int64_t cols, int64_t ld, uint8_t* out) {
  for_tiles(rows, cols, [&](int64_t row, int64_t col, int64_t height, int64_t width) {
    transpose_bytes(codes + row * ld + col, ld, height, width, out + col * rows + row, rows);
  });
}

void dequantize_cpu(const AnyCodes& x, void* out, DType dtype) {
  for_tiles(x.rows, x.cols, [&](int64_t row, int64_t col, int64_t height, int64_t width) {
    uint8_t turned[kTile * kTile];
    float values[kTile], scales[kTile];
    const bool by_rows = x.col_stride == 1;
    if (!by_rows) transpose_bytes(x.codes + col * x.col_stride + row, x.col_stride, width, height, turned, kTile);
    for (int64_t r = 0; r < height; ++r) {
      if (r == 0 || (row + r) % x.group_rows == 0) {
        const float* line = x.scales + (row + r) / x.group_rows * x.scale_row_stride;
        for (int64_t c = 0; c < width;) {  // one run of columns a group
          const int64_t group = (col + c) / x.group_cols, end = std::min(width, (group + 1) * x.group_cols - col);
          std::fill(scales + c, scales + end, line[group * x.scale_col_stride]);
          c = end;
        }
      }
      decode_each(by_rows ? x.codes + (row + r) * x.row_stride + col : turned + r * kTile, width, scales, values);
      narrow(values, width, out, dtype, (row + r) * x.cols + col);
    }
  });
}

}  // namespace eightfold::quant
