// delta_attention in mode "paper": the attention matrix itself is stored.
#pragma once

#include "delta_matmul_attention.cuh"

namespace tokenops {
namespace {

struct PaperArguments {
  AttentionProblem p;    // without lists
  Grid old_value, out;   // [B, H, M, Dv] of the stored type, as it was in the last frame; [B, H, N, Dv]
  float* output;         // [B, H, N, Dv], replaced
  void* probability;     // [B, H, M, N] of the stored type, replaced in the listed rows
  const int32_t* cells;  // [1|B, J]; null: a first frame, all of them are new
  int64_t cells_sample;
  int changed;         // J
  Kind token, stored;  // types of the tokens and of what is stored
  int blocks;          // of rows of a head
};

// Numbers in memory: of type T, or of a type that is known at run time, which are computed with as float.
template <class T, bool Cast>
struct Numbers {
  static __device__ __forceinline__ float read(Kind kind, const void* data, int64_t at) {
    if constexpr (!Cast) return to_float(static_cast<const T*>(data)[at]);
    if (kind == Kind::f32) return static_cast<const float*>(data)[at];
    return kind == Kind::bf16 ? to_float(static_cast<const bf16*>(data)[at]) : to_float(static_cast<const f16*>(data)[at]);
  }
  static __device__ __forceinline__ void write(Kind kind, void* data, int64_t at, float x) {
    if constexpr (!Cast) {
      static_cast<T*>(data)[at] = from_float<T>(x);
    } else if (kind == Kind::f32) {
      static_cast<float*>(data)[at] = x;
    } else {
      static_cast<uint16_t*>(data)[at] = kind == Kind::bf16 ? from_float<bf16>(x).bits : from_float<f16>(x).bits;
    }
  }
  static __device__ __forceinline__ float rounded(Kind kind, float x) {
    if constexpr (!Cast) return to_float(from_float<T>(x));
    if (kind == Kind::f32) return x;
    return kind == Kind::bf16 ? to_float(from_float<bf16>(x)) : to_float(from_float<f16>(x));
  }
};

// copy_rows for numbers of another type, which are rounded to yet another one on the way
template <int Rows, class Shape, bool Cast>
__device__ __forceinline__ void copy_numbers(typename Shape::T* tile, Kind kind, Kind by_way_of, const Grid& grid, int b, int h, int width,
                                             bool aligned, const int32_t* ids, int rows) {
  using T = typename Shape::T;
  using Tile = TileRows<T, Shape::kWidth>;
  if constexpr (!Cast) {
    copy_rows<Rows, Shape::kWidth, Shape::kThreads>(ids, rows, aligned, threadIdx.x, RowCopy<T>{tile, grid.at<T>(b, h), grid.row, width});
  } else {
    for (int place = threadIdx.x; place < Rows * Tile::kPieces; place += Shape::kThreads) {
      const int r = place / Tile::kPieces, c = place % Tile::kPieces * Tile::kPiece;
      const int64_t from = b * grid.batch + h * grid.head + ids[r] * grid.row + c;
      Wide<T> piece{};
      if (names(ids[r], rows) && c < width)
#pragma unroll
        for (int j = 0; j < Tile::kPiece; ++j) {
          const float x = Numbers<T, Cast>::read(kind, grid.data, from + j);
          piece.at[j] = Numbers<T, Cast>::rounded(by_way_of, x);
        }
      store_wide(tile + Tile::at(r, c / Tile::kPiece), piece);
    }
  }
}

// What the listed columns of the attention matrix, as stored, gave to a block of rows goes, and what they give now comes.
template <class Shape, bool Cast>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_paper(PaperArguments a) {
  using T = typename Shape::T;
  using P = Products<Shape>;
  using Number = Numbers<T, Cast>;
  const AttentionProblem& p = a.p;
  auto& shared = shared_memory<typename Shape::Team>();
  const int head = blockIdx.x / a.blocks, first = blockIdx.x % a.blocks * Shape::kRows, b = head / p.heads, h = head % p.heads;
  for (int i = threadIdx.x; i < Shape::kRows; i += Shape::kThreads) shared.rows[i] = first + i < p.rows ? first + i : -1;
  __syncthreads();
  // the first walk waits for them
  copy_numbers<Shape::kRows, Shape, Cast>(shared.query, a.token, a.token, p.query, b, h, p.width, p.aligned, shared.rows, p.rows);

  P products = products_of_warp<Shape>(shared);
  int rows[P::kRows];
  float highest[P::kRows], total[P::kRows];
  const int64_t base = static_cast<int64_t>(head) * p.rows, matrix = base * p.keys;
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    rows[r] = shared.rows[warp_id() * Shape::kWarpRows + products.row(r)];
    highest[r] = -kInfinity;
    total[r] = 0.0f;
    if (a.cells && rows[r] >= 0)
      products.each(r, [&](int c, float* sums) {
        if (c >= p.value_width) return;
        const float2 before = *reinterpret_cast<const float2*>(a.output + (base + rows[r]) * p.value_width + c);
        sums[0] = before.x, sums[1] = before.y;
      });
  }
  // calls f(row of this thread, key of this thread, place in the matrix) for the weights that exist
  const auto each_weight = [&](const int32_t* ids, auto&& f) {
#pragma unroll
    for (int k = 0; k < P::kKeys; ++k) {
      const int id = ids[products.key(k)];
#pragma unroll
      for (int r = 0; r < P::kRows; ++r)
        f(r, k, names(id, p.keys) && rows[r] >= 0 ? matrix + static_cast<int64_t>(id) * p.rows + rows[r] : -1);
    }
  };
  const auto start_keys = [&](const int32_t* ids, T* keys, T*) {
    copy_numbers<Shape::kKeys, Shape, Cast>(keys, a.token, a.token, p.key, b, h, p.width, p.aligned, ids, p.keys);
  };
  const Keys<Shape> all{shared, nullptr, p.keys};
  const Keys<Shape> listed{shared, a.cells ? a.cells + b * a.cells_sample : nullptr, a.cells ? a.changed : p.keys};

