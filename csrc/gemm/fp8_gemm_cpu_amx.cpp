// AMX: bf16 tiles of 16 x 32, fp32 accumulators of 16 x 16; 32 rows by 32 columns of the product at a time.
//
// Codes are decoded to bf16, exactly, while they are packed: a into tiles of 16 rows by 32 of k, b into tiles of 16 pairs of k by
// 16 columns. Of every 64 consecutive k the even ones go to one tile and the odd ones to the next: then the pairs of a column are
// the 16-bit halves of 32-bit groups of codes, and decoding needs no shuffle after the transpose. So the dot unit sums a block of
// 128 in the order k = 0, 2 .. 62, 1, 3 .. 63, 64, 66 .. 127; the block's sum is then promoted in fp32: sum = fma(partial,
// a_scale * b_scale, sum), blocks in the order of k.
//
//   m <= kFewRows  one parallel region over column panels: a thread packs all of a (L2), then its panels of b as it needs them.
//   else           for chunks of rows, columns and k: pack both operands, shared; then threads take (row block, column panel) pairs.
//
// For 128 of k the tile unit is busy for 256 cycles, and the promotion of 32 x 32 sums takes half of that in the vector units, so
// the promotion of a block runs between the tile products of the next. The tile unit flushes denormals whatever MXCSR says: no
// decoded code is one (2^-9 is normal in bf16), and partial sums are multiples of 2^-18.
#if defined(__x86_64__)
// GCC 12 warns about the deliberately undefined operands in its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "gemm/fp8_gemm_cpu.h"

namespace eightfold {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(64)));

constexpr int kTile = 16;                                  // rows of a tile; columns of an fp32 tile
constexpr int kSide = 2 * kTile;                           // rows or columns of a panel
constexpr int kGroup = 64;                                 // codes that are decoded at once, into a row of two tiles
constexpr int kTileSteps = static_cast<int>(kBlock) / 32;  // tile products along a block
constexpr int64_t kFewRows = 64;                           // at most: every thread packs all of a
constexpr int64_t kFewPanels = 512;                        // packed panels of a that a thread may hold: 4 MiB
constexpr int64_t kInnerDepth = 4;                         // blocks of b that stay in L1 for all rows of a row block
constexpr int64_t kPanelChunk = kColumnChunk / kSide;      // column panels that are packed at once

// 32 rows of a, or columns of b, by one block of k.
struct alignas(64) Panel {
  float scales[kSide];
  uint16_t tiles[kTileSteps][2][kTile * 32];
};
struct alignas(64) Sums {
  float at[kSide][kSide];
};

// --- codes to bf16 ---

constexpr uint16_t magnitude_to_bf16(int code) {
  if (code == kE4M3NaN) return 0x7FC0;
  if (code >= 8) return static_cast<uint16_t>((code << 4) + (120 << 7));
  if (code == 0) return 0;
  int top = code >= 4 ? 2 : code >= 2 ? 1 : 0;  // code * 2^-9 = 2^(top - 9) * (1 + ...)
  return static_cast<uint16_t>(((top - 9 + 127) << 7) + ((code - (1 << top)) << (7 - top)));
}

struct alignas(64) DecodeTable {
  uint8_t low[128] = {}, high[128] = {};
  constexpr DecodeTable() {
    for (int i = 0; i < 128; ++i) {
      low[i] = static_cast<uint8_t>(magnitude_to_bf16(i));
      high[i] = static_cast<uint8_t>(magnitude_to_bf16(i) >> 8);
    }
  }
};
constexpr DecodeTable kDecode;

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// The bf16 of codes 0, 2 .. 62 and of codes 1, 3 .. 63. Lookup takes the lower 7 bits of a code.
inline __attribute__((always_inline)) void decode(Bytes codes, uint16_t* even, uint16_t* odd) {
  Bytes low = __builtin_shuffle(load<Bytes>(kDecode.low), load<Bytes>(kDecode.low + 64), codes);
  Bytes high = __builtin_shuffle(load<Bytes>(kDecode.high), load<Bytes>(kDecode.high + 64), codes) | (codes & 0x80);
  Words l = reinterpret_cast<Words>(low), h = reinterpret_cast<Words>(high);
  store(even, h << 8 | (l & 0x00FF));
  store(odd, (h & 0xFF00) | l >> 8);
}

