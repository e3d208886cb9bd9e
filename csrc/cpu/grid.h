// Grids of tokens as the attention loops see them.
#pragma once

#include "../sparse_attention_tensors.h"
#include "call.h"
#include "sparse_attention.h"

namespace tokenops {

// [batch, heads, rows, width], checked; of packed sequences, a batch of 1, it has the rows of all
inline Grid grid_of(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  check_grid(name, t, dtype, batch, heads, rows, width);
  return {const_cast<void*>(t.const_data_ptr()), broadcast_stride(t, 0), t.stride(1), t.stride(2)};
}

inline void check_widths(const SparseAttention& p) { check_widths({p.width, p.value_width}, 256); }

// for queries on a grid of so many rows; `keys`: the rows of the key grid, which packed sequences have none of
inline void set_rel_pos(SparseAttention& p, const OptionalTensor& rel_h, const OptionalTensor& rel_w, int64_t batch, int64_t rows,
                        int64_t keys, bool packed = false) {
  check_rel_pos(rel_h, rel_w, batch, p.query_heads, rows, keys, packed);
  if (!rel_h) return;
  p.rel_storage = storage_of("rel_h", *rel_h);
  p.rel_height = rel_h->size(3);
  p.rel_width = rel_w->size(3);
  p.rel_h = grid_of("rel_h", *rel_h, rel_h->scalar_type(), batch, p.query_heads, rows, p.rel_height);
  p.rel_w = grid_of("rel_w", *rel_w, rel_h->scalar_type(), batch, p.query_heads, rows, p.rel_width);
}

}  // namespace tokenops
