#include "attention/paged_rows.h"

namespace eightfold {

void paged_next_rows_cpu(const PagedRows& op) {
  for (int64_t row = 0; row < op.rows; ++row) next_row(op, row);
}

}  // namespace eightfold
