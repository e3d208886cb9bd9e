// delta_attention on the device: which rows to compute afresh, both modes' updates, and the copy of what changed.
//
// Letters and units as in sparse_attention.cuh; M are the cells that are keys, J listed ones. Every maximum is a whole number: weights of a
// key at two maxima then differ by a power of two, which no rounding to a half type can tell, and what is subtracted frames later is what
// was added.
#pragma once

#include "sparse_attention_products.cuh"

namespace tokenops {
namespace {

// ---- which rows ----

struct RowOrder {
  const int32_t *rows, *cells;  // [1|B, K] their query changed; [1|B, J] their key or value changed
  int64_t rows_sample, cells_sample;
  int row_slots, cell_slots, tokens, keys;
  const int32_t* turn;  // [] this slice of rows has its turn
  int slice, most;      // rows of a slice; with more changed cells than `most` all rows are computed afresh
  int32_t* order;       // [B, N] the rows to compute afresh, then the others, both ascending
  int32_t* fresh;       // [B] how many are to be computed afresh
  uint8_t* marks;       // [B, N] scratch
};

constexpr int kOrderWarps = 16, kOrderThreads = kOrderWarps * kWarp;
struct OrderShared {
  int changed[kOrderWarps], count[kOrderWarps];
  // of one round and the next
  int partial[2][kOrderWarps];
};

// One block a sample.
__global__ void __launch_bounds__(kOrderThreads) order_rows(RowOrder p) {
  auto& shared = shared_memory<OrderShared>();
  const int thread = threadIdx.x;
  const int32_t *rows = p.rows + blockIdx.x * p.rows_sample, *cells = p.cells + blockIdx.x * p.cells_sample;
  int32_t* const order = p.order + static_cast<int64_t>(blockIdx.x) * p.tokens;
  uint8_t* const marks = p.marks + static_cast<int64_t>(blockIdx.x) * p.tokens;

  int changed = 0;
  for (int j = thread; j < p.cell_slots; j += kOrderThreads) changed += names(cells[j], p.keys);
  const bool all = sum_warps(sum_lanes(changed), shared.changed).all > p.most;
  // a turn out of range is nobody's: another `refresh` may be asked for than in the frame before
  const int64_t turn = static_cast<int64_t>(*p.turn) * p.slice;
  for (int n = thread; n < p.tokens; n += kOrderThreads) marks[n] = all || (n >= turn && n < turn + p.slice);
  // the listed are written a second time
  __syncthreads();
  for (int k = thread; k < p.row_slots; k += kOrderThreads)
    if (names(rows[k], p.tokens)) marks[rows[k]] = 1;
  __syncthreads();
  int count = 0;
  for (int n = thread; n < p.tokens; n += kOrderThreads) count += marks[n];
  count = sum_warps(sum_lanes(count), shared.count).all;
  if (thread == 0) p.fresh[blockIdx.x] = count;
  int before = 0;
  for (int start = 0, round = 0; start < p.tokens; start += kOrderThreads, ++round) {
    const int n = start + thread;
    const bool afresh = n < p.tokens && marks[n];
    const unsigned votes = __ballot_sync(kAllLanes, afresh);
    const WarpSums<int> warps = sum_warps(__popc(votes), shared.partial[round % 2]);
    // how many of those before this row are to be computed afresh
    const int rank = before + warps.before + __popc(votes & ((1u << lane_id()) - 1));
    if (n < p.tokens) order[afresh ? rank : count + n - rank] = n;
    before += warps.all;
  }
}

// ---- what both modes share ----

// How a kernel cuts its work: four warps have 16 rows each, two tiles of keys are in flight. Registers bound the keys of a tile: three
// walks must take no more of them than one.
template <class Number, int Width, bool Rel>
struct ChangeShape {
  using T = Number;
  static constexpr int kWidth = Width;  // of heads, padded
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = 1, kWarpRows = 16 * kRowTiles, kRows = kWarps * kWarpRows;
  static constexpr bool kRel = Rel;  // rel_pos is served
  static constexpr int kHalfKeys = Rel && Width > 96 ? 16 : Rel || Width > 64 ? 32 : 64, kFloatKeys = Width > 64 ? 16 : 32;
  static constexpr int kKeys = sizeof(T) == 2 ? kHalfKeys : kFloatKeys, kStages = 2;
  // tiles whose ids are known: rows are copied kStages - 1 tiles ahead, and their ids as far ahead of those
  static constexpr int kIdTiles = 2 * kStages - 1;
  // what rel_pos adds passes through shared memory, and so do float's weights; rows of this pitch begin eight banks apart
  static constexpr int kWeightPitch = kKeys + 8;
  static constexpr bool kHoldQuery = kRowTiles * Width <= 128;

