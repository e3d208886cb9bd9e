// For each row of a the most similar row of b. Scores are never stored.
//
// Rows of a stand in lanes, 1 to 3 vectors of them; rows of b are broadcast, a tile of them at a time. A tile's scores are
// compared in registers with the best so far, and only where a lane improves is its index touched. Rows of b come in ascending
// order and must be strictly better to win, so ties go to the lowest index.
#pragma once

#include "row_norms.h"
#include "token_merge.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

constexpr int64_t kPlaces = 3;  // t, y, x

// bounds on a place in each of t, y, x
struct Box {
  int32_t low[kPlaces], high[kPlaces];
};

int32_t to_int32(int64_t x) { return (int32_t)(x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x); }

// where a row of a must be to match a candidate at `place`
Box reach_of(const Pairs& p, const int32_t* place) {
  const int64_t low[kPlaces] = {place[0] - p.t_high, place[1] - p.reach_y, place[2] - p.reach_x};
  const int64_t high[kPlaces] = {place[0] - p.t_low, place[1] + p.reach_y, place[2] + p.reach_x};
  Box box;
  for (int64_t d = 0; d < kPlaces; ++d) box.low[d] = to_int32(low[d]), box.high[d] = to_int32(high[d]);
  return box;
}

// what all boxes of a tile cover together, and what each of them covers
struct TileReach {
  Box any, all;
};

TileReach reach_of_tile(const Box* boxes) {
  TileReach reach{boxes[0], boxes[0]};
  for (int64_t r = 1; r < kTileRows; ++r)
    for (int64_t d = 0; d < kPlaces; ++d) {
      const int32_t low = boxes[r].low[d], high = boxes[r].high[d];
      if (low < reach.any.low[d]) reach.any.low[d] = low;
      if (high > reach.any.high[d]) reach.any.high[d] = high;
      if (low > reach.all.low[d]) reach.all.low[d] = low;
      if (high < reach.all.high[d]) reach.all.high[d] = high;
    }
  return reach;
}

// the candidates of one sample
template <class T, class Dot>
struct Candidates {
  typename Dot::Scalar* rows;  // [padded][scalars]
  float* factor;               // [padded], inverse norm times scale
  Box* reach;                  // [padded]
  TileReach* tiles;

  Candidates(Arena& arena, const Pairs& p, int64_t count) {
    const int64_t padded = round_up(count, kTileRows);
    rows = arena.take<typename Dot::Scalar>(padded * p.width / Dot::kPerScalar);
    factor = arena.take<float>(padded);
    reach = arena.take<Box>(p.windowed ? padded : 0);
    tiles = arena.take<TileReach>(p.windowed ? padded / kTileRows : 0);
  }

  bool pack(const Pairs& p, const PairSide& b) {
    const int64_t padded = round_up(b.count, kTileRows), scalars = p.width / Dot::kPerScalar;
    const Rows<T> from{(const T*)b.data, b.row, b.list, b.count};
    // the rows that fill up the last tile repeat the last one, which cannot be strictly better than itself
    pack_rows<Dot>(rows, scalars, from, padded, p.width, Fill::last_row);
    bool finite = true;
    for (int64_t j = 0; j < padded; ++j) {
      const int32_t id = b.list[smaller(j, b.count - 1)];
      const RowNorm norm = norm_of(from.base + id * from.stride, p.width);
      finite &= norm.finite;
      if (p.normalize && norm.by != 1.f) scale_packed<Dot>(rows + j * scalars, 1, scalars, norm.by);
      // an infinite scale is none of a zero row: such a factor is no number, and its scores cannot win
      const float scale = b.scale ? b.scale[id * b.scale_row] : 1.f;
      finite &= scale == scale;
      factor[j] = (p.normalize ? norm.inverse : 1.f) * scale;
      if (p.windowed) reach[j] = reach_of(p, b.place + id * kPlaces);
    }
    if (p.windowed)
      for (int64_t j = 0; j < padded; j += kTileRows) tiles[j / kTileRows] = reach_of_tile(reach + j);
    return finite;
  }
};

// up to V vectors of rows of a
template <class T, class Dot, int V>
struct PairBlock {
  static constexpr int L = kLanes;
  typename Dot::Scalar* rows;  // [scalars][V * L]
  VecF<L> factor[V];
  VecI<L> place[kPlaces][V];
  Box box;  // around all places

  PairBlock(Arena& arena, const Pairs& p) { rows = arena.take<typename Dot::Scalar>(p.width / Dot::kPerScalar * V * L); }

