// What the passes of attention share: logits of a tile, masks, tiles as operands, statistics, the walk over blocks of queries.
//
// Queries stand in lanes: a block of 1 to 3 vectors of queries attends to all keys of its head, 96 keys at a time. Logits
// come out as S^T[key][query], so the row maximum and sum are vertical, P feeds the product with V as it is, and K and V are
// only ever read as broadcast scalars: they need no transpose, and packing them absorbs the gather.
#pragma once

#include "pack.h"
#include "sparse_attention.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

constexpr int L = kLanes;
constexpr int64_t kKeyBlock = 96;  // flat from 48 to 128; a multiple of every tile height and of a bf16 pair
constexpr float kLowest = -3.402823466e38f, kInfinity = __builtin_inff();
constexpr float kLazy = 8.f;

int64_t query_vectors(int64_t queries) { return (queries + L - 1) / L; }
// at least one block, so that a list without rows still gets its empty slots written
int64_t query_blocks(int64_t queries) { return queries ? (query_vectors(queries) + kTileVectors - 1) / kTileVectors : 1; }
// the first query of a block; vectors are dealt evenly
int64_t block_start(int64_t queries, int64_t block) { return smaller(query_vectors(queries) * block / query_blocks(queries) * L, queries); }

// natural units to units of log2; a finite bias stays finite, so that a row of the lowest float is not an empty row
TOKENOPS_INLINE float to_log2(float bias) {
  float scaled = bias * kLog2e;
  return scaled < kLowest && bias >= kLowest ? kLowest : scaled;
}

template <class T>
T* head_of(const Grid& grid, int64_t s, int64_t h) {
  return (T*)grid.data + s * grid.sequence + h * grid.head;
}

template <class T>
Rows<T> rows_of(const Grid& grid, int64_t s, int64_t h, const int32_t* row, int64_t count) {
  return {head_of<T>(grid, s, h), grid.row, row, count};
}

float mask_value(const SparseAttention& p, int64_t at) {
  switch (p.mask) {
    case Mask::none: return 0.f;
    case Mask::boolean: return ((const uint8_t*)p.mask_data)[at] ? 0.f : -kInfinity;
    case Mask::f32: return to_log2(((const float*)p.mask_data)[at]);
    case Mask::bf16: return to_log2(bf16_to_float(((const bf16*)p.mask_data)[at].bits));
    case Mask::f16: return to_log2(half_to_float(((const f16*)p.mask_data)[at].bits));
  }
  return 0.f;
}

enum class Visible { nothing, partly, all };

// What attn_mask and causality add to the logits of queries [first, last) and keys [from, to): added[key][lane], in units of
// log2. Left alone if all or nothing of the block is visible. Rows that fill up the last tile are hidden by the key bias.
inline Visible fill_mask(float* added, const SparseAttention& p, int64_t s, int64_t h, const RowList& queries, int64_t first, int64_t last,
                         const RowList& keys, int64_t from, int64_t to, int64_t lanes) {
  const int32_t *q_rank = queries.rank + first, *k_rank = keys.rank + from;
  const int64_t count = last - first, size = to - from;
  bool compare = false;
  if (p.causal) {
    int32_t q_low = q_rank[0], q_high = q_low, k_low = k_rank[0], k_high = k_low;
    for (int64_t i = 1; i < count; ++i) {
      q_low = q_rank[i] < q_low ? q_rank[i] : q_low;
      q_high = q_rank[i] > q_high ? q_rank[i] : q_high;
    }
    for (int64_t j = 1; j < size; ++j) {
      k_low = k_rank[j] < k_low ? k_rank[j] : k_low;
      k_high = k_rank[j] > k_high ? k_rank[j] : k_high;
    }
    if (k_low > q_high) return Visible::nothing;
    compare = k_high > q_low;
  }
  if (!compare && p.mask == Mask::none) return Visible::all;
  memset(added, 0, round_up(size, kTileRows) * lanes * sizeof(float));
  if (compare)
    for (int64_t j = 0; j < size; ++j)
      for (int64_t i = 0; i < count; ++i) added[j * lanes + i] = k_rank[j] > q_rank[i] ? -kInfinity : 0.f;
  if (p.mask != Mask::none)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t base = s * p.mask_sequence + h * p.mask_head + queries.row[first + i] * p.mask_row;
      for (int64_t j = 0; j < size; ++j) added[j * lanes + i] += mask_value(p, base + keys.row[from + j] * p.mask_column);
    }
  return Visible::partly;
}

// kv_bias of the listed keys in units of log2, then -inf for the rows that fill up the last tile; null if that is all zeros
inline const float* pack_bias(float* to, const SparseAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t keys, int64_t padded) {
  if (!p.bias && keys == padded) return nullptr;
  for (int64_t j = 0; j < keys; ++j) to[j] = p.bias ? to_log2(p.bias[s * p.bias_sequence + h * p.bias_head + row[j] * p.bias_row]) : 0.f;
  for (int64_t j = keys; j < padded; ++j) to[j] = -kInfinity;
  return to;
}