  struct Team {
    alignas(128) T query[kRows * TileRows<T, Width>::kPitch];
    alignas(128) T key[kStages][kKeys * TileRows<T, Width>::kPitch];
    alignas(128) T value[kStages][kKeys * TileRows<T, Width>::kPitch];
    alignas(16) float weights[sizeof(T) == 4 || Rel ? kRows * kWeightPitch : 1];
    int32_t rows[kRows], ids[kIdTiles][kKeys];
  };
};

template <class Shape>
__device__ __forceinline__ Products<Shape> products_of_warp(typename Shape::Team& shared) {
  using T = typename Shape::T;
  const int first = warp_id() * Shape::kWarpRows;
  return {shared.query + first * TileRows<T, Shape::kWidth>::kPitch, shared.weights + (sizeof(T) == 4 ? first * Shape::kWeightPitch : 0)};
}

// Keys of one head on their way to shared memory, tile by tile: all of them, or those that a list names.
template <class Shape>
struct Keys {
  using T = typename Shape::T;
  typename Shape::Team& shared;
  const int32_t* list;  // or null
  int slots;

  __device__ __forceinline__ int32_t* ids(int tile) const { return shared.ids[tile % Shape::kIdTiles]; }
  __device__ __forceinline__ void start_ids(int tile) const {
    for (int i = threadIdx.x; i < Shape::kKeys; i += Shape::kThreads) {
      const int slot = tile * Shape::kKeys + i;
      if (slot < slots && list)
        cp_async_4(ids(tile) + i, list + slot);
      else
        ids(tile)[i] = slot < slots ? slot : -1;
    }
  }

