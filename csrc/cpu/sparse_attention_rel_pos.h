// rel_pos: where keys lie on their grid, the terms that a block of queries adds by row and by column of it, and their gradients.
#pragma once

#include "sparse_attention_tiles.h"
#include "storage_types.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

// the cells of keys [first, first + count) of a list; rows that fill up the last tile lie in the first cell
struct RelKeys {
  int32_t *row, *column;

  RelKeys(Arena& arena, const SparseAttention& p, int64_t keys) {
    const int64_t padded = p.rel_h.data ? round_up(keys, kTileRows) : 0;
    row = arena.take<int32_t>(padded);
    column = arena.take<int32_t>(padded);
  }

  void pack(const SparseAttention& p, const RowList& keys, int64_t first, int64_t count) {
    if (!p.rel_h.data) return;
    const int32_t width = (int32_t)p.rel_width;
    for (int64_t j = 0; j < round_up(count, kTileRows); ++j) {
      const int32_t rank = j < count ? keys.rank[first + j] : 0;
      row[j] = rank / width;
      column[j] = rank % width;
    }
  }
};

// [cell][lane] in units of log2; lanes without a query repeat the last one
template <class R>
void pack_rel_lanes(float* to, int64_t vectors, const Rows<R>& rows, int64_t cells) {
  pack_lanes<FloatDot>(to, vectors, rows, cells, Fill::last_row);
  for (int64_t i = 0; i < cells * vectors * L; i += L) {
    // as to_log2: what is finite stays finite
    const VecF<L> natural = load<L>(to + i), scaled = natural * kLog2e;
    store<L>(to + i, (scaled < kLowest) & (natural >= kLowest) ? splat<L>(kLowest) : scaled);
  }
}

struct RelQueries {
  float *height, *width;  // [gh][lane], [gw][lane]

  RelQueries(Arena& arena, const SparseAttention& p, int64_t lanes) {
    height = arena.take<float>(p.rel_height * lanes);
    width = arena.take<float>(p.rel_width * lanes);
  }

  // `row` of the query grid, `count` of them
  RelTerms pack(const SparseAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t count, int64_t vectors,
                const RelKeys& keys) const {
    if (!p.rel_h.data || count == 0) return {};
    with_types(p.rel_storage, [&]<class R, class Dot>(Types<R, Dot>) {
      pack_rel_lanes(height, vectors, rows_of<R>(p.rel_h, s, h, row, count), p.rel_height);
      pack_rel_lanes(width, vectors, rows_of<R>(p.rel_w, s, h, row, count), p.rel_width);
    });
    return {height, width, keys.row, keys.column};
  }
};

// what a block of queries finds for its rel_pos: slopes of the logits summed over the keys of each row and each column
struct RelSlopes {
  float *height, *width;  // [gh][lane], [gw][lane]

  RelSlopes(Arena& arena, const SparseAttention& p, int64_t lanes) {
    const bool wanted = p.wants_rel();
    height = arena.take<float>(wanted ? p.rel_height * lanes : 0);
    width = arena.take<float>(wanted ? p.rel_width * lanes : 0);
  }

  void clear(const SparseAttention& p, int64_t lanes) {
    memset(height, 0, p.rel_height * lanes * sizeof(float));
    memset(width, 0, p.rel_width * lanes * sizeof(float));
  }

  template <int V>
  TOKENOPS_INLINE void add(const RelTerms& at, const VecF<L> (&slope)[kTileRows][V]) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        float *down = height + (at.row[r] * V + v) * L, *across = width + (at.column[r] * V + v) * L;
        store<L>(down, load<L>(down) + slope[r][v]);
        store<L>(across, load<L>(across) + slope[r][v]);
      }
  }

  void write(const SparseAttention& p, int64_t s, int64_t h, const RowList& queries, int64_t first, int64_t count, int64_t vectors,
             float* part) const {
    float ones[kTileVectors * L];
    for (float& one : ones) one = 1.f;
    if (part) {
      // beside the gradient of the query itself
      unpack_lanes(part + p.width, p.part_row, queries.slot + first, count, height, vectors, ones, p.rel_height, false);
      unpack_lanes(part + p.width + p.rel_height, p.part_row, queries.slot + first, count, width, vectors, ones, p.rel_width, false);
      return;
    }
    with_types(p.rel_storage, [&]<class R, class Dot>(Types<R, Dot>) {
      if (p.grad_rel_h.data)
        unpack_lanes(head_of<R>(p.grad_rel_h, s, h), p.grad_rel_h.row, queries.row + first, count, height, vectors, ones, p.rel_height,
                     false);
      if (p.grad_rel_w.data)
        unpack_lanes(head_of<R>(p.grad_rel_w, s, h), p.grad_rel_w.row, queries.row + first, count, width, vectors, ones, p.rel_width,
                     false);
    });
  }

  // rows that no list names
  static void write_rest(const SparseAttention& p, int64_t s, int64_t h, const RowList& queries) {
    with_types(p.rel_storage, [&]<class R, class Dot>(Types<R, Dot>) {
      if (p.grad_rel_h.data) zero_rows(head_of<R>(p.grad_rel_h, s, h), p.grad_rel_h.row, queries.rest, queries.rests, p.rel_height);
      if (p.grad_rel_w.data) zero_rows(head_of<R>(p.grad_rel_w, s, h), p.grad_rel_w.row, queries.rest, queries.rests, p.rel_width);
    });
  }
};

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
