// delta_attention, mode "exact": rows whose query did not change let the changed keys go and come; the others are computed afresh.
#pragma once

#include "delta_matmul_attention.h"
#include "sparse_attention_rel_pos.h"
#include "sparse_attention_sums.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

// keys and values as the tile products read them, and where they lie on the grid of cells
template <class Dot>
struct KeyPanel {
  typedef typename Dot::Scalar Scalar;
  Scalar *rows, *steps;  // [key][D / kPerScalar], [key / kPerScalar][Dv]
  float* bias;           // hides the rows that fill up the last tile
  RelKeys place;
  int64_t padded, width, value_width;

  KeyPanel(Arena& arena, const SparseAttention& p, int64_t keys)
      : place(arena, p, keys), padded(round_up(keys, kTileRows)), width(p.width / Dot::kPerScalar), value_width(p.value_width) {
    rows = arena.take<Scalar>(padded * width);
    steps = arena.take<Scalar>(padded / Dot::kPerScalar * value_width);
    bias = arena.take<float>(padded);
  }

  // without values (null) the panel is for counting only
  template <class T>
  void pack(const SparseAttention& p, const RowList& list, const T* key, int64_t key_row, const T* value, int64_t value_row) {
    pack_rows<Dot>(rows, width, Rows<T>{key, key_row, list.row, list.count}, padded, p.width, Fill::last_row);
    if (value) pack_steps<Dot>(steps, value_width, Rows<T>{value, value_row, list.row, list.count}, padded, value_width);
    place.pack(p, list, 0, list.count);
    pack_bias(bias, p, 0, 0, list.row, list.count, padded);
  }

  // `rel` may have been made for the places of another panel
  template <Terms kTerms, int V>
  void take(RowSums<Dot, V>& sums, float scale, RelTerms rel, int64_t count) const {
    rel.row = place.row, rel.column = place.column;
    for (int64_t block = 0; block < padded; block += kKeyBlock)
      sums.template take<kTerms>(rows + block * width, steps + block / Dot::kPerScalar * value_width, smaller(kKeyBlock, padded - block),
                                 scale, count == padded ? nullptr : bias + block, nullptr, false, rel.from(block));
  }
};

// the sums of a block of rows, from and to the state
template <class T, class Dot, int V>
struct ExactBlock {
  static constexpr int lanes = V * L;
  RowSums<Dot, V> sums;
  RelQueries rel_pos;
  VecF<L> peak[V];

  ExactBlock(Arena& arena, const SparseAttention& p) : sums(arena, p.width, p.value_width), rel_pos(arena, p, lanes) {}

  RelTerms start(const DeltaAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t count, const KeyPanel<Dot>& panel) {
    const SparseAttention& grids = p.grids;
    pack_lanes<Dot>(sums.query, V, rows_of<T>(grids.query, s, h, row, count), grids.width, Fill::zeros);
    return rel_pos.pack(grids, s, h, row, count, V, panel.place);
  }

  void load_sums(const DeltaAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t count) {
    const int64_t base = p.head(s, h) * p.tokens;
    pack_lanes<FloatDot>(sums.values, V, Rows<float>{p.output + base * p.grids.value_width, p.grids.value_width, row, count},
                         p.grids.value_width, Fill::zeros);
    float top[lanes] = {}, total[lanes] = {}, most[lanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      top[i] = p.maximum[base + row[i]];
      total[i] = p.total[base + row[i]];
      most[i] = p.peak[base + row[i]];
    }
    for (int v = 0; v < V; ++v) {
      sums.top[v] = load<L>(top + v * L);
      sums.total[v] = load<L>(total + v * L);
      sums.squares[v] = VecF<L>{};
      peak[v] = load<L>(most + v * L);
    }
  }

  void store_sums(const DeltaAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t count) const {
    const SparseAttention& grids = p.grids;
    const int64_t base = p.head(s, h) * p.tokens;
    float top[lanes], total[lanes], most[lanes], inverse[lanes], ones[lanes];
    for (int v = 0; v < V; ++v) {
      store<L>(top + v * L, sums.top[v]);
      store<L>(total + v * L, sums.total[v]);
      store<L>(most + v * L, peak[v]);
      store<L>(inverse + v * L, sums.total[v] == 0.f ? VecF<L>{} : 1.f / sums.total[v]);
      store<L>(ones + v * L, splat<L>(1.f));
    }
    for (int64_t i = 0; i < count; ++i) {
      p.maximum[base + row[i]] = top[i];
      p.total[base + row[i]] = total[i];
      p.peak[base + row[i]] = most[i];
    }
    unpack_lanes(p.output + base * grids.value_width, grids.value_width, row, count, sums.values, V, ones, grids.value_width,
                 grids.past_caches);
    unpack_lanes(head_of<T>(grids.out, s, h), grids.out.row, row, count, sums.values, V, inverse, grids.value_width, grids.past_caches);
  }