// Register i holds the 32-bit groups of row i in, and the i-th groups of all rows out: 4 x 4 groups inside 128-bit lanes first, then
// 4 x 4 lanes. Intrinsics, because GCC 12 merges generic shuffles into many more.
inline __attribute__((always_inline)) void transpose(__m512i (&x)[kTile]) {
  __m512i y[kTile];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTile; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i even_upper = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), odd_upper = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
    __m512i even_lower = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88), odd_lower = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
    x[i] = _mm512_shuffle_i32x4(even_upper, even_lower, 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(odd_upper, odd_lower, 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(even_upper, even_lower, 0xDD);
    x[i + 12] = _mm512_shuffle_i32x4(odd_upper, odd_lower, 0xDD);
  }
}

// Rows [0, rows) of codes, k in [0, depth), zeros past them. Reads no other code: the last row may end its memory.
template <bool kPairs>
void pack_codes(const uint8_t* codes, int64_t ld, int64_t rows, int64_t depth, Panel* panel) {
  alignas(64) uint8_t edge[kTile * kGroup];
#pragma GCC unroll 1
  for (int at = 0; at < 4; ++at) {
    int half = at % 2, k = at / 2 * kGroup;
    int64_t rows_left = rows - half * kTile, depth_left = depth - k, stride = ld;
    const uint8_t* from = codes + half * kTile * ld + k;
    if (rows_left < kTile || depth_left < kGroup) {
      std::memset(edge, 0, sizeof(edge));
      for (int r = 0; r < smaller(rows_left, kTile) && depth_left > 0; ++r)
        std::memcpy(edge + r * kGroup, from + r * ld, smaller(depth_left, kGroup));
      from = edge;
      stride = kGroup;
    }
    __m512i x[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) x[r] = load<__m512i>(from + r * stride);
    if (kPairs) transpose(x);
    uint16_t* even = panel->tiles[k / 32][half];
    uint16_t* odd = panel->tiles[k / 32 + 1][half];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) decode(reinterpret_cast<Bytes>(x[r]), even + r * 32, odd + r * 32);
  }
}

void pack_a(const Fp8GemmArgs& args, int64_t row_panel, int64_t block, int64_t blocks, Panel* dst) {
  int64_t row = row_panel * kSide;
  for (int64_t g = block; g < block + blocks; ++g, ++dst) {
    const float* scales = args.a_scales + row + g * args.ld_a_scales;
    for (int r = 0; r < kSide; ++r) dst->scales[r] = row + r < args.m ? scales[r] : 0.0f;
    pack_codes<false>(args.a + row * args.lda + g * kBlock, args.lda, args.m - row, args.k - g * kBlock, dst);
  }
}

void pack_b(const Fp8GemmArgs& args, int64_t column_panel, int64_t block, int64_t blocks, Panel* dst) {
  int64_t column = column_panel * kSide;
  for (int64_t g = block; g < block + blocks; ++g, ++dst) {
    for (int j = 0; j < kSide; ++j) {
      int64_t at = smaller(column + j, args.n - 1);
      dst->scales[j] =
          args.b_group_rows == 1 ? args.b_scales[at + g * args.ld_b_scales] : args.b_scales[at / kBlock * args.ld_b_scales + g];
    }
    pack_codes<true>(args.b + column * args.ldb + g * kBlock, args.ldb, args.n - column, args.k - g * kBlock, dst);
  }
}

// --- products ---

// Palette 1: every tile has 16 rows of 64 bytes. Constant, because the compiler does not see that ldtilecfg reads all of it.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// Tiles of the calling thread are usable while it lives.
struct TileScope {
  TileScope() { _tile_loadconfig(&kTileConfig); }
  ~TileScope() { _tile_release(); }
};

inline __attribute__((always_inline)) void promote(const Sums& partial, const Panel& a, const Panel& b, int row, int row_end, bool first,
                                                   Sums* sums) {
  for (int r = row; r < row_end; ++r) {
    __m512 row_scale = _mm512_set1_ps(a.scales[r]);
    for (int j = 0; j < kSide; j += 16) {
      __m512 scale = _mm512_mul_ps(row_scale, _mm512_load_ps(b.scales + j));
      __m512 sum = first ? _mm512_setzero_ps() : _mm512_load_ps(&sums->at[r][j]);
      _mm512_store_ps(&sums->at[r][j], _mm512_fmadd_ps(_mm512_load_ps(&partial.at[r][j]), scale, sum));
    }
  }
}

