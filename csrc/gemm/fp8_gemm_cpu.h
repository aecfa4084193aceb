// The blocked CPU product behind fp8_gemm_cpu, written once over an instruction set `Isa` (fp8_gemm_cpu_*.cpp).
//
// Codes are decoded while they are packed: b into panels of kNr columns, a into panels of up to kMr rows, both ordered by k, so
// that the micro-kernel reads two forward streams. Decoding costs about one instruction a code and pays off after a few rows; from
// then on the product runs at the machine's fp32 rate.
//
//   m <= kRowBlock  one parallel region over column panels; a thread packs a panel of b (it stays in L1) and uses it at once.
//   else            for chunks of columns and of k: pack b once, shared (L3); then threads take (row block, panel) pairs, pack
//                   their rows of a (L2) and run the micro-kernel over the panels.
//
// Every element sees the same operations in either: inside a block of 128, one chain of fused multiply-adds in the order of k,
// from zero; then acc = fma(partial, a_scale * b_scale, acc), block after block. Tiles, threads and m only decide where.
//
// Everything is in an unnamed namespace: these functions are compiled for several instruction sets, and the linker must not
// merge them.
#pragma once

#include <cstring>

#include "core/fp8.h"
#include "core/threads.h"
#include "gemm/fp8_gemm.h"

