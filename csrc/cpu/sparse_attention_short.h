// Attention over gathered rows, forward, of short sequences: up to 32 queries and keys, thousands of heads.
//
// A head stays in L1 and registers: one softmax over all its logits, no lazy maximum, no transpose of the result (P is the
// broadcast side of P V here), K and V read where they stand if they can be, and the next head's rows fetched meanwhile.
#pragma once

#include "sparse_attention_rel_pos.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

constexpr int64_t kShort = 32;

bool is_short(const SparseAttention& p, int64_t queries, int64_t keys) {
  return queries <= smaller(kShort, kTileVectors * L) && keys <= kShort && p.mask == Mask::none && !p.causal;
}

// Walks over the rows that the next head will read, a cache line at a time. The largest lever of this path: without it every
// head starts with misses. The lines are spread over all steps of the head's products, because a core has only a few dozen
// misses under way at once: prefetches in bursts wait, and the loads of the products wait behind them.
struct RowSpan {
  const char* row;
  int64_t rows, stride, bytes;
};
class Prefetcher {
 public:
  // spans end with one of no rows
  TOKENOPS_INLINE explicit Prefetcher(const RowSpan* spans) : span_(spans), left_(spans->rows) { next_row(); }
  TOKENOPS_INLINE void line() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
    if (__builtin_expect(--lines_ == 0, 0)) next_row();
  }

 private:
  TOKENOPS_INLINE void next_row() {
    while (left_ == 0 && span_->bytes) ++span_, row_ = 0, left_ = span_->rows;
    if (span_->bytes == 0) {
      step_ = 0, lines_ = INT64_MAX;  // nothing left: stay on the last line
      return;
    }
    at_ = span_->row + row_ * span_->stride, step_ = 64, lines_ = (span_->bytes + 63) / 64;
    ++row_, --left_;
  }

  const RowSpan* span_;
  int64_t left_, row_ = 0;
  const char* at_ = nullptr;
  int64_t step_ = 0, lines_ = 0;
};

template <class T, class Dot, int V>
struct ShortHead {
  typedef typename Dot::Scalar Scalar;
  static constexpr int lanes = V * L;
  Scalar *query, *key_rows, *value_steps, *weights;  // [D / kPerScalar][lane], [key][D / kPerScalar], [key / kPerScalar][Dv], ...
  float *logits, *bias;                              // [key][lane], [key]
  RelKeys cells;
  RelQueries rel_pos;

  ShortHead(Arena& arena, const SparseAttention& p) : cells(arena, p, kShort), rel_pos(arena, p, lanes) {
    query = arena.take<Scalar>(p.width / Dot::kPerScalar * lanes);
    key_rows = arena.take<Scalar>(kShort * p.width / Dot::kPerScalar);
    value_steps = arena.take<Scalar>(kShort / Dot::kPerScalar * round_up(p.value_width, L));
    weights = arena.take<Scalar>(kShort / Dot::kPerScalar * lanes);
    logits = arena.take<float>(kShort * lanes);
    bias = arena.take<float>(kShort);
  }

  static RowSpan span_of(const Grid& grid, int64_t s, int64_t h, const RowList& list, int64_t width) {
    const T* first = head_of<T>(grid, s, h) + (list.count ? list.row[0] * grid.row : 0);
    const int64_t bytes = width * (int64_t)sizeof(T), rows = list.range ? list.count : 0;
    if (grid.row == width) return {(const char*)first, rows > 0, 0, rows ? rows * bytes : bytes};
    return {(const char*)first, rows, grid.row * (int64_t)sizeof(T), bytes};
  }

  // (ahead_s, ahead_h): the head whose rows are fetched meanwhile
  void run(const SparseAttention& p, int64_t s, int64_t h, int64_t ahead_s, int64_t ahead_h) {
    const RowList &ahead_queries = p.queries.at(ahead_s, ahead_h), &ahead_keys = p.keys.at(ahead_s, ahead_h / p.group());
    const RowSpan spans[4] = {span_of(p.query, ahead_s, ahead_h, ahead_queries, p.width),
                              span_of(p.key, ahead_s, ahead_h / p.group(), ahead_keys, p.width),
                              span_of(p.value, ahead_s, ahead_h / p.group(), ahead_keys, p.value_width),
                              {nullptr, 0, 0, 0}};
    Prefetcher ahead(spans);
    const int64_t kv_head = h / p.group();
    const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, kv_head);
    const int64_t scalars = p.width / Dot::kPerScalar, count = queries.count, padded = round_up(keys.count, kTileRows);
    const float scale = p.scale * kLog2e;
    pack_lanes<Dot>(query, V, rows_of<T>(p.query, s, h, queries.row, count), p.width, Fill::zeros);

