// Attention over gathered rows, backward: all queries of a head against a range of its keys, whose gradients nobody else adds to.
#pragma once

#include "sparse_attention_rel_pos.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

// c[row][column] += a . b over a width of whole vectors
template <class Dot>
void multiply_wide(const typename Dot::Scalar* a, int64_t a_row, const typename Dot::Scalar* b, int64_t steps, float* c, int64_t rows,
                   int64_t columns) {
  const int64_t vectors = columns / L, blocks = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t from = vectors * i / blocks;
    with_vectors(vectors * (i + 1) / blocks - from, [&](auto n) {
      multiply_block<Dot, L, decltype(n)::value>(a, a_row, 1, b + from * L, columns, steps, c + from * L, columns, rows);
    });
  }
}

template <class Dot>
struct BackwardKeys {
  typedef typename Dot::Scalar Scalar;
  Scalar *rows, *steps, *value_rows;                 // [key][D / kPerScalar], [key / kPerScalar][D], [key][Dv / kPerScalar]
  float *bias, *grad_rows, *grad_value, *grad_bias;  // [key], [key][D rounded up to vectors], [key][Dv likewise], [key]
  RelKeys cells;

  BackwardKeys(Arena& arena, const SparseAttention& p, int64_t keys) : cells(arena, p, keys) {
    const int64_t padded = round_up(keys, kTileRows);
    rows = arena.take<Scalar>(padded * p.width / Dot::kPerScalar);
    steps = Dot::kPerScalar == 1 ? rows : arena.take<Scalar>(padded / Dot::kPerScalar * p.width);
    value_rows = arena.take<Scalar>(padded * p.value_width / Dot::kPerScalar);
    bias = arena.take<float>(padded);
    grad_rows = arena.take<float>(padded * round_up(p.width, L));
    grad_value = arena.take<float>(padded * round_up(p.value_width, L));
    grad_bias = arena.take<float>(padded);
  }
};

template <class T, class Dot, int V>
struct BackwardBlock {
  typedef typename Dot::Scalar Scalar;
  static constexpr int lanes = V * L, lane_scalars = lanes / Dot::kPerScalar;
  Scalar *query, *grad_out;              // [D / kPerScalar][lane], [Dv / kPerScalar][lane]
  Scalar *query_steps, *grad_out_steps;  // [lane / kPerScalar][D rounded up to vectors], [lane / kPerScalar][Dv likewise]
  Scalar *weights, *slopes;              // P and dS as [key][lane / kPerScalar]
  Scalar* slope_steps;                   // dS as [key / kPerScalar][lane]
  float *grad_query, *added;             // [D][lane], [key][lane]
  RelQueries rel_pos;
  RelSlopes rel_slopes;

  BackwardBlock(Arena& arena, const SparseAttention& p) : rel_pos(arena, p, lanes), rel_slopes(arena, p, lanes) {
    query = arena.take<Scalar>(p.width / Dot::kPerScalar * lanes);
    grad_out = arena.take<Scalar>(p.value_width / Dot::kPerScalar * lanes);
    query_steps = arena.take<Scalar>(lane_scalars * round_up(p.width, L));
    grad_out_steps = arena.take<Scalar>(lane_scalars * round_up(p.value_width, L));
    weights = arena.take<Scalar>(kKeyBlock * lane_scalars);
    slopes = arena.take<Scalar>(kKeyBlock * lane_scalars);
    slope_steps = Dot::kPerScalar == 1 ? slopes : arena.take<Scalar>(kKeyBlock * lane_scalars);
    grad_query = arena.take<float>(p.width * lanes);
    added = arena.take<float>(kKeyBlock * lanes);
  }

  void run(const SparseAttention& p, int64_t s, int64_t h, int64_t part, int64_t first, int64_t last, int64_t first_key, int64_t last_key,
           const BackwardKeys<Dot>& panel, const float* bias) {
    const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, h / p.group());
    const int64_t scalars = p.width / Dot::kPerScalar, value_scalars = p.value_width / Dot::kPerScalar;
    const int64_t columns = round_up(p.width, L), value_columns = round_up(p.value_width, L);
    const int64_t count = last - first, padded = round_up(last_key - first_key, kTileRows);
    const float scale = p.scale * kLog2e;
    const Rows<T> query_rows = rows_of<T>(p.query, s, h, queries.row + first, count);
    const Rows<T> grad_rows = rows_of<T>(p.grad_out, s, h, queries.slot + first, count);
    pack_lanes<Dot>(query, V, query_rows, p.width, Fill::zeros);
    pack_lanes<Dot>(grad_out, V, grad_rows, p.value_width, Fill::zeros);
    pack_steps<Dot>(query_steps, columns, query_rows, lanes, p.width);
    pack_steps<Dot>(grad_out_steps, value_columns, grad_rows, lanes, p.value_width);
    memset(grad_query, 0, p.width * lanes * sizeof(float));
    const RelTerms rel = rel_pos.pack(p, s, h, queries.row + first, count, V, panel.cells);
    if (p.wants_rel()) rel_slopes.clear(p, lanes);

