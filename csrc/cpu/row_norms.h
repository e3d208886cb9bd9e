// Norms of rows in float32 that neither overflow nor vanish: a row of unusual magnitude is scaled by a power of two first, which
// changes no bit of its direction.
#pragma once

#include "pack.h"

namespace tokenops {
namespace TOKENOPS_ISA {

struct RowNorm {
  float inverse;  // 1 / norm of the row times `by`, 0 for a row of zeros
  float by;       // the power of two that brings the row to a usual magnitude: 1 for nearly all
  bool finite;
};

template <class T>
RowNorm norm_of_unusual(const T* row, int64_t width) {
  float top = 0.f;
  for (int64_t c = 0; c < width; ++c) {
    const float size = __builtin_fabsf(to_float(row[c]));
    if (!(size <= 3.402823466e38f)) return {0.f, 1.f, false};
    top = size > top ? size : top;
  }
  if (top == 0.f) return {0.f, 1.f, true};
  int exponent;
  (void)__builtin_frexpf(top, &exponent);
  // a normal number, also for the smallest denormal: its row stays small but no longer vanishes when squared
  const float by = __builtin_ldexpf(1.f, exponent > 126 ? -126 : exponent < -126 ? 126 : -exponent);
  float squares = 0.f;
  for (int64_t c = 0; c < width; ++c) {
    const float scaled = to_float(row[c]) * by;
    squares += scaled * scaled;
  }
  return {1.f / __builtin_sqrtf(squares), by, true};
}

template <class T>
RowNorm norm_of(const T* row, int64_t width) {
  const float squares = dot_rows(row, row, width);
  if (squares > 0x1p-60f && squares < 0x1p60f) return {1.f / __builtin_sqrtf(squares), 1.f, true};
  return norm_of_unusual(row, width);
}

// a packed row times a power of two
template <class Dot>
void scale_packed(typename Dot::Scalar* at, int64_t step, int64_t scalars, float by) {
  for (int64_t c = 0; c < scalars; ++c, at += step)
    if constexpr (Dot::kPerScalar == 1) {
      *at *= by;
    } else {
      const VecF<4> pair = {bf16_to_float((uint16_t)(*at & 0xffff)) * by, bf16_to_float((uint16_t)(*at >> 16)) * by};
      const VecH<4> rounded = to_bf16<4>(pair);
      *at = (uint32_t)rounded[0] | (uint32_t)rounded[1] << 16;
    }
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
