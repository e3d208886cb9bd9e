// The one matrix product of the CPU kernels: a register tile c[r][v] += sum_k a(r, k) * b[k][v], where b is read as vectors
// and a as broadcast scalars through two strides. Gathered tiles, transposed tiles and both sides of a backward pass are
// choices of strides. A "scalar" is 32 bits: a float, or two bf16 that lie next to each other along k.
#pragma once

#include "vec.h"

namespace tokenops {
namespace TOKENOPS_ISA {

struct FloatDot {
  typedef float Scalar;
  static constexpr int kPerScalar = 1;
  static constexpr float kOne = 1.f;
  static constexpr int kExpDegree = 5;
  template <int L>
  static TOKENOPS_INLINE VecF<L> multiply_add(float a, VecF<L> b, VecF<L> c) {
    return a * b + c;
  }
};

#if defined(__AVX512BF16__)
struct Bf16Dot {
  typedef uint32_t Scalar;
  static constexpr int kPerScalar = 2;
  static constexpr uint32_t kOne = 0x3f803f80;
  static constexpr int kExpDegree = 3;  // P is rounded to 8 bits anyway
  template <int L>
  static TOKENOPS_INLINE VecF<L> multiply_add(uint32_t a, VecF<L> b, VecF<L> c) {
    static_assert(L == 16);
    return (VecF<L>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
};
#endif

// tile height: with up to three vectors across, 8 x 3 accumulators fill 32 registers and 4 x 3 fill 16
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kTileVectors = 3;

template <int L, int R, int V>
TOKENOPS_INLINE void clear(VecF<L> (&c)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) c[r][v] = VecF<L>{};
}

struct Nothing {
  TOKENOPS_INLINE void operator()() const {}
};

// `also` runs once a step, in the shadow of the products: a place to fetch what comes next
template <class Dot, int L, int R, int V, class Also = Nothing>
TOKENOPS_INLINE void multiply_tile(const typename Dot::Scalar* a, int64_t a_row, int64_t a_step, const typename Dot::Scalar* b,
                                   int64_t b_step, int64_t steps, VecF<L> (&c)[R][V], Also&& also = {}) {
  // two bases four rows apart, so that all rows are reached with three registers of offsets and none is spilled
  const typename Dot::Scalar* a4 = a + 4 * a_row;
  for (int64_t k = 0; k < steps; ++k, a += a_step, a4 += a_step, b += b_step) {
    also();
    VecF<L> across[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) across[v] = load_bits<VecF<L>>(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename Dot::Scalar down = r < 4 ? a[r * a_row] : a4[(r - 4) * a_row];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) c[r][v] = Dot::template multiply_add<L>(down, across[v], c[r][v]);
    }
  }
}

// calls f with the number of vectors as a constant
template <class F>
TOKENOPS_INLINE void with_vectors(int64_t vectors, F&& f) {
  switch (vectors) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
  }
}

// c[r0 + r][v] += ... for a block of memory: rows in steps of the tile height, R of them at a time
template <class Dot, int L, int V>
TOKENOPS_INLINE void multiply_block(const typename Dot::Scalar* a, int64_t a_row, int64_t a_step, const typename Dot::Scalar* b,
                                    int64_t b_step, int64_t steps, float* c, int64_t c_row, int64_t rows) {
  for (int64_t r0 = 0; r0 < rows; r0 += kTileRows) {
    VecF<L> tile[kTileRows][V];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) tile[r][v] = load<L>(c + (r0 + r) * c_row + v * L);
    multiply_tile<Dot, L, kTileRows, V>(a + r0 * a_row, a_row, a_step, b, b_step, steps, tile);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) store<L>(c + (r0 + r) * c_row + v * L, tile[r][v]);
  }
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