  // Calls start(ids, keys, values) for each tile, which starts the copies of what is needed, and use(ids, keys, values) once that has
  // arrived; both in all threads.
  template <class Start, class Use>
  __device__ __forceinline__ void each(Start&& start, Use&& use) const {
    const int tiles = (slots + Shape::kKeys - 1) / Shape::kKeys;
    const auto start_rows = [&](int tile) {
      if (tile < tiles) start(ids(tile), shared.key[tile % Shape::kStages], shared.value[tile % Shape::kStages]);
    };
    for (int tile = 0; tile < 2 * (Shape::kStages - 1); ++tile) start_ids(tile);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < Shape::kStages - 1; ++tile) {
      start_rows(tile);
      cp_async_commit();
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      cp_async_wait<Shape::kStages - 2>();
      // and everybody is through with the tile before
      __syncthreads();
      start_rows(tile + Shape::kStages - 1);
      start_ids(tile + 2 * (Shape::kStages - 1));
      cp_async_commit();
      use(ids(tile), shared.key[tile % Shape::kStages], shared.value[tile % Shape::kStages]);
    }
    // the next walk writes where this one reads
    __syncthreads();
  }
};

// A warp's logits with a tile of keys in units of log2, -inf where there is no key.
template <class Shape>
__device__ __forceinline__ void find_logits(Products<Shape>& products, typename Shape::Team& shared, const AttentionProblem& p, int b,
                                            int h, const int32_t* ids, const typename Shape::T* keys) {
  using P = Products<Shape>;
  products.multiply_keys(keys);
#pragma unroll
  for (int k = 0; k < P::kKeys; ++k)
#pragma unroll
    // rounded before a maximum is subtracted, or the same logit at two maxima would be rounded in two ways
    for (int r = 0; r < P::kRows; ++r) products.logit(r, k) = __fmul_rn(products.logit(r, k), p.scale);
  const int32_t* const rows = shared.rows + warp_id() * Shape::kWarpRows;
  if constexpr (Shape::kRel) {
    if (p.rel != Kind::none)
      add_terms<false>(products, shared.weights + warp_id() * Shape::kWarpRows * Shape::kWeightPitch, p, b, h, rows, 0, ids, 0);
  }
  hide<false>(products, OwnOrder{false, false, rows, 0}, 0, ids, 0, p.keys);
}

// Weights from logits, their sums, and a maximum that rises to the greatest logit: what a row had before shrinks by the result.
template <class Shape>
__device__ __forceinline__ float weigh_row(Products<Shape>& products, int r, float& highest, float& total) {
  using P = Products<Shape>;
  float top = -kInfinity;
#pragma unroll
  for (int k = 0; k < P::kKeys; ++k) top = fmaxf(top, products.logit(r, k));
  const float above = fmaxf(highest, floorf(max_lanes<P::kLanes>(top)));
  // as long as a row has seen no key its maximum is -inf, and -inf - -inf would be NaN
  const float origin = above == -kInfinity ? 0.0f : above, shrink = exp2_fast(highest - origin);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < P::kKeys; ++k) {
    float& weight = products.logit(r, k);
    weight = exp2_fast(weight - origin);
    sum += weight;
  }
  total = total * shrink + sum;
  highest = above;
  return shrink;
}

// ---- mode "exact" ----

struct ExactArguments {
  AttentionProblem p;             // without lists
  Grid old_key, old_value;        // as they were in the last frame
  Grid out;                       // [B, H, N, Dv]
  float* output;                  // [B, H, N, Dv]; these four are the state's sums, replaced
  float *maximum, *total, *peak;  // [B, H, N]
  const int32_t *order, *fresh;   // see RowOrder; null: every row afresh
  const int32_t* cells;           // [1|B, J]
  int64_t cells_sample;
  int changed;  // J
  float guard;
  int blocks;  // of rows of a head
};