// sums (+)= a panel of a times a panel of b, `depth` of k. kRowTiles = 1: the upper 16 rows only.
template <int kRowTiles>
void multiply(const Panel* a, const Panel* b, int64_t depth, bool first, Sums* sums) {
  constexpr int kRows = kRowTiles * kTile;
  Sums partial;
  int64_t blocks = ceil_div(depth, kBlock);
  EF_COMPILER_FENCE();  // tile loads do not tell the compiler what they read: let it finish packing
  for (int64_t g = 0; g < blocks; ++g) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int steps = depth - g * kBlock > kGroup ? kTileSteps : kTileSteps / 2;
    for (int s = 0; s < kTileSteps; ++s) {
      if (s < steps) {
        _tile_loadd(4, a[g].tiles[s][0], 64);
        _tile_loadd(6, b[g].tiles[s][0], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b[g].tiles[s][1], 64);
        _tile_dpbf16ps(1, 4, 7);
        if (kRowTiles == 2) {
          _tile_loadd(5, a[g].tiles[s][1], 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      if (g > 0) promote(partial, a[g - 1], b[g - 1], kRows / kTileSteps * s, kRows / kTileSteps * (s + 1), first && g == 1, sums);
    }
    _tile_stored(0, &partial.at[0][0], sizeof(partial.at[0]));
    _tile_stored(1, &partial.at[0][kTile], sizeof(partial.at[0]));
    if (kRowTiles == 2) {
      _tile_stored(2, &partial.at[kTile][0], sizeof(partial.at[0]));
      _tile_stored(3, &partial.at[kTile][kTile], sizeof(partial.at[0]));
    }
  }
  promote(partial, a[blocks - 1], b[blocks - 1], 0, kRows, first && blocks == 1, sums);
}

EF_HD void write_sum(float* out, float sum, bool accumulate) { *out = accumulate ? *out + sum : sum; }
EF_HD void write_sum(uint16_t* out, float sum, bool accumulate) { *out = float_to_bf16(accumulate ? bf16_to_float(*out) + sum : sum); }

template <class Out>
void write_sums(const Sums& sums, const float* bias, int64_t rows, int64_t columns, bool accumulate, Out* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r, out += ldo) {
    if (columns == kSide) {
      for (int j = 0; j < kSide; ++j) write_sum(out + j, sums.at[r][j] + bias[j], accumulate);
    } else {
      for (int j = 0; j < columns; ++j) write_sum(out + j, sums.at[r][j] + bias[j], accumulate);
    }
  }
}

void finish(const Fp8GemmArgs& args, const Sums& sums, int64_t row_panel, int64_t column_panel) {
  int64_t row = row_panel * kSide, column = column_panel * kSide;
  int64_t rows = smaller(kSide, args.m - row), columns = smaller(kSide, args.n - column);
  float bias[kSide] = {};
  if (args.bias && args.bias_type == DType::f32)
    for (int j = 0; j < columns; ++j) bias[j] = static_cast<const float*>(args.bias)[column + j];
  if (args.bias && args.bias_type == DType::bf16)
    for (int j = 0; j < columns; ++j) bias[j] = bf16_to_float(static_cast<const uint16_t*>(args.bias)[column + j]);
  int64_t at = row * args.ldo + column;
  if (args.out_type == DType::bf16) {
    write_sums(sums, bias, rows, columns, args.accumulate, static_cast<uint16_t*>(args.out) + at, args.ldo);
  } else {
    write_sums(sums, bias, rows, columns, args.accumulate, static_cast<float*>(args.out) + at, args.ldo);
  }
}

// --- blocking ---

template <class T>
T* scratch(GemmScratch slot, int64_t count) {
  return reinterpret_cast<T*>(gemm_cpu_scratch(slot, count * static_cast<int64_t>(sizeof(T) / sizeof(float))));
}

// Row panels [begin, end) times one column panel over `depth` of k from one block on; `a` and `sums` start at row panel `begin`.
void multiply_column(const Fp8GemmArgs& args, int64_t begin, int64_t end, const Panel* a, int64_t a_stride, const Panel* b, int64_t depth,
                     bool first, Sums* sums) {
  for (int64_t p = begin; p < end; ++p, a += a_stride, ++sums)
    args.m - p* kSide > kTile ? multiply<2>(a, b, depth, first, sums) : multiply<1>(a, b, depth, first, sums);
}

void multiply_few_rows(const Fp8GemmArgs& args) {
  int64_t row_panels = ceil_div(args.m, kSide), column_panels = ceil_div(args.n, kSide), blocks = ceil_div(args.k, kBlock);
  parallel_for(column_panels, 1 + 512 / args.k, [&](int64_t begin, int64_t end) {
    TileScope tiles;
    Panel* a = scratch<Panel>(GemmScratch::a, row_panels * blocks);
    Panel* b = scratch<Panel>(GemmScratch::b, kInnerDepth);
    Sums* sums = scratch<Sums>(GemmScratch::c, row_panels);
    for (int64_t p = 0; p < row_panels; ++p) pack_a(args, p, 0, blocks, a + p * blocks);
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t g = 0; g < blocks; g += kInnerDepth) {
        pack_b(args, p, g, smaller(kInnerDepth, blocks - g), b);
        int64_t depth = smaller(args.k - g * kBlock, kInnerDepth * kBlock);
        multiply_column(args, 0, row_panels, a + g, blocks, b, depth, g == 0, sums);
      }
      for (int64_t r = 0; r < row_panels; ++r) finish(args, sums[r], r, p);
    }
  });
}