// what rel_pos adds to the logits of a block of queries: height[row[key]][lane] + width[column[key]][lane], in units of log2. Or null.
struct RelTerms {
  const float *height = nullptr, *width = nullptr;
  const int32_t *row = nullptr, *column = nullptr;

  TOKENOPS_INLINE RelTerms from(int64_t key) const { return height ? RelTerms{height, width, row + key, column + key} : RelTerms{}; }
};

// S^T of one tile of keys in units of log2
template <class Dot, int V, class Also = Nothing>
TOKENOPS_INLINE void logit_tile(const typename Dot::Scalar* keys, int64_t key_row, int64_t scalars, const typename Dot::Scalar* query_lanes,
                                float scale, const float* bias, const float* added, const RelTerms& rel, VecF<L> (&s)[kTileRows][V],
                                Also&& also = {}) {
  clear<L>(s);
  multiply_tile<Dot, L, kTileRows, V>(keys, key_row, 1, query_lanes, V * L, scalars, s, also);
  if (rel.height)
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        // the sum with the scaled product is one instruction, as the scaling alone is
        s[r][v] = s[r][v] * scale + load<L>(rel.width + (rel.column[r] * V + v) * L);
        s[r][v] += load<L>(rel.height + (rel.row[r] * V + v) * L);
      }
  else
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) s[r][v] *= scale;
  if (bias)
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) s[r][v] += bias[r];
  if (added)
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) s[r][v] += load<L>(added + (r * V + v) * L);
}

// a tile as the vector side of a product over its keys: to[key / kPerScalar][lane]
template <class Dot, int V>
TOKENOPS_INLINE void store_steps(typename Dot::Scalar* to, const VecF<L> (&x)[kTileRows][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; r += Dot::kPerScalar)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      if constexpr (Dot::kPerScalar == 1)
        store<L>(to + (r * V + v) * L, x[r][v]);
      else
        store_bits(to + (r / 2 * V + v) * L, interleave_bf16(x[r][v], x[r + 1][v]));
}

// the denominator sums the weights of a tile as the product will read them, rounded if they are
template <class Dot, int V>
TOKENOPS_INLINE void add_weights(VecF<L> (&total)[V], const typename Dot::Scalar* tile) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows / Dot::kPerScalar; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) total[v] = Dot::template multiply_add<L>(Dot::kOne, load_bits<VecF<L>>(tile + (r * V + v) * L), total[v]);
}

// a tile as the broadcast side of a product over its lanes: to[key][lane / kPerScalar]
template <class Dot, int V>
TOKENOPS_INLINE void store_rows(typename Dot::Scalar* to, const VecF<L> (&x)[kTileRows][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      if constexpr (Dot::kPerScalar == 1)
        store<L>(to + (r * V + v) * L, x[r][v]);
      else
        store_bits(to + (r * V + v) * L / 2, to_bf16<L>(x[r][v]));
}

// lse and row_sq of queries [first, last) from their running maximum and sums; 1 / sum, or 0 for a row without visible keys
template <int V>
TOKENOPS_INLINE void write_statistics(const SparseAttention& p, int64_t s, int64_t h, const RowList& queries, int64_t first, int64_t last,
                                      const VecF<L> (&top)[V], const VecF<L> (&total)[V], const VecF<L> (&squares)[V], float* inverse) {
  float lse[V * L], row_sq[V * L];
  for (int v = 0; v < V; ++v) {
    const VecF<L> by = total[v] == 0.f ? VecF<L>{} : 1.f / total[v];
    store<L>(inverse + v * L, by);
    // what to_log2 clamped to the lowest float stays the lowest float; a sum that is NaN stays NaN
    const VecF<L> natural = (top[v] == kLowest) & (total[v] == total[v]) ? top[v] : (top[v] + log2<L>(total[v])) * kLn2;
    store<L>(lse + v * L, total[v] == 0.f ? splat<L>(-kInfinity) : natural);
    store<L>(row_sq + v * L, squares[v] * by * by);
  }
  const int64_t at = s * p.stat_sequence + h * p.stat_head;
  const int32_t* slot = queries.slot + first;
  for (int64_t i = 0; i < last - first; ++i) p.lse[at + slot[i]] = lse[i];
  if (p.row_sq)
    for (int64_t i = 0; i < last - first; ++i) p.row_sq[at + slot[i]] = row_sq[i];
}

// calls f(query head, first query, last query) for the blocks [first_block, last_block) of a head, counted through its group
template <class F>
void for_query_blocks(const SparseAttention& p, int64_t s, int64_t kv_head, int64_t first_block, int64_t last_block, F&& f) {
  int64_t before = 0;
  for (int64_t h = kv_head * p.group(); h < (kv_head + 1) * p.group(); ++h) {
    const int64_t count = p.queries.at(s, h).count, blocks = query_blocks(count);
    for (int64_t i = 0; i < blocks; ++i)
      if (before + i >= first_block && before + i < last_block) f(h, block_start(count, i), block_start(count, i + 1));
    before += blocks;
  }
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
