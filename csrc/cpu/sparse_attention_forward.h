// Attention over gathered rows, forward: a block of queries against all keys of its head, 96 at a time.
#pragma once

#include "sparse_attention_rel_pos.h"
#include "sparse_attention_sums.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

template <class Dot>
struct ForwardKeys {
  typedef typename Dot::Scalar Scalar;
  Scalar *rows, *value_steps;  // [key][D / kPerScalar], [key / kPerScalar][Dv]
  float* bias;
  RelKeys cells;

  ForwardKeys(Arena& arena, const SparseAttention& p, int64_t keys) : cells(arena, p, keys) {
    const int64_t padded = round_up(keys, kTileRows);
    rows = arena.take<Scalar>(padded * p.width / Dot::kPerScalar);
    value_steps = arena.take<Scalar>(padded / Dot::kPerScalar * p.value_width);
    bias = arena.take<float>(padded);
  }
};

template <class T, class Dot, int V>
struct ForwardBlock {
  static constexpr int lanes = V * L;
  RowSums<Dot, V> sums;
  float* added;  // [key][lane]
  RelQueries rel_pos;

  ForwardBlock(Arena& arena, const SparseAttention& p)
      : sums(arena, p.width, p.value_width), added(arena.take<float>(kKeyBlock * lanes)), rel_pos(arena, p, lanes) {}

  void run(const SparseAttention& p, int64_t s, int64_t h, int64_t first, int64_t last, const ForwardKeys<Dot>& panel, const float* bias) {
    const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, h / p.group());
    const int64_t scalars = p.width / Dot::kPerScalar, padded = round_up(keys.count, kTileRows);
    pack_lanes<Dot>(sums.query, V, rows_of<T>(p.query, s, h, queries.row + first, last - first), p.width, Fill::zeros);
    const RelTerms rel = rel_pos.pack(p, s, h, queries.row + first, last - first, V, panel.cells);
    sums.clear();
    for (int64_t block = 0; block < padded; block += kKeyBlock) {
      const int64_t size = smaller(kKeyBlock, padded - block);
      const Visible visible = fill_mask(added, p, s, h, queries, first, last, keys, block, smaller(block + size, keys.count), lanes);
      if (visible == Visible::nothing) continue;
      sums.take(panel.rows + block * scalars, panel.value_steps + block / Dot::kPerScalar * p.value_width, size, p.scale * kLog2e,
                bias ? bias + block : nullptr, visible == Visible::partly ? added : nullptr, p.row_sq != nullptr, rel.from(block));
    }
    float inverse[lanes];
    write_statistics<V>(p, s, h, queries, first, last, sums.top, sums.total, sums.squares, inverse);
    unpack_lanes(head_of<T>(p.out, s, h), p.out.row, (p.out_by_row ? queries.row : queries.slot) + first, last - first, sums.values, V,
                 inverse, p.value_width, p.past_caches);
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
    panel.cells.pack(p, keys, 0, keys.count);
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