// Carries the sums of a block of rows over to this frame, or computes them afresh; few blocks have rows of both kinds.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_exact(ExactArguments a) {
  using T = typename Shape::T;
  using P = Products<Shape>;
  const AttentionProblem& p = a.p;
  auto& shared = shared_memory<typename Shape::Team>();
  // blocks with rows to compute afresh come first in each head, and take longest: they start first, in all heads
  const int heads = gridDim.x / a.blocks, block = blockIdx.x / heads, head = blockIdx.x % heads;
  const int b = head / p.heads, h = head % p.heads, first = block * Shape::kRows;
  const int fresh = a.order ? a.fresh[b] : p.rows;
  for (int i = threadIdx.x; i < Shape::kRows; i += Shape::kThreads) {
    const int place = first + i;
    shared.rows[i] = place >= p.rows ? -1 : a.order ? a.order[static_cast<int64_t>(b) * p.rows + place] : place;
  }
  __syncthreads();
  // the first walk waits for them
  copy_rows<Shape::kRows, Shape::kWidth, Shape::kThreads>(shared.rows, p.rows, p.aligned, threadIdx.x,
                                                          RowCopy<T>{shared.query, p.query.at<T>(b, h), p.query.row, p.width});

  P products = products_of_warp<Shape>(shared);
  int rows[P::kRows];                        // of the grid, or -1
  float highest[P::kRows], total[P::kRows];  // the sum of totals over the lanes of a row counts
  bool afresh[P::kRows];
  const bool leads = lane_id() % P::kLanes == 0;
  const int64_t base = static_cast<int64_t>(head) * p.rows;
  T* const out = a.out.at<T>(b, h);
  bool carries = false;
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    const int place = warp_id() * Shape::kWarpRows + products.row(r);
    rows[r] = shared.rows[place];
    const bool carried = rows[r] >= 0 && first + place >= fresh;
    afresh[r] = rows[r] >= 0 && !carried;
    carries |= carried;
    highest[r] = carried ? a.maximum[base + rows[r]] : 0.0f;
    total[r] = carried && leads ? a.total[base + rows[r]] : 0.0f;
    if (carried)
      products.each(r, [&](int c, float* sums) {
        if (c >= p.value_width) return;
        const float2 before = *reinterpret_cast<const float2*>(a.output + (base + rows[r]) * p.value_width + c);
        sums[0] = before.x, sums[1] = before.y;
      });
  }
  const auto store = [&](int r, float sum, float peak) {
    if (leads) {
      a.maximum[base + rows[r]] = highest[r];
      a.total[base + rows[r]] = sum;
      a.peak[base + rows[r]] = peak;
    }
    const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    products.each(r, [&](int c, float* sums) {
      if (c >= p.value_width) return;
      *reinterpret_cast<float2*>(a.output + (base + rows[r]) * p.value_width + c) = {sums[0], sums[1]};
      T* to = out + rows[r] * a.out.row + c;
      if constexpr (sizeof(T) == 4)
        *reinterpret_cast<float2*>(to) = {sums[0] * inverse, sums[1] * inverse};
      else
        *reinterpret_cast<uint32_t*>(to) = pack<T>(sums[0] * inverse, sums[1] * inverse);
    });
  };

  // changed keys go as they were, and come as they are; then all keys, for rows to compute afresh
  enum { kGo, kCome, kAll };
  const bool any_carried = first + Shape::kRows > fresh;
#pragma unroll 1
  for (int walk = any_carried ? kGo : kAll; walk <= kAll; ++walk) {
    if (walk == kAll) {
      bool again = false;
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) {
        const float sum = sum_lanes<P::kLanes>(total[r]);
        bool sound = rows[r] >= 0 && !afresh[r];
        float peak = 0.0f;
        products.each(r, [&](int, float* sums) { sound &= fabsf(sums[0]) < kInfinity && fabsf(sums[1]) < kInfinity; });
        if (sound && leads) {
          peak = fmaxf(a.peak[base + rows[r]] * exp2_fast(a.maximum[base + rows[r]] - highest[r]), sum);
          // a comparison with NaN is false
          sound = sum >= a.guard * peak && sum > 0.0f;
        }
        sound = fold_lanes<P::kLanes>(static_cast<int>(sound), [](int x, int y) { return x & y; });
        if (sound) store(r, sum, peak);
        afresh[r] = rows[r] >= 0 && !sound;
        again |= afresh[r];
        highest[r] = -kInfinity;
        total[r] = 0.0f;
        products.each(r, [&](int, float* sums) { sums[0] = sums[1] = 0.0f; });
      }
      if (!__syncthreads_or(again)) break;
      carries = again;
    }
    const bool busy = __any_sync(kAllLanes, carries);
    const bool gone = walk == kGo, listed = walk != kAll;
    const T* const key = (gone ? a.old_key : p.key).template at<T>(b, h);
    const T* const value = (gone ? a.old_value : p.value).template at<T>(b, h);
    const int64_t key_row = gone ? a.old_key.row : p.key.row, value_row = gone ? a.old_value.row : p.value.row;
    bool started = false;
    const auto start = [&](const int32_t* ids, T* tile_keys, T* tile_values) {
      copy_rows<Shape::kKeys, Shape::kWidth, Shape::kThreads>(ids, p.keys, p.aligned, threadIdx.x,
                                                              RowCopy<T>{tile_keys, key, key_row, p.width},
                                                              RowCopy<T>{tile_values, value, value_row, p.value_width});
    };
    const Keys<Shape> keys{shared, listed ? a.cells + b * a.cells_sample : nullptr, listed ? a.changed : p.keys};
    keys.each(start, [&](const int32_t* ids, const T* tile_keys, const T* tile_values) {
      // this warp only helps to copy
      if (!busy) return;
      if (!started) products.start();
      started = true;
      find_logits<Shape>(products, shared, p, b, h, ids, tile_keys);
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) {
        if (gone) {
          const float origin = highest[r] == -kInfinity ? 0.0f : highest[r];
#pragma unroll
          for (int k = 0; k < P::kKeys; ++k) {
            float& weight = products.logit(r, k);
            weight = -exp2_fast(weight - origin);
            total[r] += weight;
          }
        } else {
          products.scale_row(r, weigh_row<Shape>(products, r, highest[r], total[r]));
        }
      }
      products.multiply_values(tile_values);
    });
  }
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    const float sum = sum_lanes<P::kLanes>(total[r]);
    if (afresh[r]) store(r, sum, sum);
  }
}

