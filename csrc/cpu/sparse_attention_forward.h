// Attention over gathered rows, forward: a block of queries against all keys of its head, 96 at a time.
// The maximum is lazy (FlashAttention-4, Shah et al.): sums are rescaled only when a logit exceeds the running maximum by 2^8.
#pragma once

#include "sparse_attention_tiles.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

template <class Dot>
struct ForwardKeys {
  typedef typename Dot::Scalar Scalar;
  Scalar *rows, *value_steps;  // [key][D / kPerScalar], [key / kPerScalar][Dv]
  float* bias;

  ForwardKeys(Arena& arena, const SparseAttention& p, int64_t keys) {
    const int64_t padded = round_up(keys, kTileRows);
    rows = arena.take<Scalar>(padded * p.width / Dot::kPerScalar);
    value_steps = arena.take<Scalar>(padded / Dot::kPerScalar * p.value_width);
    bias = arena.take<float>(padded);
  }
};

template <class T, class Dot, int V>
struct ForwardBlock {
  typedef typename Dot::Scalar Scalar;
  static constexpr int lanes = V * L;
  Scalar *query, *weights;  // [D / kPerScalar][lane], [key / kPerScalar][lane]
  float *sums, *added;      // [Dv][lane], [key][lane]

  ForwardBlock(Arena& arena, const SparseAttention& p) {
    query = arena.take<Scalar>(p.width / Dot::kPerScalar * lanes);
    weights = arena.take<Scalar>(kKeyBlock / Dot::kPerScalar * lanes);
    sums = arena.take<float>(p.value_width * lanes);
    added = arena.take<float>(kKeyBlock * lanes);
  }

  void run(const SparseAttention& p, int64_t s, int64_t h, int64_t first, int64_t last, const ForwardKeys<Dot>& panel, const float* bias) {
    const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, h / p.group());
    const int64_t scalars = p.width / Dot::kPerScalar, padded = round_up(keys.count, kTileRows);
    const float scale = p.scale * kLog2e;
    const bool want_squares = p.row_sq != nullptr;
    pack_lanes<Dot>(query, V, rows_of<T>(p.query, s, h, queries.row + first, last - first), p.width, Fill::zeros);
    memset(sums, 0, p.value_width * lanes * sizeof(float));
    VecF<L> top[V], total[V], squares[V];
    for (int v = 0; v < V; ++v) top[v] = splat<L>(kLowest), total[v] = squares[v] = VecF<L>{};

    for (int64_t block = 0; block < padded; block += kKeyBlock) {
      const int64_t size = smaller(kKeyBlock, padded - block);
      const Visible visible = fill_mask(added, p, s, h, queries, first, last, keys, block, smaller(block + size, keys.count), lanes);
      if (visible == Visible::nothing) continue;
      int64_t pending = 0;  // weights from here on are not in the sums yet
      auto flush = [&](int64_t end) {
        multiply_block<Dot, L, V>(panel.value_steps + (block + pending) / Dot::kPerScalar * p.value_width, 1, p.value_width,
                                  weights + pending / Dot::kPerScalar * lanes, lanes, (end - pending) / Dot::kPerScalar, sums, lanes,
                                  p.value_width);
        pending = end;
      };
      for (int64_t j = 0; j < size; j += kTileRows) {
        VecF<L> x[kTileRows][V];
        logit_tile<Dot, V>(panel.rows + (block + j) * scalars, scalars, scalars, query, scale, bias ? bias + block + j : nullptr,
                           visible == Visible::partly ? added + j * lanes : nullptr, x);
        VecF<L> high[V];
        bool grown = false;
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          high[v] = x[0][v];
#pragma GCC unroll 8
          for (int r = 1; r < kTileRows; ++r) high[v] = max(high[v], x[r][v]);
          grown |= any_greater(high[v], top[v] + kLazy);
        }
        if (__builtin_expect(grown, 0)) {
          flush(j);
          for (int v = 0; v < V; ++v) {
            const VecF<L> risen = max(high[v], top[v]), shrink = exp2<L, 5>(top[v] - risen);
            top[v] = risen;
            total[v] *= shrink;
            squares[v] *= shrink * shrink;
            for (int64_t c = 0; c < p.value_width; ++c) store<L>(sums + c * lanes + v * L, load<L>(sums + c * lanes + v * L) * shrink);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) x[r][v] = exp2<L, Dot::kExpDegree>(x[r][v] - top[v]);
        Scalar* tile = weights + j / Dot::kPerScalar * lanes;
        store_steps<Dot, V>(tile, x);
        add_weights<Dot, V>(total, tile);
        if (want_squares)
          for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) squares[v] += x[r][v] * x[r][v];
      }
      flush(size);
    }

    float inverse[lanes];
    write_statistics<V>(p, s, h, queries, first, last, top, total, squares, inverse);
    unpack_lanes(head_of<T>(p.out, s, h), p.out.row, (p.out_by_row ? queries.row : queries.slot) + first, last - first, sums, V, inverse,
                 p.value_width, p.past_caches);
  }
};

template <class T>
void forward_empty_slots(const SparseAttention& p, int64_t s, int64_t h) {
  const RowList& queries = p.queries.at(s, h);
  if (!p.out_by_row) zero_rows(head_of<T>(p.out, s, h), p.out.row, queries.empty, queries.empties, p.value_width);
  for (int64_t i = 0; i < queries.empties; ++i) {
    const int64_t at = s * p.stat_sequence + h * p.stat_head + queries.empty[i];
    p.lse[at] = -kInfinity;
    if (p.row_sq) p.row_sq[at] = 0.f;
  }
}

template <class T, class Dot>
void forward_head(const SparseAttention& p, int64_t s, int64_t kv_head, int64_t first_block, int64_t last_block, bool packed,
                  char* scratch) {
  const RowList& keys = p.keys.at(s, kv_head);
  const int64_t padded = round_up(keys.count, kTileRows);
  Arena arena{scratch};
  ForwardKeys<Dot> panel(arena, p, keys.count);
  if (!packed) {
    pack_rows<Dot>(panel.rows, p.width / Dot::kPerScalar, rows_of<T>(p.key, s, kv_head, keys.row, keys.count), padded, p.width,
                   Fill::last_row);
    pack_steps<Dot>(panel.value_steps, p.value_width, rows_of<T>(p.value, s, kv_head, keys.row, keys.count), padded, p.value_width);
  }
  const float* bias = pack_bias(panel.bias, p, s, kv_head, keys.row, keys.count, padded);
  for_query_blocks(p, s, kv_head, first_block, last_block, [&](int64_t h, int64_t first, int64_t last) {
    with_vectors(query_vectors(last - first), [&](auto vectors) {
      Arena behind_keys = arena;
      ForwardBlock<T, Dot, decltype(vectors)::value>(behind_keys, p).run(p, s, h, first, last, panel, bias);
    });
    if (first == 0) forward_empty_slots<T>(p, s, h);
  });
  stream_fence();
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