namespace eightfold {

// A 64-byte aligned buffer of the calling thread, kept between calls: fresh pages would cost more than packing into them.
enum class Fp8GemmScratch { a, b, c, shared_b, shared_c, count };
float* fp8_gemm_cpu_scratch(Fp8GemmScratch slot, int64_t floats);

namespace {

constexpr int64_t kBlock = 128;         // of k, per scale
constexpr int kStage = 64;              // codes of a row that are copied at once: a cache line
constexpr int64_t kRowChunk = 2048;     // rows per pass: bounds the fp32 workspace
constexpr int64_t kColumnChunk = 1024;  // columns per shared pack of b
constexpr int64_t kDepthChunk = 16;     // blocks of k per shared pack of b: 8 MiB with kColumnChunk

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Isa: Vec; kLanes; kVecs (vectors in a column panel); kMr; kCodes (consecutive k in one 32-bit step); kDepth (blocks of k per
// packed block of a); kRowBlock; zero, load, store, broadcast, multiply, multiply_add, dot_step; transpose_decode.
template <class Isa>
struct Fp8GemmCpu {
  using Vec = typename Isa::Vec;
  static constexpr int kMr = Isa::kMr;
  static constexpr int kNr = Isa::kLanes * Isa::kVecs;
  static constexpr int kSteps = static_cast<int>(kBlock) / Isa::kCodes;  // 32-bit steps in a block of k
  static constexpr int64_t kPanelBlock = int64_t{kNr} * (kSteps + 1);    // a block of a packed panel of b: scales, then steps
  static constexpr int kStepsPerStage = kStage / Isa::kCodes;

  // A rectangle of the product: rows [0, m) of `args`, column panels [panel_begin, panel_end), blocks [block_begin, block_end).
  struct Piece {
    int64_t row_begin, row_end, panel_begin, panel_end, block_begin, block_end;
  };
  // Where partial results live between blocks of k. Element (i, j) at base[i * ld + j].
  struct Accumulator {
    float* base;
    int64_t ld;
  };

  // Row panels have equal heights up to one, so that none is too short to hide the latency of its multiply-adds.
  static int64_t panel_row(int64_t panel, int64_t panels, int64_t rows) { return panel * rows / panels; }

  // --- packing ---

  // Copies codes [k, k + kStage) of `rows` rows into stage[kRows][kStage], zeros where the matrix ends.
  template <int kRows>
  static void stage_codes(const uint8_t* codes, int64_t ld, int rows, int depth, uint8_t* stage) {
    if (rows < kRows || depth < kStage) std::memset(stage, 0, kRows * kStage);
    if (depth >= kStage) {
      for (int r = 0; r < rows; ++r) std::memcpy(stage + r * kStage, codes + r * ld, kStage);
    } else {
      for (int r = 0; r < rows; ++r) std::memcpy(stage + r * kStage, codes + r * ld, depth);
    }
  }

  // Rows [row, row + rows) of a, `blocks` blocks of k from `block`: step s of row r at dst[s * rows + r]. Writes up to 16 floats
  // past the last step of the last block.
  static void pack_a(const Fp8GemmArgs& args, int64_t row, int rows, int64_t block, int64_t blocks, float* dst) {
    alignas(64) uint8_t stage[Isa::kStageRows * kStage];
    const uint8_t* codes = args.a + row * args.lda;
    int64_t end = smaller(args.k, (block + blocks) * kBlock);
    for (int64_t k = block * kBlock; k < end; k += kStage) {
      stage_codes<Isa::kStageRows>(codes + k, args.lda, rows, static_cast<int>(smaller(kStage, end - k)), stage);
      Isa::template transpose_decode<Isa::kStageRows, true>(stage, dst, rows);
      dst += kStepsPerStage * rows;
    }
  }

  // A column panel of b, `blocks` blocks of k from `block`: for each block its kNr scales, then step s of column j at [s * kNr + j].
  static void pack_b(const Fp8GemmArgs& args, int64_t panel, int64_t block, int64_t blocks, float* dst) {
    alignas(64) uint8_t stage[16 * kStage];
    int64_t column = panel * kNr;
    int columns = static_cast<int>(smaller(kNr, args.n - column));
    const uint8_t* codes = args.b + column * args.ldb;
    for (int64_t g = block; g < block + blocks; ++g, dst += kPanelBlock) {
      if (args.b_group_rows == 1) {
        const float* scales = args.b_scales + g * args.ld_b_scales + column;
        for (int j = 0; j < kNr; ++j) dst[j] = j < columns ? scales[j] : 0.0f;
      } else {
        for (int j = 0; j < kNr; ++j) dst[j] = args.b_scales[smaller(column + j, args.n - 1) / kBlock * args.ld_b_scales + g];
      }
      int64_t end = smaller(args.k, (g + 1) * kBlock);
      float* step = dst + kNr;
      for (int64_t k = g * kBlock; k < end; k += kStage, step += kStepsPerStage * kNr) {
        int depth = static_cast<int>(smaller(kStage, end - k));
        for (int j = 0; j < kNr; j += 16) {
          int count = static_cast<int>(smaller(16, columns - j));
          stage_codes<16>(codes + j * args.ldb + k, args.ldb, count > 0 ? count : 0, depth, stage);
          Isa::template transpose_decode<16, false>(stage, step + j, kNr);
        }
      }
    }
  }

  // --- the micro-kernel: kRows rows times kPanels column panels, `depth` of k ---

  struct Tile {
    const float* a;         // packed, kRows a step
    const float* a_scales;  // of the first row and block
    int64_t ld_a_scales;
    const float* b;        // packed, the first block of the first panel
    int64_t panel_stride;  // floats from a panel to the next
    float* c;
    int64_t ldc;
    int64_t depth;
    bool first;  // c holds nothing yet
  };

  template <int kRows, int kPanels>
  static void multiply_tile(const Tile& t) {
    constexpr int kV = Isa::kVecs * kPanels;
    const float* a = t.a;
    const float* a_scales = t.a_scales;
    const float* b_block = t.b;
    bool first = t.first;
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(t.c + r * t.ldc, 1);
    for (int64_t left = t.depth; left > 0; left -= kBlock, b_block += kPanelBlock, a_scales += t.ld_a_scales) {
      int steps = static_cast<int>(ceil_div(smaller(left, kBlock), Isa::kCodes));
      Vec partial[kRows][kV];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) partial[r][v] = Isa::zero();
      const float* b = b_block + kNr;
#pragma GCC unroll 4
      for (int s = 0; s < steps; ++s) {
        Vec column[kV];
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) column[v] = Isa::load(b + (v / Isa::kVecs) * t.panel_stride + (v % Isa::kVecs) * Isa::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          Vec row = Isa::broadcast(a + r);
#pragma GCC unroll 8
          for (int v = 0; v < kV; ++v) partial[r][v] = Isa::dot_step(row, column[v], partial[r][v]);
        }
        a += kRows;
        b += kNr;
      }
      // Promotion: one multiply-add an element, once in 128.
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        Vec row_scale = Isa::broadcast(a_scales + r);
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          const float* scales = b_block + (v / Isa::kVecs) * t.panel_stride + (v % Isa::kVecs) * Isa::kLanes;
          float* c = t.c + r * t.ldc + v * Isa::kLanes;
          Vec scale = Isa::multiply(row_scale, Isa::load(scales));
          Isa::store(c, Isa::multiply_add(partial[r][v], scale, first ? Isa::zero() : Isa::load(c)));
        }
      }
      first = false;
    }
  }

  // Few rows leave accumulators free: more panels at once then hide the latency of the multiply-adds.
  static constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

  template <int kRows>
  static void multiply_dispatch(const Tile& t, int rows, int panels) {
    if constexpr (kRows > 0) {
      if (rows != kRows) return multiply_dispatch<kRows - 1>(t, rows, panels);
      if (panels == panels_at_once(kRows)) return multiply_tile<kRows, panels_at_once(kRows)>(t);
      Tile one = t;
      for (int p = 0; p < panels; ++p, one.b += t.panel_stride, one.c += kNr) multiply_tile<kRows, 1>(one);
    }
  }

  // --- results ---

  // fp32 sums of `rows` rows and `columns` columns to the caller's matrix, at (row, column) of it.
  static void finish(const Fp8GemmArgs& args, const float* c, int64_t ldc, int64_t row, int rows, int64_t column, int columns) {
    float bias[4 * kNr];
    for (int j = 0; j < columns; ++j)
      bias[j] = args.bias_type == DType::f32 ? (args.bias ? static_cast<const float*>(args.bias)[column + j] : 0.0f)
                                             : bf16_to_float(args.bias ? static_cast<const uint16_t*>(args.bias)[column + j] : 0);
    for (int r = 0; r < rows; ++r, c += ldc) {
      int64_t at = (row + r) * args.ldo + column;
      if (args.out_type == DType::bf16) {
        uint16_t* out = static_cast<uint16_t*>(args.out) + at;
        for (int j = 0; j < columns; ++j) out[j] = float_to_bf16(c[j] + bias[j]);
      } else {
        float* out = static_cast<float*>(args.out) + at;
        if (args.accumulate) {
          for (int j = 0; j < columns; ++j) out[j] += c[j];
        } else {
          for (int j = 0; j < columns; ++j) out[j] = c[j] + bias[j];
        }
      }
    }
  }

  // --- blocking ---

  // `shared_b`: the panels of the piece, packed over its blocks, or null: pack here. `c` starts at (row_begin, panel_begin).
  static void multiply_piece(const Fp8GemmArgs& args, const Piece& p, const float* shared_b, Accumulator c, bool direct) {
    int rows = static_cast<int>(p.row_end - p.row_begin);
    int row_panels = static_cast<int>(ceil_div(rows, kMr));
    int group = row_panels == 1 ? panels_at_once(rows) : 1;
    float* packed_a = fp8_gemm_cpu_scratch(Fp8GemmScratch::a, Isa::kRowBlock * Isa::kDepth * kSteps + 64);
    float* packed_b = shared_b ? nullptr : fp8_gemm_cpu_scratch(Fp8GemmScratch::b, 4 * Isa::kDepth * kPanelBlock);
    int64_t all_blocks = ceil_div(args.k, kBlock);
    for (int64_t block = p.block_begin; block < p.block_end; block += Isa::kDepth) {
      int64_t blocks = smaller(Isa::kDepth, p.block_end - block);
      for (int rp = 0; rp < row_panels; ++rp) {
        int64_t row = panel_row(rp, row_panels, rows);
        int height = static_cast<int>(panel_row(rp + 1, row_panels, rows) - row);
        pack_a(args, p.row_begin + row, height, block, blocks, packed_a + row * blocks * kSteps);
      }
      Tile t;
      t.ld_a_scales = args.ld_a_scales;
      t.ldc = c.ld;
      t.depth = smaller(args.k - block * kBlock, blocks * kBlock);
      t.first = block == 0;
      for (int64_t panel = p.panel_begin; panel < p.panel_end; panel += group) {
        int panels = static_cast<int>(smaller(group, p.panel_end - panel));
        if (shared_b) {
          t.panel_stride = (p.block_end - p.block_begin) * kPanelBlock;
          t.b = shared_b + (panel - p.panel_begin) * t.panel_stride + (block - p.block_begin) * kPanelBlock;
        } else {
          t.panel_stride = blocks * kPanelBlock;
          t.b = packed_b;
          for (int i = 0; i < panels; ++i) pack_b(args, panel + i, block, blocks, packed_b + i * t.panel_stride);
        }
        for (int rp = 0; rp < row_panels; ++rp) {
          int64_t row = panel_row(rp, row_panels, rows);
          int height = static_cast<int>(panel_row(rp + 1, row_panels, rows) - row);
          t.a = packed_a + row * blocks * kSteps;
          t.a_scales = args.a_scales + p.row_begin + row + block * args.ld_a_scales;
          t.c = c.base + row * c.ld + (panel - p.panel_begin) * kNr;
          multiply_dispatch<kMr>(t, height, panels);
          if (block + blocks == all_blocks && !direct) {
            int64_t column = panel * kNr;
            int columns = static_cast<int>(smaller(int64_t{panels} * kNr, args.n - column));
            finish(args, t.c, c.ld, p.row_begin + row, height, column, columns);
          }
        }
      }
    }
  }

  // The sums can live in the caller's matrix when nothing is left to do to them.
  static bool writes_directly(const Fp8GemmArgs& args) {
    return args.out_type == DType::f32 && !args.accumulate && !args.bias && args.n % kNr == 0;
  }

  static void multiply_few_rows(const Fp8GemmArgs& args) {
    int64_t panels = ceil_div(args.n, kNr);
    int64_t blocks = ceil_div(args.k, kBlock);
    bool direct = writes_directly(args);
    int64_t chunk = kColumnChunk / kNr;
    parallel_for(panels, 1 + (1 << 16) / (args.m * args.k + (args.k << 3)), [&](int64_t begin, int64_t end) {
      float* workspace = direct ? nullptr : fp8_gemm_cpu_scratch(Fp8GemmScratch::c, args.m * kColumnChunk);
      for (int64_t p = begin; p < end; p += chunk) {
        Accumulator c = direct ? Accumulator{static_cast<float*>(args.out) + p * kNr, args.ldo} : Accumulator{workspace, kColumnChunk};
        multiply_piece(args, {0, args.m, p, smaller(p + chunk, end), 0, blocks}, nullptr, c, direct);
      }
    });
  }

  static void multiply_many_rows(const Fp8GemmArgs& args) {
    int64_t all_panels = ceil_div(args.n, kNr);
    int64_t all_blocks = ceil_div(args.k, kBlock);
    int64_t row_blocks = ceil_div(args.m, Isa::kRowBlock);
    bool direct = writes_directly(args);
    int64_t panel_chunks = ceil_div(all_panels, kColumnChunk / kNr);
    int64_t depth_chunks = ceil_div(all_blocks, kDepthChunk);
    int64_t most_panels = ceil_div(all_panels, panel_chunks);
    int64_t most_blocks = ceil_div(all_blocks, depth_chunks);
    float* packed_b = fp8_gemm_cpu_scratch(Fp8GemmScratch::shared_b, most_panels * most_blocks * kPanelBlock);
    float* workspace = direct ? nullptr : fp8_gemm_cpu_scratch(Fp8GemmScratch::shared_c, args.m * most_panels * kNr);
    for (int64_t panel = 0; panel < all_panels; panel += most_panels) {
      int64_t panels = smaller(most_panels, all_panels - panel);
      for (int64_t block = 0; block < all_blocks; block += most_blocks) {
        int64_t blocks = smaller(most_blocks, all_blocks - block);
        parallel_for(panels, 4, [&](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; ++p) pack_b(args, panel + p, block, blocks, packed_b + p * blocks * kPanelBlock);
        });
        parallel_for(row_blocks * panels, 4, [&](int64_t begin, int64_t end) {
          for (int64_t at = begin; at < end;) {
            int64_t rb = at / panels, first = at % panels, last = smaller(panels, first + end - at);
            int64_t row = panel_row(rb, row_blocks, args.m), row_end = panel_row(rb + 1, row_blocks, args.m);
            Accumulator c = direct ? Accumulator{static_cast<float*>(args.out) + row * args.ldo + (panel + first) * kNr, args.ldo}
                                   : Accumulator{workspace + row * most_panels * kNr + first * kNr, most_panels * kNr};
            Piece piece{row, row_end, panel + first, panel + last, block, block + blocks};
            multiply_piece(args, piece, packed_b + first * blocks * kPanelBlock, c, direct);
            at += last - first;
          }
        });
      }
    }
  }

  static void run(const Fp8GemmArgs& args) {
    int64_t chunks = ceil_div(args.m, kRowChunk);
    for (int64_t i = 0; i < chunks; ++i) {
      int64_t row = panel_row(i, chunks, args.m);
      Fp8GemmArgs rows = args;
      rows.m = panel_row(i + 1, chunks, args.m) - row;
      rows.a += row * args.lda;
      rows.a_scales += row;
      rows.out = static_cast<char*>(args.out) + row * args.ldo * (args.out_type == DType::f32 ? 4 : 2);
      rows.m <= Isa::kRowBlock ? multiply_few_rows(rows) : multiply_many_rows(rows);
    }
  }
};

}  // namespace
}  // namespace eightfold
