// Tensors to the arguments of delta_matmul's kernels.
#pragma once

#include <type_traits>

#include "delta_matmul_rows.cuh"
#include "launch.h"

namespace tokenops {
namespace {

// Whether rows can be read in pieces of 16 bytes: where the first begins, and every stride, is a multiple of that.
bool begins_at_16(const Tensor& t) {
  bool all = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < t.dim() - 1; ++dim)
    all &= t.size(dim) <= 1 || t.stride(dim) * static_cast<int64_t>(t.element_size()) % 16 == 0;
  return all;
}
bool fits_16(const Tensor& t) { return t.size(t.dim() - 1) * static_cast<int64_t>(t.element_size()) % 16 == 0 && begins_at_16(t); }
bool fits_16(const OptionalTensor& t) { return !t || fits_16(*t); }

template <class T>
TokenGrid<T> grid_of(const Tensor& t) {
  return {static_cast<T*>(const_cast<void*>(t.const_data_ptr())), broadcast_stride(t, 0), t.stride(1)};
}
// [B, rows, width], of a type and with dense rows; kernels count rows of all samples in 32 bits
void check_grid(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t rows, int64_t width) {
  check_rank(name, t, 3);
  check_dtype(name, t, dtype);
  check_size(name, t, 0, batch);
  check_size(name, t, 1, rows);
  check_size(name, t, 2, width);
  check_dense_rows(name, t);
  STD_TORCH_CHECK(batch * rows < INT32_MAX && width < INT32_MAX, name, " must have fewer than 2^31 - 1 rows and columns");
}
// one shaped as another but for the number of rows, or none
template <class T>
TokenGrid<T> grid_of(const char* name, const OptionalTensor& t, const Tensor& like, int64_t rows) {
  if (!t) return {};
  check_grid(name, *t, like.scalar_type(), like.size(0), rows, like.size(2));
  return grid_of<T>(*t);
}

SampleLists sample_lists_of(const Tensor& index, int64_t batch, int64_t rows) {
  check_rank("index", index, 2);
  check_dtype("index", index, ScalarType::Int);
  check_broadcast("index", index, 0, batch);
  check_dense_rows("index", index);
  // kernels count to the end of a tile, and some of the next ones, in 32 bits
  STD_TORCH_CHECK(batch * index.size(1) < INT32_MAX - 1023, "index must have fewer than 2^31 - 1024 slots");
  return {index.const_data_ptr<int32_t>(), broadcast_stride(index, 0), static_cast<int>(batch), static_cast<int>(rows),
          static_cast<int>(index.size(1))};
}

ChannelVector vector_of(const char* name, const OptionalTensor& t, ScalarType dtype, int64_t width) {
  if (!t) return {};
  check_rank(name, *t, 1);
  check_size(name, *t, 0, width);
  check_dense_rows(name, *t);
  const bool single = t->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || t->scalar_type() == dtype, name, " has the wrong dtype");
  return {t->const_data_ptr(), single};
}
Normalization normalization_of(const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& x) {
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "norm_weight and norm_bias must be given both or not at all");
  return {vector_of("norm_weight", weight, x.scalar_type(), x.size(2)), vector_of("norm_bias", bias, x.scalar_type(), x.size(2)),
          static_cast<float>(eps), 1.0f / static_cast<float>(x.size(2))};
}

// calls f(a number of the type of x, whether rows are read in pieces of 16 bytes as a constant)
template <class F>
void with_rows(const Tensor& x, bool aligned, F&& f) {
  with_float("x", x, [&](auto number) {
    if (aligned)
      f(number, std::true_type{});
    else
      f(number, std::false_type{});
  });
}
int64_t blocks_of_rows(int64_t rows) { return (rows + kRowWarps - 1) / kRowWarps; }

}  // namespace
}  // namespace tokenops
