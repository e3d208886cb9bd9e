// What token_merge asks of its tensors on every device.
#pragma once

#include <algorithm>
#include <string>

#include "tensors.h"
#include "token_merge.h"

namespace tokenops {

// [B, rows, width]
inline void check_tokens(const char* name, const Tensor& t) {
  check_rank(name, t, 3);
  check_dense_rows(name, t);
  // ids of rows, and of what fills up the last block
  STD_TORCH_CHECK(t.size(1) < INT32_MAX - 1024, name, " must have fewer than 2^31 - 1024 rows");
}
inline void check_tokens(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t rows, int64_t width) {
  check_tokens(name, t);
  check_dtype(name, t, dtype);
  check_size(name, t, 0, batch);
  check_size(name, t, 1, rows);
  check_size(name, t, 2, width);
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
  check_per_token(name, t, dtype, batch, columns);
  check_size(name, t, 0, batch);
  check_contiguous(name, t);
}

// [1|B, N, 3], given if there is a window
inline void check_place(const OptionalTensor& place, bool windowed, int64_t batch, int64_t tokens) {
  STD_TORCH_CHECK(place.has_value() == windowed, "places and a window must be given together");
  if (!place) return;
  check_rank("a place", *place, 3);
  check_dtype("a place", *place, ScalarType::Int);
  check_broadcast("a place", *place, 0, batch);
  check_size("a place", *place, 1, tokens);
  check_size("a place", *place, 2, kPlaces);
}

inline void check_compared_width(int64_t width) {
  STD_TORCH_CHECK(width > 0 && width % 8 == 0, "the width of what is compared must be a multiple of 8, got ", width);
}

// A bound of a window: two places are less than this apart, and so far beyond nothing overflows.
inline int64_t held(int64_t bound) { return std::clamp<int64_t>(bound, -(int64_t{1} << 33), int64_t{1} << 33); }

// a plan that is being made: slot and order [B, N], count [B], offsets [B, n_out + 1]
inline void check_new_plan(const Tensor& slot, const Tensor& count, const Tensor& order, const Tensor& offsets, int64_t batch,
                           int64_t tokens) {
  check_new("slot", slot, ScalarType::Int, batch, tokens);
  check_new("order", order, ScalarType::Int, batch, tokens);
  check_new("offsets", offsets, ScalarType::Int, batch, offsets.size(1));
  check_rank("count", count, 1);
  check_dtype("count", count, ScalarType::Int);
  check_size("count", count, 0, batch);
  check_contiguous("count", count);
  STD_TORCH_CHECK(offsets.size(1) > 0 && offsets.size(1) < INT32_MAX / 2, "offsets must have n_out + 1 columns, fewer than 2^30");
}

// a plan that was given: the same, but one may serve all samples
inline void check_plan(const Tensor& slot, const Tensor& order, const Tensor& offsets, int64_t batch, int64_t tokens, int64_t n_out) {
  check_per_token("slot", slot, ScalarType::Int, batch, tokens);
  check_per_token("order", order, ScalarType::Int, batch, tokens);
  check_per_token("offsets", offsets, ScalarType::Int, batch, n_out + 1);
  for (const Tensor* t : {&slot, &order, &offsets})
    STD_TORCH_CHECK(t->is_contiguous() && t->size(0) == slot.size(0), "slot, order and offsets must be contiguous and of one batch size");
}

inline MergeMode mode_of(const std::string& mode) {
  if (mode == "sum" || mode == "copy") return MergeMode::sum;
  if (mode == "mean") return MergeMode::mean;
  if (mode == "amax") return MergeMode::amax;
  STD_TORCH_CHECK(mode == "replace" || mode == "drop", "unknown mode ", mode);
  return MergeMode::keep;
}

}  // namespace tokenops