// Row panels per work item: enough to use a column panel often, few enough that there is work for every thread.
int64_t row_block(int64_t m) { return m <= 256 ? 2 : m < 1024 ? 4 : 8; }

void multiply_many_rows(const Fp8GemmArgs& args) {
  int64_t row_panels = ceil_div(args.m, kSide), all_panels = ceil_div(args.n, kSide), all_blocks = ceil_div(args.k, kBlock);
  int64_t row_blocks = ceil_div(row_panels, row_block(args.m));
  // Equal chunks.
  int64_t most_panels = ceil_div(all_panels, ceil_div(all_panels, kPanelChunk));
  int64_t most_blocks = ceil_div(all_blocks, ceil_div(all_blocks, kDepthChunk / kBlock));
  bool one_pass = most_blocks == all_blocks;
  Panel* packed = scratch<Panel>(GemmScratch::shared_b, (row_panels + most_panels) * most_blocks);
  Sums* workspace = one_pass ? nullptr : scratch<Sums>(GemmScratch::shared_c, row_panels * most_panels);
  for (int64_t panel = 0; panel < all_panels; panel += most_panels) {
    int64_t panels = smaller(most_panels, all_panels - panel);
    for (int64_t block = 0; block < all_blocks; block += most_blocks) {
      int64_t blocks = smaller(most_blocks, all_blocks - block);
      bool last = block + blocks == all_blocks;
      Panel* packed_b = packed + row_panels * blocks;
      parallel_for(row_panels + panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
          p < row_panels ? pack_a(args, p, block, blocks, packed + p * blocks)
                         : pack_b(args, panel + p - row_panels, block, blocks, packed + p * blocks);
      });
      parallel_for(row_blocks * panels, 1, [&](int64_t begin, int64_t end) {
        TileScope tiles;
        Sums* own = one_pass ? scratch<Sums>(GemmScratch::c, row_block(args.m)) : nullptr;
        for (int64_t at = begin; at < end; ++at) {
          int64_t rb = at / panels, p = at % panels;
          int64_t row = rb * row_panels / row_blocks, row_end = (rb + 1) * row_panels / row_blocks;
          Sums* sums = one_pass ? own : workspace + p * row_panels + row;
          for (int64_t g = 0; g < blocks; g += kInnerDepth) {
            int64_t depth = smaller(args.k - (block + g) * kBlock, smaller(kInnerDepth, blocks - g) * kBlock);
            multiply_column(args, row, row_end, packed + row * blocks + g, blocks, packed_b + p * blocks + g, depth, block + g == 0, sums);
          }
          for (int64_t r = row; last && r < row_end; ++r) finish(args, sums[r - row], r, panel + p);
        }
      });
    }
  }
}

}  // namespace

void fp8_gemm_cpu_amx(const Fp8GemmArgs& args) {
  for (int64_t row = 0; row < args.m; row += kRowChunk) {
    Fp8GemmArgs rows = args;
    rows.m = smaller(kRowChunk, args.m - row);
    rows.a += row * args.lda;
    rows.a_scales += row;
    rows.out = static_cast<char*>(args.out) + row * args.ldo * (args.out_type == DType::f32 ? 4 : 2);
    bool few = rows.m <= kFewRows && ceil_div(rows.m, kSide) * ceil_div(rows.k, kBlock) <= kFewPanels;
    few ? multiply_few_rows(rows) : multiply_many_rows(rows);
  }
}

}  // namespace eightfold
#endif