  void advance(const DeltaAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t count, const KeyPanel<Dot>& gone,
               const KeyPanel<Dot>& come) {
    const float scale = p.grids.scale * kLog2e;
    const int64_t changed = p.lists[s].cells.count;
    const RelTerms rel = start(p, s, h, row, count, gone);
    load_sums(p, s, h, row, count);
    VecF<L> before[V];
    for (int v = 0; v < V; ++v) before[v] = sums.top[v];
    gone.template take<Terms::subtracted>(sums, scale, rel, changed);
    come.template take<Terms::added>(sums, scale, rel, changed);
    VecI<L> finite[V];
    for (int v = 0; v < V; ++v) {
      peak[v] = max(peak[v] * exp2<L, 5>(before[v] - sums.top[v]), sums.total[v]);
      // NaN fails every comparison
      finite[v] = (sums.total[v] >= p.guard * peak[v]) & (sums.total[v] > 0.f);
    }
    for (int64_t c = 0; c < p.grids.value_width; ++c)
      for (int v = 0; v < V; ++v) {
        const VecF<L> x = load<L>(sums.values + c * lanes + v * L);
        finite[v] &= x - x == 0.f;
      }
    int32_t sound[lanes];
    for (int v = 0; v < V; ++v) store_bits(sound + v * L, finite[v]);
    uint8_t* again = p.again + p.head(s, h) * p.tokens;
    for (int64_t i = 0; i < count; ++i) again[row[i]] = !sound[i];
    store_sums(p, s, h, row, count);
  }

  void afresh(const DeltaAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t count, const KeyPanel<Dot>& panel) {
    const RelTerms rel = start(p, s, h, row, count, panel);
    sums.clear();
    panel.template take<Terms::added>(sums, p.grids.scale * kLog2e, rel, p.cells);
    for (int v = 0; v < V; ++v) peak[v] = sums.total[v];
    store_sums(p, s, h, row, count);
  }
};

// calls f(vectors as a constant, first row of the list, rows) for some of the blocks of a list
template <class F>
void for_blocks(const RowList& rows, int64_t first_block, int64_t last_block, F&& f) {
  for (int64_t i = first_block; i < last_block; ++i) {
    const int64_t first = block_start(rows.count, i), count = block_start(rows.count, i + 1) - first;
    with_vectors(query_vectors(count), [&](auto vectors) { f(vectors, rows.row + first, count); });
  }
}

template <class T, class Dot>
void advance_rows(const DeltaAttention& p, int64_t s, int64_t h, int64_t first_block, int64_t last_block, bool packed, char* scratch) {
  const SparseAttention& grids = p.grids;
  const DeltaLists& lists = p.lists[s];
  Arena arena{scratch};
  KeyPanel<Dot> gone(arena, grids, lists.cells.count), come(arena, grids, lists.cells.count);
  if (!packed) {
    const int64_t base = p.head(s, h) * p.cells;
    gone.pack(grids, lists.cells, (const T*)p.old_key + base * grids.width, grids.width, (const T*)p.old_value + base * grids.value_width,
              grids.value_width);
    come.pack(grids, lists.cells, head_of<const T>(grids.key, s, h), grids.key.row, head_of<const T>(grids.value, s, h), grids.value.row);
  }
  for_blocks(lists.kept, first_block, last_block, [&](auto vectors, const int32_t* row, int64_t count) {
    Arena behind_keys = arena;
    ExactBlock<T, Dot, decltype(vectors)::value>(behind_keys, grids).advance(p, s, h, row, count, gone, come);
  });
  stream_fence();
}

template <class T, class Dot>
void afresh_rows(const DeltaAttention& p, int64_t s, int64_t h, const RowList& rows, int64_t first_block, int64_t last_block, bool packed,
                 char* scratch) {
  const SparseAttention& grids = p.grids;
  Arena arena{scratch};
  KeyPanel<Dot> panel(arena, grids, p.cells);
  if (!packed)
    panel.pack(grids, p.lists[s].every, head_of<const T>(grids.key, s, h), grids.key.row, head_of<const T>(grids.value, s, h),
               grids.value.row);
  for_blocks(rows, first_block, last_block, [&](auto vectors, const int32_t* row, int64_t count) {
    Arena behind_keys = arena;
    ExactBlock<T, Dot, decltype(vectors)::value>(behind_keys, grids).afresh(p, s, h, row, count, panel);
  });
  stream_fence();
}

template <class T, class Dot>
int64_t exact_bytes(const DeltaAttention& p, int64_t keys) {
  Arena arena{nullptr};
  KeyPanel<Dot>(arena, p.grids, keys), KeyPanel<Dot>(arena, p.grids, keys);
  ExactBlock<T, Dot, kTileVectors>(arena, p.grids);
  return arena.used;
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
