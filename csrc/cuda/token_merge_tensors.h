// The checks of this room's tensors that guard memory, for both of its files.
#pragma once

#include <algorithm>

#include "launch.h"

namespace tokenops {

inline void check_tokens(const char* name, const Tensor& t) {
  check_rank(name, t, 3);
  check_dense_rows(name, t);
  // ids of rows, and of what fills up the last block
  STD_TORCH_CHECK(t.size(1) < INT32_MAX - 1024, name, " must have fewer than 2^31 - 1024 rows");
}

// [1|B, N] of one number a token
inline void check_per_token(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t tokens) {
  check_rank(name, t, 2);
  check_dtype(name, t, dtype);
  check_broadcast(name, t, 0, batch);
  check_size(name, t, 1, tokens);
}

// the same for tensors that were made for this call
inline void check_new(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t columns) {
  check_rank(name, t, 2);
  check_dtype(name, t, dtype);
  check_size(name, t, 0, batch);
  check_size(name, t, 1, columns);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// [2, B, N] ids
inline void check_lists(const Tensor& lists, int64_t batch, int64_t tokens) {
  check_rank("lists", lists, 3);
  check_dtype("lists", lists, ScalarType::Int);
  check_size("lists", lists, 0, 2);
  check_size("lists", lists, 1, batch);
  check_size("lists", lists, 2, tokens);
  STD_TORCH_CHECK(lists.is_contiguous(), "lists must be contiguous");
}

// Whether every row begins where 16 bytes can be read at once, and ends with such a piece.
inline bool is_wide(const Tensor& t) {
  const int64_t count = 16 / static_cast<int64_t>(t.element_size());
  const auto fits = [&](int64_t dim) { return t.size(dim) <= 1 || t.stride(dim) % count == 0; };
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(2) % count == 0 && fits(0) && fits(1);
}

}  // namespace tokenops
