// What attention asks of its tensors on every device.
#pragma once

#include <initializer_list>

#include "tensors.h"

namespace tokenops {

inline void check_heads(int64_t query_heads, int64_t kv_heads) {
  STD_TORCH_CHECK(kv_heads > 0 && query_heads % kv_heads == 0, "query heads must be a multiple of key heads");
}

// D and Dv
inline void check_widths(std::initializer_list<int64_t> widths, int64_t most) {
  for (int64_t width : widths)
    STD_TORCH_CHECK(width > 0 && width % 8 == 0 && width <= most, "head widths must be multiples of 8 up to ", most, ", got ", width);
}

// [B, H, rows, width]; of packed sequences a grid has all rows
inline void check_grid(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  check_rank(name, t, 4);
  check_dtype(name, t, dtype);
  check_size(name, t, 0, batch);
  check_size(name, t, 1, heads);
  check_size(name, t, 2, rows);
  check_size(name, t, 3, width);
  check_dense_rows(name, t);
}

// [1|B, 1|H, K] row ids
inline void check_index(const char* name, const Tensor& index, int64_t batch, int64_t heads) {
  check_rank(name, index, 3);
  check_dtype(name, index, ScalarType::Int);
  check_broadcast(name, index, 0, batch);
  check_broadcast(name, index, 1, heads);
}

// [1|B, 1|kv heads, M]
inline void check_bias(const Tensor& bias, int64_t batch, int64_t kv_heads, int64_t keys) {
  check_rank("kv_bias", bias, 3);
  check_dtype("kv_bias", bias, ScalarType::Float);
  check_broadcast("kv_bias", bias, 0, batch);
  check_broadcast("kv_bias", bias, 1, kv_heads);
  check_size("kv_bias", bias, 2, keys);
}

// [1|B, 1|query heads, 1|N, 1|M]
inline void check_mask(const Tensor& mask, int64_t batch, int64_t query_heads, int64_t rows, int64_t keys) {
  check_rank("attn_mask", mask, 4);
  check_broadcast("attn_mask", mask, 0, batch);
  check_broadcast("attn_mask", mask, 1, query_heads);
  check_broadcast("attn_mask", mask, 2, rows);
  check_broadcast("attn_mask", mask, 3, keys);
}

// rel_h [B, query heads, N, gh] and rel_w [B, query heads, N, gw] of one type; packed sequences are on grids of their own
inline void check_rel_pos(const OptionalTensor& rel_h, const OptionalTensor& rel_w, int64_t batch, int64_t query_heads, int64_t rows,
                          int64_t keys, bool packed) {
  STD_TORCH_CHECK(rel_h.has_value() == rel_w.has_value(), "rel_h and rel_w must be given together");
  if (!rel_h) return;
  check_rank("rel_h", *rel_h, 4);
  check_rank("rel_w", *rel_w, 4);
  const int64_t height = rel_h->size(3), width = rel_w->size(3);
  check_grid("rel_h", *rel_h, rel_h->scalar_type(), batch, query_heads, rows, height);
  check_grid("rel_w", *rel_w, rel_h->scalar_type(), batch, query_heads, rows, width);
  STD_TORCH_CHECK(height < INT32_MAX && width < INT32_MAX && (packed ? height * width < INT32_MAX : height * width == keys),
                  "rel_pos must be for a grid of ", keys, " key rows, got ", height, " x ", width);
}

// [B, query heads, K]: lse, row_sq
inline void check_statistic(const char* name, const Tensor& t, int64_t batch, int64_t query_heads, int64_t slots) {
  check_rank(name, t, 3);
  check_dtype(name, t, ScalarType::Float);
  check_size(name, t, 0, batch);
  check_size(name, t, 1, query_heads);
  check_size(name, t, 2, slots);
}

}  // namespace tokenops