// ---- mode "paper" ----

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

// ---- the state of the next frame ----

struct CellReplacement {
  Grid key, value;          // of the tokens' type
  Grid old_key, old_value;  // [B, H, M, D] of the same, [B, H, M, Dv] of the type that is stored; no old_key in mode "paper"
  const int32_t* cells;     // [1|B, J]
  int64_t cells_sample;
  int samples, heads, keys, slots, width, value_width;
  int32_t* turn;  // [] or null
  int turns;      // the next slice of so many has its turn
  bool aligned;   // rows of key and value begin at multiples of 16 bytes; those of the state do
};

constexpr int kCellThreads = 256;

// Eight numbers of a row, which a thread copies.
template <class From, class To>
__device__ __forceinline__ void copy_eight(To* to, const From* from, bool aligned) {
  constexpr int kFrom = Wide<From>::kCount, kTo = Wide<To>::kCount;
  Wide<From> eight[8 / kFrom];
#pragma unroll
  for (int i = 0; i < 8 / kFrom; ++i)
    if (aligned)
      eight[i] = load_wide(from + i * kFrom);
    else
      eight[i] = load_run<false>(from, i * kFrom, 8);
#pragma unroll
  for (int i = 0; i < 8 / kTo; ++i) {
    Wide<To> numbers;
#pragma unroll
    for (int j = 0; j < kTo; ++j) numbers.at[j] = from_float<To>(to_float(eight[(i * kTo + j) / kFrom].at[(i * kTo + j) % kFrom]));
    store_wide(to + i * kTo, numbers);
  }
}

// Listed keys and values into the state, and the next slice of rows has its turn.
template <class T, class Stored>
__global__ void __launch_bounds__(kCellThreads) replace_cells(CellReplacement p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  if (i == 0 && p.turn) *p.turn = (*p.turn + 1) % p.turns;
  const int pieces = ((p.old_key.data ? p.width : 0) + p.value_width) / 8;
  const int64_t slot = i / pieces;
  if (slot >= static_cast<int64_t>(p.samples) * p.heads * p.slots) return;
  const int b = slot / p.slots / p.heads, h = slot / p.slots % p.heads, id = p.cells[b * p.cells_sample + slot % p.slots];
  if (!names(id, p.keys)) return;
  int c = i % pieces * 8;
  if (c < p.value_width)
    return copy_eight(p.old_value.at<Stored>(b, h) + id * p.old_value.row + c, p.value.at<const T>(b, h) + id * p.value.row + c, p.aligned);
  c -= p.value_width;
  copy_eight(p.old_key.at<T>(b, h) + id * p.old_key.row + c, p.key.at<const T>(b, h) + id * p.key.row + c, p.aligned);
}

}  // namespace
}  // namespace tokenops
