// The only header that includes torch, and of torch only the stable ABI: one binary serves torch 2.10 and later, any Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace tokenops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The doors in Python explain bad arguments to people. These checks guard memory against direct callers of torch.ops.
inline void check_rank(const char* name, const Tensor& t, int64_t rank) {
  STD_TORCH_CHECK(t.dim() == rank, name, " must have ", rank, " dimensions, got ", t.dim());
}
inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", t.size(dim));
}
inline void check_broadcast(const char* name, const Tensor& t, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size || t.size(dim) == 1, name, " must have size 1 or ", size, " in dimension ", dim, ", got ",
                  t.size(dim));
}
inline void check_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
}
inline void check_dense_rows(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name, " must have a dense last dimension");
}
inline void check_contiguous(const char* name, const Tensor& t) { STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous"); }
inline void check_dense(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  check_rank(name, t, static_cast<int64_t>(sizes.size()));
  check_dtype(name, t, dtype);
  int64_t dim = 0;
  for (const int64_t size : sizes) check_size(name, t, dim++, size);
  check_contiguous(name, t);
}
inline int64_t broadcast_stride(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

}  // namespace tokenops
