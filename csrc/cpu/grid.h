// Grids of tokens as the attention loops see them.
#pragma once

#include "../tensors.h"
#include "call.h"
#include "sparse_attention.h"

namespace tokenops {

// [batch, heads, rows, width], checked; a packed grid has the rows of all its sequences
inline Grid grid_of(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width,
                    bool packed = false) {
  check_rank(name, t, 4);
  check_dtype(name, t, dtype);
  check_size(name, t, 0, batch);
  check_size(name, t, 1, heads);
  check_size(name, t, 2, rows);
  check_size(name, t, 3, width);
  check_dense_rows(name, t);
  return {const_cast<void*>(t.const_data_ptr()), packed ? 0 : t.stride(0), t.stride(1), t.stride(2)};
}

inline void check_widths(const SparseAttention& p) {
  for (int64_t width : {p.width, p.value_width})
    STD_TORCH_CHECK(width > 0 && width % 8 == 0 && width <= 256, "head widths must be multiples of 8 up to 256, got ", width);
}

// for queries on a grid of so many rows; `keys`: the rows of the key grid, which packed sequences have none of
inline void set_rel_pos(SparseAttention& p, const OptionalTensor& rel_h, const OptionalTensor& rel_w, int64_t batch, int64_t rows,
                        int64_t keys, bool packed = false) {
  STD_TORCH_CHECK(rel_h.has_value() == rel_w.has_value(), "rel_h and rel_w must be given together");
  if (!rel_h) return;
  check_rank("rel_h", *rel_h, 4);
  check_rank("rel_w", *rel_w, 4);
  p.rel_storage = storage_of("rel_h", *rel_h);
  p.rel_height = rel_h->size(3);
  p.rel_width = rel_w->size(3);
  p.rel_h = grid_of("rel_h", *rel_h, rel_h->scalar_type(), batch, p.query_heads, rows, p.rel_height, packed);
  p.rel_w = grid_of("rel_w", *rel_w, rel_h->scalar_type(), batch, p.query_heads, rows, p.rel_width, packed);
  STD_TORCH_CHECK(packed || p.rel_height * p.rel_width == keys, "rel_pos must be for a grid of ", keys, " key rows, got ", p.rel_height,
                  " x ", p.rel_width);
}

}  // namespace tokenops
