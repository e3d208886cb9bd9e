// The inner loop of attention, shared: the softmax sums of a block of queries, and the step that takes in (or out) a block of keys.
// The maximum is lazy (FlashAttention-4, Shah et al.): sums are rescaled only when a logit exceeds the running maximum by 2^8.
#pragma once

#include "sparse_attention_tiles.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

enum class Terms { added, subtracted, counted };  // counted: no values, only maximum and total

template <class Dot, int V>
struct RowSums {
  typedef typename Dot::Scalar Scalar;
  static constexpr int lanes = V * L;
  Scalar *query, *weights;               // [D / kPerScalar][lane], [key / kPerScalar][lane]
  float* values;                         // [Dv][lane], sum over keys of weight times value
  VecF<L> top[V], total[V], squares[V];  // weights are 2^(logit - top); their sum, and the sum of their squares
  int64_t width, value_width;

  RowSums(Arena& arena, int64_t width, int64_t value_width) : width(width), value_width(value_width) {
    query = arena.take<Scalar>(width / Dot::kPerScalar * lanes);
    weights = arena.take<Scalar>(kKeyBlock / Dot::kPerScalar * lanes);
    values = arena.take<float>(value_width * lanes);
  }

  void clear() {
    memset(values, 0, value_width * lanes * sizeof(float));
    for (int v = 0; v < V; ++v) top[v] = splat<L>(kLowest), total[v] = squares[v] = VecF<L>{};
  }

  // The terms of up to kKeyBlock keys, a multiple of the tile height: `rows` [key][D / kPerScalar], `steps` [key / kPerScalar][Dv],
  // `bias` [key] and `added` [key][lane] in units of log2, or null; `rel` from the first key on.
  template <Terms kTerms = Terms::added>
  void take(const Scalar* rows, const Scalar* steps, int64_t keys, float scale, const float* bias, const float* added, bool want_squares,
            const RelTerms& rel = {}) {
    // a loop of its own for each: a choice inside costs the registers that half types need, a third of their speed
    if (rel.height)
      take_in<kTerms, true>(rows, steps, keys, scale, bias, added, want_squares, rel);
    else
      take_in<kTerms, false>(rows, steps, keys, scale, bias, added, want_squares, rel);
  }

  // to a maximum of at least `high`
  TOKENOPS_INLINE void raise(const VecF<L> (&high)[V]) {
    for (int v = 0; v < V; ++v) {
      const VecF<L> risen = max(high[v], top[v]), shrink = exp2<L, 5>(top[v] - risen);
      top[v] = risen;
      total[v] *= shrink;
      squares[v] *= shrink * shrink;
      for (int64_t c = 0; c < value_width; ++c) store<L>(values + c * lanes + v * L, load<L>(values + c * lanes + v * L) * shrink);
    }
  }

 private:
  template <Terms kTerms, bool kRel>
  __attribute__((noinline)) void take_in(const Scalar* rows, const Scalar* steps, int64_t keys, float scale, const float* bias,
                                         const float* added, bool want_squares, const RelTerms& rel) {
    // what changes here lives in registers or on the stack: every store of a weight could alias a member
    RowSums sums = *this;
    const int64_t scalars = width / Dot::kPerScalar;
    int64_t pending = 0;  // weights from here on are not in the sums yet
    auto flush = [&](int64_t end) {
      if constexpr (kTerms == Terms::counted) return;
      multiply_block<Dot, L, V>(steps + pending / Dot::kPerScalar * sums.value_width, 1, sums.value_width,
                                sums.weights + pending / Dot::kPerScalar * lanes, lanes, (end - pending) / Dot::kPerScalar, sums.values,
                                lanes, sums.value_width);
      pending = end;
    };
    for (int64_t j = 0; j < keys; j += kTileRows) {
      VecF<L> x[kTileRows][V];
      logit_tile<Dot, V>(rows + j * scalars, scalars, scalars, sums.query, scale, bias ? bias + j : nullptr,
                         added ? added + j * lanes : nullptr, kRel ? rel.from(j) : RelTerms{}, x);
      VecF<L> high[V];
      bool grown = false;
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        high[v] = x[0][v];
#pragma GCC unroll 8
        for (int r = 1; r < kTileRows; ++r) high[v] = max(high[v], x[r][v]);
        grown |= any_greater(high[v], sums.top[v] + kLazy);
      }
      if (__builtin_expect(grown, 0)) {
        flush(j);
        sums.raise(high);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          x[r][v] = exp2<L, Dot::kExpDegree>(x[r][v] - sums.top[v]);
          if constexpr (kTerms == Terms::subtracted) x[r][v] = -x[r][v];
        }
      Scalar* tile = sums.weights + j / Dot::kPerScalar * lanes;
      store_steps<Dot, V>(tile, x);
      add_weights<Dot, V>(sums.total, tile);
      if (want_squares)
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) sums.squares[v] += x[r][v] * x[r][v];
    }
    flush(keys);
    *this = sums;
  }
};

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
