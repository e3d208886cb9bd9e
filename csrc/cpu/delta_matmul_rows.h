// Rows in vectors, and their layer normalisation: what gating and the packing of layers have in common.
#pragma once

#include "delta_matmul.h"
#include "pack.h"
#include "storage_types.h"

namespace tokenops {
namespace TOKENOPS_ISA {

// the elements of a row from `column` on; zeros behind its end
template <int L, class T>
TOKENOPS_INLINE VecF<L> read(const T* row, int64_t column, int64_t width) {
  return width - column >= L ? load<L>(row + column) : load_first<L>(row + column, width - column);
}

// what the storage type keeps of a number
template <int L, class T>
TOKENOPS_INLINE VecF<L> rounded(VecF<L> v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T bits[L];
  store<L>(bits, v);
  return load<L>(bits);
}

struct Moments {
  float mean, inverse;  // 1 / sqrt(variance + eps)
};

// two passes: a difference of large sums would lose the variance of a row far from zero
template <class T>
Moments moments_of(const T* row, int64_t width, float eps) {
  constexpr int L = kLanes;
  if (width == 0) return {0.f, 0.f};
  VecF<L> sum{}, squares{};
  for (int64_t c = 0; c < width; c += L) sum += read<L>(row, c, width);
  const float mean = sum_lanes(sum) / (float)width;
  for (int64_t c = 0; c < width; c += L) {
    VecF<L> centered = read<L>(row, c, width) - mean;
    if (width - c < L) centered = load_first<L>((const float*)&centered, width - c);
    squares += centered * centered;
  }
  return {mean, 1.f / __builtin_sqrtf(sum_lanes(squares) / (float)width + eps)};
}

// the normalised row from `column` on; behind its end there is nothing to rely on
template <int L, class T>
TOKENOPS_INLINE VecF<L> normalized(const T* row, int64_t column, int64_t width, const RowNormalization& norm, Moments m) {
  return (read<L>(row, column, width) - m.mean) * m.inverse * read<L>(norm.weight, column, width) + read<L>(norm.bias, column, width);
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
