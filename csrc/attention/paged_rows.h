// What a decoding step reads of sequences that are in pages, a token each: made of the token and the place that each has come to, which
// then moves on.
//
// Floor: a launch. A thread takes a sequence.
#pragma once

#include <cstdint>

#include "core/fp8.h"

namespace eightfold {

struct PagedRows {
  int64_t* positions;     // [rows], of the newest token; one further afterwards where active
  const int64_t* tokens;  // [rows]
  const int32_t* active;  // [rows], 0: no sequence
  const int32_t* pages;   // [rows, width]
  int64_t rows, width, page_size;
  int64_t *ids, *at, *slots;  // [rows]: the token, or 0 for one below 0; its place in the text, and in the cache
  int32_t* lengths;           // [rows]: keys up to it, 0 where not active
};

// A place beyond the pages has no slot, which is -1, nor has one in a page below 0.
EF_HD void next_row(const PagedRows& op, int64_t row) {
  const int64_t position = op.positions[row], page = position / op.page_size, token = op.tokens[row];
  const int64_t own = position >= 0 && page < op.width ? op.pages[row * op.width + page] : -1;
  const bool active = op.active[row] != 0;
  op.ids[row] = token < 0 ? 0 : token;
  op.at[row] = position;
  op.slots[row] = own < 0 ? -1 : own * op.page_size + position % op.page_size;
  op.lengths[row] = active ? static_cast<int32_t>(position + 1) : 0;
  op.positions[row] = position + active;
}

void paged_next_rows_cpu(const PagedRows& op);
void paged_next_rows_sm90(const PagedRows& op, void* stream);

}  // namespace eightfold
