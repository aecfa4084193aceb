// The blocked CPU product a @ b^T behind fp8_gemm_cpu and gemm_cpu, written once over what is multiplied, `Operands`, and an instruction
// set, its `Isa` (isa_*.h).
//
// Elements become fp32 while they are packed: b into panels of kNr columns, a into panels of up to kMr rows, both ordered by k, so
// that the micro-kernel reads two forward streams and is that of a plain fp32 product. Packing costs about one instruction an element
// and pays off after a few rows; from then on the product runs at the machine's fp32 rate.
//
//   m <= kRowBlock  one parallel region over column panels; a thread packs a panel of b (it stays in L1) and uses it at once.
//   else            for chunks of columns and of k: pack b once (L3), shared by the threads unless b is wide; then take (row block,
//                   panel) pairs, pack their rows of a (L2) and run the micro-kernel over the panels.
//
// Every element sees the same operations in either: inside kDepth stages of k, one chain of fused multiply-adds in the order of k,
// from zero; then the chains' sums are added, one after the other. Tiles, threads and m only decide where.
//
// Everything is in an unnamed namespace: these functions are compiled for several instruction sets, and the linker must not
// merge them.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/compiler_fence.h"
#include "core/dtype.h"
#include "core/fp8.h"
#include "core/threads.h"

namespace eightfold {

// A 64-byte aligned buffer of the calling thread, kept between calls: fresh pages would cost more than packing into them.
enum class GemmScratch { a, b, c, shared_b, shared_c, count };
float* gemm_cpu_scratch(GemmScratch slot, int64_t floats);

namespace {

constexpr int kUnroll = 4;                  // steps of the micro-kernel's loop
constexpr int64_t kStage = 64;              // of k, packed at once
constexpr int64_t kRowChunk = 2048;         // rows per pass
constexpr int64_t kColumnChunk = 2048;      // columns per pass, at most
constexpr int64_t kDepthChunk = 2048;       // of k per pass, about
constexpr int64_t kSharedFloats = 1 << 21;  // in the packed b of a pass, and in its sums: 8 MiB each
constexpr int64_t kWide = 4096;             // columns from which threads do not share
constexpr int64_t kSerialSteps = 1 << 18;   // multiply-adds that are not worth a second thread; packing an element counts as 16

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The elements [k, k + kStage) of `rows` rows: in place, or, where k ends in between, copied and filled up with zeros.
template <class T>
struct Stage {
  alignas(64) T copy[16 * kStage];
  const T* elements;
  int64_t ld;

  Stage(const T* matrix, int64_t matrix_ld, int rows, int64_t depth) : elements(matrix), ld(matrix_ld) {
    if (depth >= kStage) return;
    std::memset(copy, 0, sizeof copy);
    for (int r = 0; r < rows; ++r) std::memcpy(copy + r * kStage, matrix + r * matrix_ld, depth * sizeof(T));
    elements = copy;
    ld = kStage;
  }
};

// Isa: Vec; kLanes; kVecs (vectors in a column panel); kMr; kDepth (stages of k in a packed panel of a, and in a chain); kRowBlock;
// zero, load, store, broadcast, add, multiply_add.
//
// Operands: Isa; Args, with m, n, k, out, out_type, ldo, bias, bias_type and accumulate as Fp8GemmArgs has them; and
//   pack_a(args, row, rows, begin, end, dst)   rows of a, stages [begin, end) of k: k of row r at dst[k * rows + r]; may write up to 16
//                                              floats past the last
//   pack_b(args, panel, begin, end, dst)       a column panel of b: k of column j at dst[k * kNr + j]. Columns past the last repeat one
//                                              that exists; their products are dropped
//   skip_rows(args, row)                       lets a begin at that row
template <class Operands>
struct BlockedGemm {
  using Args = typename Operands::Args;
  using Isa = typename Operands::Isa;
  using Vec = typename Isa::Vec;
  static constexpr int kMr = Isa::kMr;
  static constexpr int kNr = Isa::kLanes * Isa::kVecs;
  static constexpr int64_t kPanelStage = kNr * kStage;  // floats of a packed panel of b in a stage of k

  // Rows [row_begin, row_end) times column panels [panel_begin, panel_end), over stages [begin, end) of k.
  struct Piece {
    int64_t row_begin, row_end, panel_begin, panel_end, begin, end;
  };
  // fp32 sums between chains: row r of panel p at base + p * panel_stride + r * kNr. Not in `out`, whose rows are often a
  // multiple of 4096 bytes apart: a tile of such rows costs the micro-kernel 4 %.
  struct Sums {
    float* base;
    int64_t panel_stride;
  };

