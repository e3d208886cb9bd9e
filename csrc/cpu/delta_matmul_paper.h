// delta_attention, mode "paper": columns of the attention matrix are renewed where their key changed, and the result with them.
#pragma once

#include "delta_matmul_exact.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

// n elements of a row, between what is stored and float
void to_floats(Storage storage, const void* from, float* to, int64_t n) {
  with_types(storage, [&]<class S, class Dot>(Types<S, Dot>) {
    int64_t i = 0;
    for (; i + L <= n; i += L) store<L>(to + i, load<L>((const S*)from + i));
    if (i < n) store_first<L>(to + i, load_first<L>((const S*)from + i, n - i), n - i);
  });
}
void from_floats(Storage storage, const float* from, void* to, int64_t n) {
  with_types(storage, [&]<class S, class Dot>(Types<S, Dot>) {
    int64_t i = 0;
    for (; i + L <= n; i += L) store<L>((S*)to + i, load<L>(from + i));
    if (i < n) store_first<L>((S*)to + i, load_first<L>(from + i, n - i), n - i);
  });
}
char* element(void* data, Storage storage, int64_t at) { return (char*)data + at * bytes_of(storage); }

// The keys of a head that changed, for the columns of the attention matrix that are renewed.
template <class Dot>
struct ChangedPanel {
  typedef typename Dot::Scalar Scalar;
  Scalar* rows;        // [key][D / kPerScalar]
  float *come, *gone;  // [key][Dv], values of this frame as they are stored, and of the last one
  float* bias;
  RelKeys place;
  int64_t padded;

  ChangedPanel(Arena& arena, const SparseAttention& p, int64_t keys) : place(arena, p, keys), padded(round_up(keys, kTileRows)) {
    rows = arena.take<Scalar>(padded * p.width / Dot::kPerScalar);
    come = arena.take<float>(padded * p.value_width);
    gone = arena.take<float>(padded * p.value_width);
    bias = arena.take<float>(padded);
  }

  template <class T>
  void pack(const DeltaAttention& p, int64_t s, int64_t h) {
    const SparseAttention& grids = p.grids;
    const RowList& list = p.lists[s].cells;
    const int64_t width = grids.value_width, base = p.head(s, h) * p.cells;
    pack_rows<Dot>(rows, grids.width / Dot::kPerScalar, rows_of<T>(grids.key, s, h, list.row, list.count), padded, grids.width,
                   Fill::last_row);
    const Rows<T> values = rows_of<T>(grids.value, s, h, list.row, list.count);
    memset(come, 0, padded * width * sizeof(float));
    memset(gone, 0, padded * width * sizeof(float));
    for (int64_t j = 0; j < list.count; ++j) {
      float* value = come + j * width;
      char stored[256 * sizeof(float)];
      to_floats(grids.storage, values.at(j), value, width);
      from_floats(p.stored, value, stored, width);
      to_floats(p.stored, stored, value, width);
      if (!p.first) to_floats(p.stored, element(p.old_value, p.stored, (base + list.row[j]) * width), gone + j * width, width);
    }
    place.pack(grids, list, 0, list.count);
    pack_bias(bias, grids, 0, 0, list.row, list.count, padded);
  }
};

template <class T, class Dot, int V>
struct PaperBlock {
  static constexpr int lanes = V * L;
  ExactBlock<T, Dot, V> exact;
  float *after, *before;  // [key][lane], columns of the matrix as they are now and, negated, as they were

  PaperBlock(Arena& arena, const SparseAttention& p)
      : exact(arena, p), after(arena.take<float>(kKeyBlock * lanes)), before(arena.take<float>(kKeyBlock * lanes)) {}

