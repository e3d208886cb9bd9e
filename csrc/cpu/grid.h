// Grids of tokens as the attention loops see them.
#pragma once

#include "../tensors.h"
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

}  // namespace tokenops