  if (a.cells)
    listed.each(
        [&](const int32_t* ids, T*, T* values) {
          copy_numbers<Shape::kKeys, Shape, Cast>(values, a.stored, a.stored, a.old_value, b, h, p.value_width, true, ids, p.keys);
        },
        [&](const int32_t* ids, const T*, const T* values) {
          each_weight(ids,
                      [&](int r, int k, int64_t at) { products.logit(r, k) = at < 0 ? 0.0f : -Number::read(a.stored, a.probability, at); });
          products.multiply_values(values);
        });
  bool started = false;
  all.each(start_keys, [&](const int32_t* ids, const T* keys, const T*) {
    if (!started) products.start();
    started = true;
    find_logits<Shape>(products, shared, p, b, h, ids, keys);
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) weigh_row<Shape>(products, r, highest[r], total[r]);
  });
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) total[r] = __fdividef(1.0f, sum_lanes<P::kLanes>(total[r]));
  listed.each(
      [&](const int32_t* ids, T* keys, T* values) {
        start_keys(ids, keys, values);
        copy_numbers<Shape::kKeys, Shape, Cast>(values, a.token, a.stored, p.value, b, h, p.value_width, p.aligned, ids, p.keys);
      },
      [&](const int32_t* ids, const T* keys, const T* values) {
        find_logits<Shape>(products, shared, p, b, h, ids, keys);
        each_weight(ids, [&](int r, int k, int64_t at) {
          float& weight = products.logit(r, k);
          weight = at < 0 ? 0.0f : Number::rounded(a.stored, exp2_fast(weight - highest[r]) * total[r]);
          if (at >= 0) Number::write(a.stored, a.probability, at, weight);
        });
        products.multiply_values(values);
      });
#pragma unroll
  for (int r = 0; r < P::kRows; ++r)
    if (rows[r] >= 0)
      products.each(r, [&](int c, float* sums) {
        if (c >= p.value_width) return;
        *reinterpret_cast<float2*>(a.output + (base + rows[r]) * p.value_width + c) = {sums[0], sums[1]};
        const int64_t at = b * a.out.batch + h * a.out.head + rows[r] * a.out.row + c;
        for (int j = 0; j < 2; ++j) Number::write(a.token, a.out.data, at + j, sums[j]);
      });
}

}  // namespace
}  // namespace tokenops
