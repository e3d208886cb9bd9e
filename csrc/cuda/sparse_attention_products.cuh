// The two products of attention for one warp: logits of its rows with a tile of keys, and weights with the tile of values. By tensor cores
// for half types, by multiply-adds in registers for float. Which numbers of a tile a thread holds is theirs to say; the rest is the same.
#pragma once

#include "sparse_attention.cuh"

namespace tokenops {
namespace {

// `Shape` has a number type, a padded head width, rows of a warp in sixteens, keys of a tile and the pitch of weights. `query` are the
// warp's rows in shared memory, `weights` room for its weights. The backward pass has such products too, its "queries" and "keys" may be
// the keys and queries of the problem.
template <class Shape, class T = typename Shape::T>
struct Products {
  using Tile = TileRows<T, Shape::kWidth>;
  static constexpr int W = Shape::kWidth, kRowTiles = Shape::kRowTiles, kKeyTiles = Shape::kKeys / 8;
  // otherwise they are read again for every tile of keys
  static constexpr bool kHoldQuery = Shape::kHoldQuery;
  // rows and keys that a thread has logits for, and lanes that share a row
  static constexpr int kRows = 2 * kRowTiles, kKeys = 2 * kKeyTiles, kLanes = 4;

  T* const query;
  const int lane = lane_id();
  uint32_t held[kRowTiles][kHoldQuery ? W / 16 : 1][4];
  float logits[kRowTiles][kKeyTiles][4], sums[kRowTiles][W / 8][4] = {};

  __device__ __forceinline__ Products(T* query, float*) : query(query) {}

  __device__ __forceinline__ int row(int r) const { return r / 2 * 16 + lane / 4 + r % 2 * 8; }
  __device__ __forceinline__ int key(int k) const { return k / 2 * 8 + lane % 4 * 2 + k % 2; }
  __device__ __forceinline__ float& logit(int r, int k) { return logits[r / 2][k / 2][r % 2 * 2 + k % 2]; }
  // columns that a thread has sums of
  static constexpr int kColumns = W / 4;
  __device__ __forceinline__ int column(int i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  __device__ __forceinline__ float& sum(int r, int i) { return sums[r / 2][i / 2][r % 2 * 2 + i % 2]; }

  // the warp's queries have arrived
  __device__ __forceinline__ void start() {
    if constexpr (kHoldQuery)
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int step = 0; step < W / 16; ++step) load_query(held[i][step], i, step);
  }

  __device__ __forceinline__ void multiply_keys(const T* keys) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) logits[i][j][c] = 0.0f;
#pragma unroll
    for (int step = 0; step < W / 16; ++step) {
      if constexpr (!kHoldQuery)
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) load_query(held[i][0], i, step);
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t pair[4];
        ldmatrix(pair, keys + Tile::at(lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2, j * 8));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma<T>(logits[i][j], held[i][kHoldQuery ? step : 0], pair[0], pair[1]);
          mma<T>(logits[i][j + 1], held[i][kHoldQuery ? step : 0], pair[2], pair[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void scale_row(int r, float factor) {
#pragma unroll
    for (int j = 0; j < W / 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) sums[r / 2][j][r % 2 * 2 + c] *= factor;
  }

  // the logits are weights now
  __device__ __forceinline__ void multiply_values(const T* values) {
#pragma unroll
    for (int step = 0; step < kKeyTiles / 2; ++step) {
      // where a product leaves its result, the next takes its left operand
      uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const float (&from)[4] = logits[i][2 * step + part / 2];
          weights[i][part] = pack<T>(from[part % 2 * 2], from[part % 2 * 2 + 1]);
        }
#pragma unroll
      for (int j = 0; j < W / 8; j += 2) {
        uint32_t pair[4];
        ldmatrix_transposed(pair, values + Tile::at(lane % 16, j + lane / 16, step * 16));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma<T>(sums[i][j], weights[i], pair[0], pair[1]);
          mma<T>(sums[i][j + 1], weights[i], pair[2], pair[3]);
        }
      }
    }
  }

  // calls f(first column, sums) for pairs of a row's sums
  template <class F>
  __device__ __forceinline__ void each(int r, F&& f) {
#pragma unroll
    for (int j = 0; j < W / 8; ++j) f(j * 8 + lane % 4 * 2, &sums[r / 2][j][r % 2 * 2]);
  }

  // Puts a row of the result where the row's query was: its sums times a factor, or zeros by a factor of 0 whatever the sums are.
  __device__ __forceinline__ void store_row(int r, float factor) {
#pragma unroll
    for (int j = 0; j < W / 8; ++j) {
      const float* from = &sums[r / 2][j][r % 2 * 2];
      const uint32_t both = factor == 0.0f ? 0u : pack<T>(from[0] * factor, from[1] * factor);
      *reinterpret_cast<uint32_t*>(query + Tile::at(row(r), j) + lane % 4 * 2) = both;
    }
  }

 private:
  __device__ __forceinline__ void load_query(uint32_t (&to)[4], int i, int step) const {
    ldmatrix(to, query + Tile::at(lane % 16, step * 2 + lane / 16, i * 16));
  }
};

// Eight lanes share a row: a lane has every fourth row, every eighth key and every eighth piece of four columns, so that what neighbouring
// lanes read lies in different banks, and eight numbers in registers are multiplied by four for each twelve reads of 16 bytes.
template <class Shape>
struct Products<Shape, float> {
  using Tile = TileRows<float, Shape::kWidth>;
  static constexpr int W = Shape::kWidth;
  static constexpr int kRows = 4 * Shape::kRowTiles, kKeys = Shape::kKeys / 8, kLanes = 8, kPieces = W / 32;
  static constexpr int kPitch = Shape::kWeightPitch;