    float lse[lanes], delta[lanes], factor[lanes];
    const Rows<T> out_rows = rows_of<T>(p.out, s, h, queries.slot + first, count);
    for (int64_t i = 0; i < lanes; ++i) {
      factor[i] = p.scale;
      const float natural = i < count ? p.lse[s * p.stat_sequence + h * p.stat_head + queries.slot[first + i]] : -kInfinity;
      lse[i] = natural == -kInfinity ? kInfinity : to_log2(natural);  // a row without visible keys gets weights of zero
      delta[i] = i < count ? dot_rows(grad_rows.at(i), out_rows.at(i), p.value_width) : 0.f;
    }

    for (int64_t block = 0; block < padded; block += kKeyBlock) {
      const int64_t size = smaller(kKeyBlock, padded - block), from = first_key + block;
      const Visible visible = fill_mask(added, p, s, h, queries, first, last, keys, from, smaller(from + size, last_key), lanes);
      if (visible == Visible::nothing) continue;
      for (int64_t j = 0; j < size; j += kTileRows) {
        VecF<L> x[kTileRows][V], slope[kTileRows][V];
        logit_tile<Dot, V>(panel.rows + (block + j) * scalars, scalars, scalars, query, scale, bias ? bias + block + j : nullptr,
                           visible == Visible::partly ? added + j * lanes : nullptr, rel.from(block + j), x);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) {
            // huge logits: a float lse that was rounded below one of them must not make a weight of more than one
            x[r][v] = exp2<L, Dot::kExpDegree>(min(VecF<L>{}, x[r][v] - load<L>(lse + v * L)));
            slope[r][v] = VecF<L>{};
          }
        store_rows<Dot, V>(weights + j * lane_scalars, x);
        multiply_tile<Dot, L, kTileRows, V>(panel.value_rows + (block + j) * value_scalars, value_scalars, 1, grad_out, lanes,
                                            value_scalars, slope);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) slope[r][v] = x[r][v] * (slope[r][v] - load<L>(delta + v * L));
        store_rows<Dot, V>(slopes + j * lane_scalars, slope);
        if constexpr (Dot::kPerScalar > 1) store_steps<Dot, V>(slope_steps + j * lane_scalars, slope);
        if (p.wants_rel()) rel_slopes.add<V>(rel.from(block + j), slope);
        if (p.grad_bias)
          for (int r = 0; r < kTileRows; ++r) {
            VecF<L> sum = slope[r][0];
            for (int v = 1; v < V; ++v) sum += slope[r][v];
            panel.grad_bias[block + j + r] += sum_lanes(sum);
          }
      }
      if (p.grad_value.data)
        multiply_wide<Dot>(weights, lane_scalars, grad_out_steps, lane_scalars, panel.grad_value + block * value_columns, size,
                           value_columns);
      if (p.grad_key.data)
        multiply_wide<Dot>(slopes, lane_scalars, query_steps, lane_scalars, panel.grad_rows + block * columns, size, columns);
      if (p.grad_query.data)
        multiply_block<Dot, L, V>(panel.steps + block / Dot::kPerScalar * p.width, 1, p.width, slope_steps, lanes, size / Dot::kPerScalar,
                                  grad_query, lanes, p.width);
    }
    float* shares = p.grad_query_parts ? p.grad_query_parts + part * p.part_stride + s * p.part_sequence + h * p.part_head : nullptr;
    if (p.grad_query.data && shares)
      unpack_lanes(shares, p.part_row, queries.slot + first, count, grad_query, V, factor, p.width, false);
    else if (p.grad_query.data)
      unpack_lanes(head_of<T>(p.grad_query, s, h), p.grad_query.row, queries.row + first, count, grad_query, V, factor, p.width,
                   p.past_caches);
    if (p.wants_rel()) rel_slopes.write(p, s, h, queries, first, count, V, shares);
  }
};