  bool pack(const Pairs& p, const PairSide& a, int64_t first, int64_t last) {
    const int64_t scalars = p.width / Dot::kPerScalar;
    const Rows<T> from{(const T*)a.data, a.row, a.list + first, last - first};
    pack_lanes<Dot>(rows, V, from, p.width, Fill::last_row);
    bool finite = true;
    for (int64_t i = 0; i < V * L; ++i) {
      const int32_t id = from.row[smaller(i, from.count - 1)];
      const RowNorm norm = norm_of(from.base + id * from.stride, p.width);
      finite &= norm.finite;
      if (p.normalize && norm.by != 1.f) scale_packed<Dot>(rows + i, V * L, scalars, norm.by);
      const float scale = a.scale ? a.scale[id * a.scale_row] : 1.f;
      finite &= scale == scale;
      factor[i / L][i % L] = (p.normalize ? norm.inverse : 1.f) * scale;
      if (!p.windowed) continue;
      for (int64_t d = 0; d < kPlaces; ++d) {
        const int32_t at = a.place[id * kPlaces + d];
        place[d][i / L][i % L] = at;
        box.low[d] = i == 0 || at < box.low[d] ? at : box.low[d];
        box.high[d] = i == 0 || at > box.high[d] ? at : box.high[d];
      }
    }
    return finite;
  }

  bool misses(const Box& reach) const {
    for (int64_t d = 0; d < kPlaces; ++d)
      if (box.high[d] < reach.low[d] || box.low[d] > reach.high[d]) return true;
    return false;
  }
  bool within(const Box& reach) const {
    for (int64_t d = 0; d < kPlaces; ++d)
      if (box.low[d] < reach.low[d] || box.high[d] > reach.high[d]) return false;
    return true;
  }
};

template <class T, class Dot, int V>
TOKENOPS_INLINE void find_best(const Pairs& p, const PairSample& sample, const Candidates<T, Dot>& candidates,
                               const PairBlock<T, Dot, V>& block, int64_t first, int64_t last) {
  constexpr int L = kLanes;
  const int64_t scalars = p.width / Dot::kPerScalar;
  VecF<L> best[V];
  VecI<L> where[V];
  for (int v = 0; v < V; ++v) best[v] = splat<L>(-__builtin_inff()), where[v] = VecI<L>{} - 1;
  for (int64_t j = 0; j < sample.b.count; j += kTileRows) {
    if (p.windowed && block.misses(candidates.tiles[j / kTileRows].any)) continue;
    VecF<L> score[kTileRows][V];
    clear<L>(score);
    multiply_tile<Dot, L, kTileRows, V>(candidates.rows + j * scalars, scalars, 1, block.rows, V * L, scalars, score);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) score[r][v] *= candidates.factor[j + r];
    if (p.windowed && !block.within(candidates.tiles[j / kTileRows].all))
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Box& reach = candidates.reach[j + r];
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          VecI<L> inside = VecI<L>{} - 1;
#pragma GCC unroll 3
          for (int64_t d = 0; d < kPlaces; ++d) inside &= (block.place[d][v] >= reach.low[d]) & (block.place[d][v] <= reach.high[d]);
          score[r][v] = inside ? score[r][v] : splat<L>(-__builtin_inff());
        }
      }
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      // max keeps its second argument where the first is no number, and best never is none: such a score cannot win
      VecF<L> top = best[v];
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) top = max(score[r][v], top);
      if (!any_greater(top, best[v])) continue;
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const auto better = score[r][v] > best[v];
        best[v] = better ? score[r][v] : best[v];
        where[v] = better ? VecI<L>{} + (int32_t)(j + r) : where[v];
      }
    }
  }
  for (int64_t i = 0; i < last - first; ++i) {
    const int32_t id = sample.a.list[first + i], at = where[i / L][i % L];
    sample.best[id] = at < 0 ? -__builtin_inff() : best[i / L][i % L] * block.factor[i / L][i % L];
    sample.index[id] = at < 0 ? -1 : sample.b.list[at];
  }
}

int64_t pair_vectors(int64_t rows) { return (rows + kLanes - 1) / kLanes; }
int64_t pair_blocks(int64_t rows) { return (pair_vectors(rows) + kTileVectors - 1) / kTileVectors; }

template <class T, class Dot>
int64_t pair_bytes(const Pairs& p, int64_t candidates) {
  Arena arena{nullptr};
  Candidates<T, Dot>(arena, p, candidates);
  PairBlock<T, Dot, kTileVectors>(arena, p);
  return arena.used;
}

template <class T, class Dot>
bool pair_sample(const Pairs& p, const PairSample& sample, int64_t first_block, int64_t last_block, bool packed, char* scratch) {
  const int64_t count = sample.a.count, vectors = pair_vectors(count), blocks = pair_blocks(count);
  Arena arena{scratch};
  Candidates<T, Dot> candidates(arena, p, sample.b.count);
  bool finite = packed || sample.b.count == 0 || candidates.pack(p, sample.b);
  for (int64_t i = first_block; i < last_block; ++i) {
    const int64_t from = vectors * i / blocks, to = vectors * (i + 1) / blocks, first = from * kLanes, last = smaller(to * kLanes, count);
    with_vectors(to - from, [&](auto constant) {
      constexpr int V = decltype(constant)::value;
      Arena own = arena;
      PairBlock<T, Dot, V> block(own, p);
      finite &= block.pack(p, sample.a, first, last);
      find_best<T, Dot, V>(p, sample, candidates, block, first, last);
    });
  }
  return finite;
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