  float *const query, *const weights;
  const int lane = lane_id();
  float logits[kRows][kKeys], sums[kRows][kPieces][4] = {};

  __device__ __forceinline__ Products(float* query, float* weights) : query(query), weights(weights) {}

  __device__ __forceinline__ int row(int r) const { return lane / 8 + 4 * r; }
  __device__ __forceinline__ int key(int k) const { return lane % 8 + 8 * k; }
  __device__ __forceinline__ float& logit(int r, int k) { return logits[r][k]; }
  __device__ __forceinline__ void start() {}

  __device__ __forceinline__ void multiply_keys(const float* keys) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kKeys; ++k) logits[r][k] = 0.0f;
#pragma unroll 2
    for (int piece = 0; piece < W / 4; ++piece) {
      Wide<float> q[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) q[r] = load_wide(query + Tile::at(row(r), piece));
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        const Wide<float> other = load_wide(keys + Tile::at(key(k), piece));
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) logits[r][k] += q[r].at[c] * other.at[c];
      }
    }
  }

  __device__ __forceinline__ void scale_row(int r, float factor) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[r][i][c] *= factor;
  }

  // the logits are weights now
  __device__ __forceinline__ void multiply_values(const float* values) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kKeys; ++k) weights[row(r) * kPitch + key(k)] = logits[r][k];
    __syncwarp();
#pragma unroll 2
    for (int k = 0; k < Shape::kKeys; k += 4) {
      Wide<float> w[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) w[r] = load_wide(weights + row(r) * kPitch + k);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const Wide<float> v = load_wide(values + Tile::at(k + j, lane % 8 + 8 * i));
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[r][i][c] += w[r].at[j] * v.at[c];
        }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(int r, F&& f) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int c = 0; c < 4; c += 2) f((lane % 8 + 8 * i) * 4 + c, &sums[r][i][c]);
  }

  // Puts a row of the result where the row's query was: its sums times a factor, or zeros by a factor of 0 whatever the sums are.
  __device__ __forceinline__ void store_row(int r, float factor) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      Wide<float> numbers;
#pragma unroll
      for (int c = 0; c < 4; ++c) numbers.at[c] = factor == 0.0f ? 0.0f : sums[r][i][c] * factor;
      store_wide(query + Tile::at(row(r), lane % 8 + 8 * i), numbers);
    }
  }
};

// Adds the mask and rel_pos to a warp's logits, by way of its room for weights: there neighbouring lanes read neighbouring keys, and this
// loop need not know who holds which logit. A lane has one key, `kQueries`: of the warp's own rows, else of the tile.
template <bool kQueries, class Shape>
__device__ __forceinline__ void add_terms(Products<Shape>& products, float* added, const AttentionProblem& p, int64_t b, int64_t h,
                                          const int32_t* own, int own_rank, const int32_t* ids, int rank) {
  using P = Products<Shape>;
  constexpr int kKeys = kQueries ? Shape::kWarpRows : Shape::kKeys, kRows = kQueries ? Shape::kKeys : Shape::kWarpRows;
  static_assert(kWarp % kKeys == 0);
  const int k = lane_id() % kKeys;
  const KeyTerms key(p, b, h, (kQueries ? own : ids)[k], (kQueries ? own_rank : rank) + k);
#pragma unroll 4
  for (int r = lane_id() / kKeys; r < kRows; r += kWarp / kKeys)
    added[kQueries ? k * Shape::kWeightPitch + r : r * Shape::kWeightPitch + k] = key.at((kQueries ? ids : own)[r]);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < P::kRows; ++r)
#pragma unroll
    for (int k = 0; k < P::kKeys; ++k) products.logit(r, k) += added[products.row(r) * Shape::kWeightPitch + products.key(k)];
}

// The order of a warp's own rows, where a pass is causal: their ranks in a packed sequence, or which rows of the grid they are.
struct OwnOrder {
  bool causal, packed;
  const int32_t* rows;  // in shared memory
  int rank;             // of the first

  __device__ __forceinline__ int at(int i) const { return packed ? rank + i : rows[i]; }
  // of the others: which of them this one may not meet
  template <bool kQueries>
  __device__ __forceinline__ bool hides(int other, int own) const {
    return causal && (kQueries ? other < own : other > own);
  }
  // the own row that hides most
  template <bool kQueries, int kRows>
  __device__ __forceinline__ int strictest() const {
    int extreme = kQueries ? -1 : INT32_MAX;
    if (!causal) return extreme;
    for (int i = lane_id(); i < kRows; i += kWarp)
      if (rows[i] >= 0) extreme = kQueries ? max(extreme, at(i)) : min(extreme, at(i));
    return fold_lanes(extreme, [](int a, int b) { return kQueries ? max(a, b) : min(a, b); });
  }
};

// Logits of -inf where a tile's slot names none of the `others`, and where causality hides one. Few tiles have such: one look at all ids
// of a tile, `rank` that of the first in its sequence, spares the rest of them a comparison for each logit.
template <bool kQueries, class Shape>
__device__ __forceinline__ void hide(Products<Shape>& products, const OwnOrder& own, int strictest, const int32_t* ids, int rank,
                                     int others) {
  using P = Products<Shape>;
  const auto hidden = [&](int i, int order) {
    return !names(ids[i], others) || own.hides<kQueries>(own.packed ? rank + i : ids[i], order);
  };
  bool any = false;
  for (int i = lane_id(); i < Shape::kKeys; i += kWarp) any |= hidden(i, strictest);
  if (!__any_sync(kAllLanes, any)) return;
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    const int order = own.at(products.row(r));
#pragma unroll
    for (int k = 0; k < P::kKeys; ++k)
      if (hidden(products.key(k), order)) products.logit(r, k) = -kInfinity;
  }
}

}  // namespace
}  // namespace tokenops