template <class T, class Dot>
void backward_head(const SparseAttention& p, int64_t s, int64_t kv_head, int64_t part, int64_t first_key, int64_t last_key, char* scratch) {
  const RowList& keys = p.keys.at(s, kv_head);
  const int32_t* row = keys.row + first_key;
  const int64_t count = last_key - first_key, padded = round_up(count, kTileRows);
  const int64_t columns = round_up(p.width, L), value_columns = round_up(p.value_width, L);
  Arena arena{scratch};
  BackwardKeys<Dot> panel(arena, p, count);
  const Rows<T> key_rows = rows_of<T>(p.key, s, kv_head, row, count);
  pack_rows<Dot>(panel.rows, p.width / Dot::kPerScalar, key_rows, padded, p.width, Fill::last_row);
  if constexpr (Dot::kPerScalar > 1) pack_steps<Dot>(panel.steps, p.width, key_rows, padded, p.width);
  pack_rows<Dot>(panel.value_rows, p.value_width / Dot::kPerScalar, rows_of<T>(p.value, s, kv_head, row, count), padded, p.value_width,
                 Fill::zeros);
  const float* bias = pack_bias(panel.bias, p, s, kv_head, row, count, padded);
  panel.cells.pack(p, keys, first_key, count);
  memset(panel.grad_rows, 0, padded * columns * sizeof(float));
  memset(panel.grad_value, 0, padded * value_columns * sizeof(float));
  memset(panel.grad_bias, 0, padded * sizeof(float));

  for_query_blocks(p, s, kv_head, 0, INT64_MAX, [&](int64_t h, int64_t first, int64_t last) {
    with_vectors(query_vectors(last - first), [&](auto vectors) {
      Arena behind_keys = arena;
      BackwardBlock<T, Dot, decltype(vectors)::value>(behind_keys, p).run(p, s, h, part, first, last, first_key, last_key, panel, bias);
    });
    const RowList& queries = p.queries.at(s, h);
    if (first != 0 || part != 0) return;
    if (p.grad_query.data) zero_rows(head_of<T>(p.grad_query, s, h), p.grad_query.row, queries.rest, queries.rests, p.width);
    if (p.wants_rel()) RelSlopes::write_rest(p, s, h, queries);
  });

  const bool whole = part == 0;  // the first part also writes the rows that no list names
  if (p.grad_key.data) {
    T* to = head_of<T>(p.grad_key, s, kv_head);
    unpack_rows(to, p.grad_key.row, row, count, panel.grad_rows, columns, p.scale, p.width, p.past_caches);
    if (whole) zero_rows(to, p.grad_key.row, keys.rest, keys.rests, p.width);
  }
  if (p.grad_value.data) {
    T* to = head_of<T>(p.grad_value, s, kv_head);
    unpack_rows(to, p.grad_value.row, row, count, panel.grad_value, value_columns, 1.f, p.value_width, p.past_caches);
    if (whole) zero_rows(to, p.grad_value.row, keys.rest, keys.rests, p.value_width);
  }
  if (p.grad_bias) {
    float* to = p.grad_bias + s * p.grad_bias_sequence + kv_head * p.grad_bias_head;
    for (int64_t j = 0; j < count; ++j) to[row[j]] = panel.grad_bias[j];
    if (whole)
      for (int64_t j = 0; j < keys.rests; ++j) to[keys.rest[j]] = 0.f;
  }
  stream_fence();
}

template <class T, class Dot>
int64_t backward_bytes(const SparseAttention& p, int64_t keys) {
  Arena arena{nullptr};
  BackwardKeys<Dot>(arena, p, keys);
  BackwardBlock<T, Dot, kTileVectors>(arena, p);
  return arena.used;
}

// adds up columns [first, first + width) of what the parts of a head found for its queries, in their order
template <class T>
void sum_columns(const SparseAttention& p, int64_t s, int64_t h, int64_t parts, const Grid& grid, int64_t first, int64_t width) {
  const RowList& queries = p.queries.at(s, h);
  const float* from = p.grad_query_parts + s * p.part_sequence + h * p.part_head + first;
  T* to = head_of<T>(grid, s, h);
  for (int64_t i = 0; i < queries.count; ++i)
    for (int64_t c = 0; c < width; c += L) {
      const float* share = from + queries.slot[i] * p.part_row + c;
      const int64_t columns = smaller(L, width - c);
      VecF<L> sum{};
      for (int64_t part = 0; part < parts; ++part, share += p.part_stride)
        sum += columns == L ? load<L>(share) : load_first<L>(share, columns);
      write<L>(to + queries.row[i] * grid.row, c, width, sum, p.past_caches);
    }
}

template <class T>
void sum_query_parts(const SparseAttention& p, int64_t s, int64_t h, int64_t parts) {
  if (p.grad_query.data) sum_columns<T>(p, s, h, parts, p.grad_query, 0, p.width);
  with_types(p.rel_storage, [&]<class R, class Dot>(Types<R, Dot>) {
    if (p.grad_rel_h.data) sum_columns<R>(p, s, h, parts, p.grad_rel_h, p.width, p.rel_height);
    if (p.grad_rel_w.data) sum_columns<R>(p, s, h, parts, p.grad_rel_w, p.width + p.rel_height, p.rel_width);
  });
  stream_fence();
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