  // rows [first, first + count) of the grid
  void run(const DeltaAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t count, const KeyPanel<Dot>& all,
           const ChangedPanel<Dot>& changed) {
    const SparseAttention& grids = p.grids;
    const RowList& list = p.lists[s].cells;
    const int64_t width = grids.value_width, scalars = grids.width / Dot::kPerScalar, base = p.head(s, h);
    const float scale = grids.scale * kLog2e;
    RowSums<Dot, V>& sums = exact.sums;
    RelTerms rel = exact.start(p, s, h, row, count, all);
    sums.clear();
    all.template take<Terms::counted>(sums, scale, rel, p.cells);
    VecF<L> inverse[V];
    for (int v = 0; v < V; ++v) inverse[v] = sums.total[v] == 0.f ? VecF<L>{} : 1.f / sums.total[v];

    float* output = p.output + base * p.tokens * width;
    if (!p.first) pack_lanes<FloatDot>(sums.values, V, Rows<float>{output, width, row, count}, width, Fill::zeros);
    memset(before, 0, kKeyBlock * lanes * sizeof(float));
    rel.row = changed.place.row, rel.column = changed.place.column;
    for (int64_t block = 0; block < changed.padded; block += kKeyBlock) {
      const int64_t size = smaller(kKeyBlock, changed.padded - block);
      for (int64_t j = 0; j < size; j += kTileRows) {
        VecF<L> x[kTileRows][V];
        logit_tile<Dot, V>(changed.rows + (block + j) * scalars, scalars, scalars, sums.query, scale,
                           list.count == changed.padded ? nullptr : changed.bias + block + j, nullptr, rel.from(block + j), x);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) store<L>(after + ((j + r) * V + v) * L, exp2<L, Dot::kExpDegree>(x[r][v] - sums.top[v]) * inverse[v]);
      }
      for (int64_t j = 0; j < smaller(size, list.count - block); ++j) {
        float *now = after + j * lanes, *then = before + j * lanes;
        char* column = element(p.probability, p.stored, (base * p.cells + list.row[block + j]) * p.tokens + row[0]);
        if (!p.first) {
          to_floats(p.stored, column, then, count);
          for (int64_t i = 0; i < count; ++i) then[i] = -then[i];
        }
        from_floats(p.stored, now, column, count);
        to_floats(p.stored, column, now, count);
      }
      multiply_block<FloatDot, L, V>(changed.come + block * width, 1, width, after, lanes, size, sums.values, lanes, width);
      if (!p.first) multiply_block<FloatDot, L, V>(changed.gone + block * width, 1, width, before, lanes, size, sums.values, lanes, width);
    }
    float ones[lanes];
    for (float& one : ones) one = 1.f;
    unpack_lanes(output, width, row, count, sums.values, V, ones, width, grids.past_caches);
    unpack_lanes(head_of<T>(grids.out, s, h), grids.out.row, row, count, sums.values, V, ones, width, grids.past_caches);
  }
};

template <class T, class Dot>
void publish_rows(const DeltaAttention& p, int64_t s, int64_t h, int64_t first_block, int64_t last_block, bool packed, char* scratch) {
  const SparseAttention& grids = p.grids;
  const DeltaLists& lists = p.lists[s];
  Arena arena{scratch};
  KeyPanel<Dot> all(arena, grids, p.cells);
  ChangedPanel<Dot> changed(arena, grids, lists.cells.count);
  if (!packed) {
    all.pack(grids, lists.every, head_of<const T>(grids.key, s, h), grids.key.row, (const T*)nullptr, 0);
    changed.template pack<T>(p, s, h);
  }
  for_blocks(lists.rows, first_block, last_block, [&](auto vectors, const int32_t* row, int64_t count) {
    Arena behind_keys = arena;
    PaperBlock<T, Dot, decltype(vectors)::value>(behind_keys, grids).run(p, s, h, row, count, all, changed);
  });
  stream_fence();
}

template <class T, class Dot>
int64_t paper_bytes(const DeltaAttention& p, int64_t changed) {
  Arena arena{nullptr};
  KeyPanel<Dot>(arena, p.grids, p.cells);
  ChangedPanel<Dot>(arena, p.grids, changed);
  PaperBlock<T, Dot, kTileVectors>(arena, p.grids);
  return arena.used;
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
