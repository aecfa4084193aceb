// paged_attention_sm90's kernel of many queries (attention_sm90.cu).
#pragma once

#include "attention/attention.h"

namespace eightfold::attention {

void paged_rows_sm90(const PagedAttention& op, void* stream);

}  // namespace eightfold::attention