  // Row panels have equal heights up to one, so that none is too short to hide the latency of its multiply-adds.
  static int64_t panel_row(int64_t panel, int64_t panels, int64_t rows) { return panel * rows / panels; }

  // --- the micro-kernel: kRows rows times kPanels column panels, `depth` of k ---

  struct Tile {
    const float* a;        // packed, kRows a step
    const float* b;        // packed, the first panel
    int64_t panel_stride;  // floats from a panel to the next
    float* c;              // kNr a row
    int64_t c_panel_stride;
    int64_t depth;  // a chain's
    bool first;     // c holds nothing yet
    float* out;     // where finished sums plus `bias` go, or null: to c
    int64_t ldo;
    const float* bias;
    const float* next_b;  // the lines of the next panel that this tile fetches from L3
    const float* next_b_end;
  };

  template <int kRows, int kPanels>
  __attribute__((noinline)) static void multiply_tile(const Tile& t) {
    constexpr int kV = Isa::kVecs * kPanels;
    const float* a = t.a;
    const float* b = t.b;
    const float* const a_end = a + kRows * round_up(t.depth, kUnroll);
    const int64_t panel_stride = t.panel_stride;
    for (int i = 0; i < kRows * kNr; i += 16) __builtin_prefetch(t.c + i, 1);
    for (const float* line = t.next_b; line < t.next_b_end; line += 16) __builtin_prefetch(line, 0, 2);
    Vec sum[kRows][kV];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) sum[r][v] = Isa::zero();
    do {
#pragma GCC unroll 16
      for (int s = 0; s < kUnroll; ++s) {
        EF_COMPILER_FENCE();  // keeps the next step's loads where they are: hoisted, they would spill accumulators
        Vec column[kV];
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) column[v] = Isa::load(b + (v / Isa::kVecs) * panel_stride + (v % Isa::kVecs) * Isa::kLanes + s * kNr);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          Vec row = Isa::broadcast(a + r + s * kRows);
#pragma GCC unroll 8
          for (int v = 0; v < kV; ++v) sum[r][v] = Isa::multiply_add(row, column[v], sum[r][v]);
        }
      }
      a += kUnroll * kRows;
      b += kUnroll * kNr;
    } while (a != a_end);
    const bool first = t.first;
    auto each = [&](auto write) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          int64_t panel = v / Isa::kVecs, lane = v % Isa::kVecs * Isa::kLanes;
          float* at = t.c + panel * t.c_panel_stride + r * kNr + lane;
          write(first ? sum[r][v] : Isa::add(Isa::load(at), sum[r][v]), at, r, panel * kNr + lane);
        }
    };
    if (t.out) {
      each([&](Vec value, float*, int r, int64_t j) { Isa::store(t.out + r * t.ldo + j, Isa::add(value, Isa::load(t.bias + j))); });
    } else {
      each([](Vec value, float* at, int, int64_t) { Isa::store(at, value); });
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
      for (int p = 0; p < panels; ++p, one.b += t.panel_stride, one.c += t.c_panel_stride) {
        multiply_tile<kRows, 1>(one);
        if (one.out) one.out += kNr, one.bias += kNr;
      }
    }
  }

  // --- results ---

  static void prefetch_out(const Args& args, int64_t row, int rows, int64_t panel) {
    int64_t bytes = args.out_type == DType::f32 ? 4 : 2;
    const char* at = static_cast<const char*>(args.out) + (row * args.ldo + panel * kNr) * bytes;
    for (int r = 0; r < rows; ++r, at += args.ldo * bytes)
      for (int64_t line = 0; line < kNr * bytes; line += 64) __builtin_prefetch(at + line, 1);
  }

  // `columns` is a constant in the calls that matter: the compiler then writes whole vectors.
  template <bool kAccumulate, class Out>
  static EF_HD void write_rows(Out* __restrict out, int64_t ld, const float* __restrict c, const float* bias, int rows, int columns) {
    for (int r = 0; r < rows; ++r, c += kNr, out += ld)
      for (int j = 0; j < columns; ++j) {
        if constexpr (sizeof(Out) == 2) {
          out[j] = float_to_bf16(kAccumulate ? bf16_to_float(out[j]) + c[j] : c[j] + bias[j]);
        } else {
          out[j] = kAccumulate ? out[j] + c[j] : c[j] + bias[j];
        }
      }
  }
  template <bool kAccumulate, class Out>
  static void write_panel(Out* out, int64_t ld, const float* c, const float* bias, int rows, int columns) {
    if (columns == kNr) return write_rows<kAccumulate>(out, ld, c, bias, rows, kNr);
    write_rows<kAccumulate>(out, ld, c, bias, rows, columns);
  }

  // The bias of `columns` columns, zero where there is none.
  static void load_bias(const Args& args, int64_t column, int64_t columns, float* bias) {
    for (int64_t j = 0; j < columns; ++j) bias[j] = 0.0f;
    columns = smaller(columns, args.n - column);
    if (args.bias && args.bias_type == DType::f32)
      for (int64_t j = 0; j < columns; ++j) bias[j] = static_cast<const float*>(args.bias)[column + j];
    if (args.bias && args.bias_type == DType::bf16)
      for (int64_t j = 0; j < columns; ++j) bias[j] = bf16_to_float(static_cast<const uint16_t*>(args.bias)[column + j]);
  }

  // The sums of `rows` rows of a column panel, to the caller's matrix.
  static void finish(const Args& args, const float* c, const float* bias, int64_t row, int rows, int64_t panel) {
    int64_t column = panel * kNr, at = row * args.ldo + column;
    int columns = static_cast<int>(smaller(kNr, args.n - column));
    const auto write = [&](auto* out) {
      args.accumulate ? write_panel<true>(out, args.ldo, c, bias, rows, columns)
                      : write_panel<false>(out, args.ldo, c, bias, rows, columns);
    };
    if (args.out_type == DType::bf16) return write(static_cast<uint16_t*>(args.out) + at);
    write(static_cast<float*>(args.out) + at);
  }

  // --- blocking ---

  // `shared_b`: the panels of the piece, packed over its stages, or null: pack here. `sums` starts at (row_begin, panel_begin);
  // its base is null if the piece covers all of k in one pass.
  static void multiply_piece(const Args& args, const Piece& p, const float* shared_b, Sums sums) {
    int rows = static_cast<int>(p.row_end - p.row_begin);
    int row_panels = static_cast<int>(ceil_div(rows, kMr));
    int group = row_panels == 1 ? panels_at_once(rows) : 1;
    float* packed_a = gemm_cpu_scratch(GemmScratch::a, Isa::kRowBlock * Isa::kDepth * kStage + 64);
    float* packed_b = shared_b ? nullptr : gemm_cpu_scratch(GemmScratch::b, 4 * Isa::kDepth * kPanelStage);
    alignas(64) float tile[4 * kMr * kNr];  // the sums, where one pass over k completes them
    alignas(64) float bias[4 * kNr];
    for (int64_t begin = p.begin; begin < p.end; begin += Isa::kDepth) {
      int64_t end = smaller(begin + Isa::kDepth, p.end);
      int64_t steps = (end - begin) * kStage;
      for (int rp = 0; rp < row_panels; ++rp) {
        int64_t row = panel_row(rp, row_panels, rows);
        int height = static_cast<int>(panel_row(rp + 1, row_panels, rows) - row);
        Operands::pack_a(args, p.row_begin + row, height, begin, end, packed_a + row * steps);
      }
      Tile t;
      t.c_panel_stride = sums.base ? sums.panel_stride : kMr * kNr;
      t.depth = smaller(args.k - begin * kStage, steps);
      t.first = begin == 0;
      t.ldo = args.ldo;
      t.bias = bias;
      bool last = end * kStage >= args.k;
      bool direct = last && args.out_type == DType::f32 && !args.accumulate;
      for (int64_t panel = p.panel_begin; panel < p.panel_end; panel += group) {
        int panels = static_cast<int>(smaller(group, p.panel_end - panel));
        if (shared_b) {
          t.panel_stride = (p.end - p.begin) * kPanelStage;
          t.b = shared_b + (panel - p.panel_begin) * t.panel_stride + (begin - p.begin) * kPanelStage;
        } else {
          t.panel_stride = (end - begin) * kPanelStage;
          t.b = packed_b;
          for (int i = 0; i < panels; ++i) Operands::pack_b(args, panel + i, begin, end, packed_b + i * t.panel_stride);
        }
        t.next_b_end = shared_b ? t.b + t.panel_stride : nullptr;
        if (last) load_bias(args, panel * kNr, panels * kNr, bias);
        direct &= (panel + panels) * kNr <= args.n;
        for (int rp = 0; rp < row_panels; ++rp) {
          int64_t row = panel_row(rp, row_panels, rows);
          int height = static_cast<int>(panel_row(rp + 1, row_panels, rows) - row);
          t.a = packed_a + row * steps;
          t.next_b = t.next_b_end;
          t.next_b_end = shared_b ? t.b + t.panel_stride + panel_row(rp + 1, row_panels, steps * kNr) : nullptr;
          t.c = sums.base ? sums.base + (panel - p.panel_begin) * sums.panel_stride + row * kNr : tile;
          t.out = direct ? static_cast<float*>(args.out) + (p.row_begin + row) * args.ldo + panel * kNr : nullptr;
          if (last) prefetch_out(args, p.row_begin + row, height, panel);
          multiply_dispatch<kMr>(t, height, panels);
          if (!last || direct) continue;
          for (int i = 0; i < panels; ++i) finish(args, t.c + i * t.c_panel_stride, bias + i * kNr, p.row_begin + row, height, panel + i);
        }
      }
    }
  }

  static void multiply_few_rows(const Args& args) {
    int64_t panels = ceil_div(args.n, kNr);
    int64_t stages = ceil_div(args.k, kStage);
    int64_t chunk = kColumnChunk / 2 / kNr;
    int64_t grain = 1 + kSerialSteps / (kNr * args.k * (args.m + 16));
    parallel_for(panels, grain, [&](int64_t begin, int64_t end) {
      float* workspace = stages <= Isa::kDepth ? nullptr : gemm_cpu_scratch(GemmScratch::c, args.m * chunk * kNr);
      Sums sums{workspace, args.m * kNr};
      for (int64_t p = begin; p < end; p += chunk) {
        multiply_piece(args, {0, args.m, p, smaller(p + chunk, end), 0, stages}, nullptr, sums);
      }
    });
  }

  // All rows times column panels [begin, end). `loop(n, body)` covers [0, n) with calls of body(begin, end), threaded or not;
  // `floats` bounds the packed b, and the sums, of a pass.
  template <class Loop>
  static void multiply_panels(const Args& args, int64_t begin, int64_t end, int64_t floats, const Loop& loop) {
    int64_t stages = ceil_div(args.k, kStage);
    int64_t row_blocks = ceil_div(args.m, Isa::kRowBlock);
    int64_t depth = smaller(stages, round_up(ceil_div(stages, ceil_div(args.k, kDepthChunk)), Isa::kDepth));
    int64_t chunk = smaller(kColumnChunk, floats / larger(args.m, depth * kStage)) / kNr;
    int64_t most_panels = ceil_div(end - begin, ceil_div(end - begin, chunk));
    bool one_pass = stages <= Isa::kDepth;
    float* packed_b = gemm_cpu_scratch(GemmScratch::shared_b, most_panels * depth * kPanelStage);
    float* workspace = one_pass ? nullptr : gemm_cpu_scratch(GemmScratch::shared_c, args.m * most_panels * kNr);
    for (int64_t panel = begin; panel < end; panel += most_panels) {
      int64_t panels = smaller(most_panels, end - panel);
      for (int64_t stage = 0; stage < stages; stage += depth) {
        int64_t stage_end = smaller(stage + depth, stages);
        int64_t panel_floats = (stage_end - stage) * kPanelStage;
        loop(panels, [&](int64_t first, int64_t last) {
          for (int64_t p = first; p < last; ++p) Operands::pack_b(args, panel + p, stage, stage_end, packed_b + p * panel_floats);
        });
        loop(row_blocks * panels, [&](int64_t at, int64_t stop) {
          while (at < stop) {
            int64_t row_block = at / panels, first = at % panels, last = smaller(panels, first + stop - at);
            int64_t row = panel_row(row_block, row_blocks, args.m), row_end = panel_row(row_block + 1, row_blocks, args.m);
            Sums sums{one_pass ? nullptr : workspace + (first * args.m + row) * kNr, args.m * kNr};
            Piece piece{row, row_end, panel + first, panel + last, stage, stage_end};
            multiply_piece(args, piece, packed_b + first * panel_floats, sums);
            at += last - first;
          }
        });
      }
    }
  }

  static void multiply_many_rows(const Args& args) {
    int64_t panels = ceil_div(args.n, kNr);
    auto threaded = [](int64_t n, const auto& body) { parallel_for(n, 1, body); };
    auto serial = [](int64_t n, const auto& body) { body(0, n); };
    // Wide enough for every thread to keep its own packed b: one parallel region, nobody waits for a pass of another.
    if (args.n >= kWide) {
      parallel_for(panels, 1, [&](int64_t begin, int64_t end) { multiply_panels(args, begin, end, kSharedFloats / 2, serial); });
    } else {
      multiply_panels(args, 0, panels, kSharedFloats, threaded);
    }
  }

  static void run(const Args& args) {
    int64_t chunks = ceil_div(args.m, kRowChunk);
    for (int64_t i = 0; i < chunks; ++i) {
      int64_t row = panel_row(i, chunks, args.m);
      Args rows = args;
      rows.m = panel_row(i + 1, chunks, args.m) - row;
      Operands::skip_rows(rows, row);
      rows.out = static_cast<char*>(args.out) + row * args.ldo * (args.out_type == DType::f32 ? 4 : 2);
      rows.m <= Isa::kRowBlock ? multiply_few_rows(rows) : multiply_many_rows(rows);
    }
  }
};

}  // namespace
}  // namespace eightfold