    const Rows<T> k_rows = rows_of<T>(p.key, s, kv_head, keys.row, keys.count),
                  v_rows = rows_of<T>(p.value, s, kv_head, keys.row, keys.count);
    // a range of floats is read where it stands, unless the last tile would read past its end
    const bool in_place = std::is_same<T, float>::value && keys.range && keys.count == padded && keys.count;
    const Scalar *k_data = key_rows, *v_data = value_steps;
    int64_t k_step = scalars, v_step = round_up(p.value_width, L);
    if (in_place) {
      k_data = (const Scalar*)(const void*)k_rows.at(0);
      k_step = k_rows.stride;
    } else {
      pack_rows<Dot>(key_rows, scalars, k_rows, padded, p.width, Fill::last_row);
    }
    if (in_place && p.value_width % L == 0) {
      v_data = (const Scalar*)(const void*)v_rows.at(0);
      v_step = v_rows.stride;
    } else {
      pack_steps<Dot>(value_steps, v_step, v_rows, padded, p.value_width);
    }
    const float* added = pack_bias(bias, p, s, kv_head, keys.row, keys.count, padded);
    cells.pack(p, keys, 0, keys.count);
    const RelTerms rel = rel_pos.pack(p, s, h, queries.row, count, V, cells);

    VecF<L> top[V], total[V], squares[V];
    for (int v = 0; v < V; ++v) top[v] = splat<L>(kLowest), total[v] = squares[v] = VecF<L>{};
    for (int64_t j = 0; j < padded; j += kTileRows) {
      VecF<L> x[kTileRows][V];
      logit_tile<Dot, V>(k_data + j * k_step, k_step, scalars, query, scale, added ? added + j : nullptr, nullptr, rel.from(j), x,
                         [&] { ahead.line(); });
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          top[v] = max(top[v], x[r][v]);
          store<L>(logits + ((j + r) * V + v) * L, x[r][v]);
        }
    }
    for (int64_t j = 0; j < padded; j += kTileRows) {
      VecF<L> x[kTileRows][V];
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          x[r][v] = exp2<L, Dot::kExpDegree>(load<L>(logits + ((j + r) * V + v) * L) - top[v]);
          if (p.row_sq) squares[v] += x[r][v] * x[r][v];
        }
      Scalar* tile = weights + j / Dot::kPerScalar * lanes;
      store_steps<Dot, V>(tile, x);
      add_weights<Dot, V>(total, tile);
    }
    const bool twice = padded <= 8;  // so few steps are left then that a line each would not fetch the whole head
    float inverse[lanes];
    write_statistics<V>(p, s, h, queries, 0, count, top, total, squares, inverse);

    T* to = head_of<T>(p.out, s, h);
    const int32_t* place = p.out_by_row ? queries.row : queries.slot;
    const int64_t vectors = round_up(p.value_width, L) / L, steps = padded / Dot::kPerScalar;
    for (int64_t i = 0; i < count; i += kTileRows)
      for (int64_t c = 0; c < vectors; c += 2)
        with_vectors(smaller(2, vectors - c), [&](auto n) {
          constexpr int W = decltype(n)::value;
          VecF<L> sums[kTileRows][W];
          clear<L>(sums);
          multiply_tile<Dot, L, kTileRows, W>(weights + i, 1, lanes, v_data + c * L, v_step, steps, sums, [&] {
            ahead.line();
            if (twice) ahead.line();
          });
          for (int r = 0; r < smaller(kTileRows, count - i); ++r)
            for (int w = 0; w < W; ++w)
              write<L>(to + place[i + r] * p.out.row, (c + w) * L, p.value_width, sums[r][w] * inverse[i + r], p.past_caches);
        });
    forward_empty_slots<T>(p, s, h);
  }
};

template <class T, class Dot>
void forward_short_heads(const SparseAttention& p, int64_t first, int64_t last, char* scratch) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t s = i / p.query_heads, h = i % p.query_heads, next = smaller(i + 1, last - 1);
    const int64_t vectors = query_vectors(p.queries.at(s, h).count);
    with_vectors(vectors ? vectors : 1, [&](auto vectors) {
      Arena arena{scratch};
      ShortHead<T, Dot, decltype(vectors)::value>(arena, p).run(p, s, h, next / p.query_heads, next % p.query_heads);
    });
  }
  stream_fence();
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
