// The backward kernels. A team of warps owns a block of slots of one side of a head and walks over the slots of the other side, so that
// every row of a gradient has one writer and is one sum in one order: no atomics, the same bits every run. The scores are computed anew.
//
// With p = exp2(logit - lse) and delta = sum(grad_out * out) of a query:  slope = p (grad_out value^T - delta),  grad_query = scale slope
// key,  grad_key = scale slope^T query,  grad_value = p^T grad_out;  a term added to a logit has the slope for its gradient.
#pragma once

#include "sparse_attention_products.cuh"

namespace tokenops {
namespace {

// What a kernel computes. For grad_key, grad_value and grad_bias a team owns keys and walks over queries. For grad_rel_h and grad_rel_w it
// owns queries and some columns of the grid of cells, and walks down the rows of that grid: in whatever order a list names the keys, a tile
// is a piece of one row of cells.
enum class Gradient { query, key_value, rel_pos };
constexpr int kRelPosColumns = 32;  // of a piece of a row of cells

struct BackwardArguments {
  AttentionProblem p;  // for rel_pos, slot c of the keys is cell c
  Grid grad_out;       // [B, H, K, Dv]
  // [B, H, K] dense: lse in units of log2, +inf for an empty row, whose weights are then 0; and delta, 0 for an empty row
  const float *lse, *delta;
  // like what they are the gradients of, or null data; rows that no slot names are zero already
  Grid grad_query, grad_key, grad_value;
  float* grad_bias;             // [B, kv heads, M] dense or null
  Kind grad_rel_h_kind;         // float32 in parts, or as rel_h
  Grid grad_rel_h, grad_rel_w;  // either may have null data
  int64_t grad_rel_h_part;      // stride of the parts of grad_rel_h, one for each piece of a row of cells
  int64_t teams;                // blocks in all
  int blocks;                   // of a head, for each piece of a row of cells
  int pieces;                   // of a row of cells; 1 where there is no such thing
};

// How a kernel cuts its work. As in the forward pass, several teams of one warp share a thread block.
template <class Number, int Width, Gradient Of, int Warps, int RowTiles, int Others, int Stages, bool Full>
struct BackwardShape {
  using T = Number;
  static constexpr Gradient kOf = Of;
  static constexpr bool kOwnsKeys = Of == Gradient::key_value;
  static constexpr int kWidth = Width;  // of heads, padded
  static constexpr int kWarps = Warps, kTeam = Warps * kWarp;
  static constexpr int kRowTiles = RowTiles, kWarpRows = 16 * RowTiles, kRows = Warps * kWarpRows;  // that a team owns
  static constexpr int kKeys = Others, kStages = Stages;  // rows of a tile of the other side, tiles in flight
  static constexpr bool kFull = Full;                     // attn_mask and rel_pos are served
  // tiles whose ids are known: rows are copied kStages - 1 tiles ahead, and their ids as far ahead of those
  static constexpr int kIdTiles = 2 * kStages - 1;
  static constexpr int kWeightPitch = Others + 8;
  // two sets of them, and in registers two sets of logits
  static constexpr bool kHoldQuery = !kOwnsKeys && RowTiles * Width <= 64;

  // For a side, `first` is query or key and `second` is grad_out or value.
  struct Team {
    alignas(128) T own_first[kRows * TileRows<T, Width>::kPitch];
    alignas(128) T own_second[kRows * TileRows<T, Width>::kPitch];
    alignas(128) T first[Stages][Others * TileRows<T, Width>::kPitch];
    alignas(128) T second[Stages][Others * TileRows<T, Width>::kPitch];
    alignas(16) float weights[sizeof(T) == 4 || Full ? kRows * kWeightPitch : 1];
    // of keys the bias; of queries lse and delta
    float bias[kOwnsKeys ? 1 : Stages][Others], lse[kOwnsKeys ? Stages : 1][Others], delta[kOwnsKeys ? Stages : 1][Others];
    int32_t rows[kRows], ids[kIdTiles][Others];
    // what is kept here and not in registers that the products need: the bias of keys that the team owns; whose rows these are; the slots
    // that it meets, and the first of their sequence
    float own_bias[kOwnsKeys ? kRows : 1];
    int batch, head, kv_head, piece, other_begin;
    Span slots;
    int partial[2][Warps];
  };
  static constexpr int kTeams = teams_of_block(Warps, sizeof(Team));
  static constexpr int kThreads = kTeams * kTeam;
  struct Shared {
    Team team[kTeams];
  };
};

// The tiles of the other side that a team meets, one a step.
template <class Shape>
struct OtherTiles {
  using T = typename Shape::T;
  static constexpr bool kOwnsKeys = Shape::kOwnsKeys;
  typename Shape::Team& shared;
  const BackwardArguments& a;
  const int thread;

  __device__ __forceinline__ int count() const {
    if constexpr (Shape::kOf == Gradient::rel_pos) return a.p.rel_height;
    return (shared.slots.end - shared.slots.begin + Shape::kKeys - 1) / Shape::kKeys * (kOwnsKeys ? a.p.group : 1);
  }
  // one loop over the tiles of all query heads of a group: a loop around a loop would drain the pipeline every turn. And no division where
  // there is nothing to divide
  __device__ __forceinline__ int turn(int step) const { return !kOwnsKeys || a.p.group == 1 ? step : step / a.p.group; }
  __device__ __forceinline__ int query_head(int step) const {
    return kOwnsKeys ? shared.head * a.p.group + step - turn(step) * a.p.group : shared.head;
  }
  __device__ __forceinline__ Span tile(int step) const {
    if constexpr (Shape::kOf == Gradient::rel_pos) {
      const int column = shared.piece * Shape::kKeys, first = shared.slots.begin + step * a.p.rel_width + column;
      return {first, min(shared.slots.end, first + min(Shape::kKeys, a.p.rel_width - column))};
    }
    return {shared.slots.begin + turn(step) * Shape::kKeys, shared.slots.end};
  }
  __device__ __forceinline__ int32_t* ids(int step) const { return shared.ids[step % Shape::kIdTiles]; }

  __device__ __forceinline__ void start_ids(int step) const {
    if (step >= count()) return;
    const AttentionProblem& p = a.p;
    const SlotList list(kOwnsKeys ? p.q_index : p.kv_index, shared.batch, kOwnsKeys ? query_head(step) : shared.kv_head,
                        kOwnsKeys ? p.rows : p.keys);
    const Span slots = tile(step);
    copy_ids<Shape::kKeys, Shape::kTeam>(ids(step), list, slots.begin, slots.end, thread);
  }

  // its ids have arrived
  __device__ __forceinline__ void start_rows(int step) const {
    if (step >= count()) return;
    const AttentionProblem& p = a.p;
    const int64_t b = shared.batch;
    const int stage = step % Shape::kStages;
    const int32_t* rows = ids(step);
    if constexpr (kOwnsKeys) {
      const int h = query_head(step), first = tile(step).begin;
      copy_rows<Shape::kKeys, Shape::kWidth, Shape::kTeam>(
          rows, p.rows, p.aligned, thread, RowCopy<T>{shared.first[stage], p.query.at<T>(b, h), p.query.row, p.width},
          RowCopy<T>{shared.second[stage], a.grad_out.at<T>(b, h), a.grad_out.row, p.value_width, first});
      const int64_t at = (b * p.heads + h) * p.query_slots + first;
      for (int i = thread; i < Shape::kKeys; i += Shape::kTeam) {
        const bool valid = names(rows[i], p.rows);
        cp_async_4(&shared.lse[stage][i], valid ? a.lse + at + i : a.lse, valid);
        cp_async_4(&shared.delta[stage][i], valid ? a.delta + at + i : a.delta, valid);
      }
    } else {
      copy_keys<Shape::kKeys, Shape::kWidth, Shape::kTeam>(p, b, shared.kv_head, rows, shared.first[stage], shared.second[stage],
                                                           shared.bias[stage], thread);
    }
  }
};

// Of the slots of the other side those that a causal team may meet. `extreme`: the last query that it owns, or the first key, by rank in a
// packed sequence.
template <class Shape>
__device__ __forceinline__ Span causal_slots(const AttentionProblem& p, Span slots, int64_t b, int head, int extreme,
                                             typename Shape::Team& shared, int thread) {
  if constexpr (Shape::kOwnsKeys) {
    if (p.packed() || !p.q_index.data) return {slots.begin + min(extreme, slots.end - slots.begin), slots.end};
    int bound = slots.end;
    for (int h = head * p.group; h < (head + 1) * p.group; ++h) {
      const SlotList list(p.q_index, b, h, p.rows);
      for (int slot = slots.begin + thread; slot < bound; slot += Shape::kTeam)
        if (list.row(slot, slots.end) >= extreme) bound = slot;
    }
    return {-most_of_team(-bound, shared.partial[1]), slots.end};
  } else {
    return causal_keys<Shape::kTeam>(p, slots, b, head / p.group, extreme, shared.partial[1], thread);
  }
}

// Writes the rows of a warp, which lie in shared memory, to where their ids name.
template <class Shape, class T = typename Shape::T>
__device__ __forceinline__ void write_rows(const T* tile, T* grid, int64_t stride, int width, bool aligned, const int32_t* ids) {
  using Tile = TileRows<T, Shape::kWidth>;
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows * Tile::kPieces / kWarp; ++i) {
    const int place = lane_id() + i * kWarp, r = place / Tile::kPieces, piece = place % Tile::kPieces;
    if (ids[r] < 0 || piece * Tile::kPiece >= width) continue;
    T* to = grid + ids[r] * stride + piece * Tile::kPiece;
    const Wide<T> numbers = load_wide(tile + Tile::at(r, piece));
    if (aligned)
      store_wide(to, numbers);
    else
      for (int j = 0; j < Tile::kPiece; ++j) to[j] = numbers.at[j];
  }
}

__device__ __forceinline__ void write_number(Kind kind, void* data, int64_t at, float x) {
  if (kind == Kind::f32)
    static_cast<float*>(data)[at] = x;
  else if (kind == Kind::bf16)
    static_cast<bf16*>(data)[at] = from_float<bf16>(x);
  else
    static_cast<f16*>(data)[at] = from_float<f16>(x);
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_backward(BackwardArguments a) {
  using T = typename Shape::T;
  using Tile = TileRows<T, Shape::kWidth>;
  using P = Products<Shape>;
  constexpr bool kOwnsKeys = Shape::kOwnsKeys, kRelPos = Shape::kOf == Gradient::rel_pos;
  const AttentionProblem& p = a.p;

  const int thread = threadIdx.x % Shape::kTeam, warp = warp_id() % Shape::kWarps;
  auto& shared = shared_memory<typename Shape::Shared>().team[threadIdx.x / Shape::kTeam];
  const int64_t number = static_cast<int64_t>(blockIdx.x) * Shape::kTeams + threadIdx.x / Shape::kTeam;
  if (number >= a.teams) return;
  const int heads = kOwnsKeys ? p.heads / p.group : p.heads;
  const int64_t head_number = number / a.pieces / a.blocks;
  const int64_t b = head_number / heads;
  const int head = head_number % heads;
  int block = number / a.pieces % a.blocks;
  // the longest blocks start first: early keys are seen by most queries, and late queries see most keys
  if (!kOwnsKeys && p.causal && !p.packed()) block = a.blocks - 1 - block;
  const Work work = kOwnsKeys ? find_work<Shape::kRows>(block, p.cu_seqlens_k, p.key_slots, p.cu_seqlens_q, p.query_slots, p.sequences)
                              : find_work<Shape::kRows>(block, p.cu_seqlens_q, p.query_slots, p.cu_seqlens_k, p.key_slots, p.sequences);
  if (work.empty()) return;

  const SlotList own(kOwnsKeys ? p.kv_index : p.q_index, b, head, kOwnsKeys ? p.keys : p.rows);
  int extreme = kOwnsKeys ? INT32_MAX : -1;
  for (int i = thread; i < Shape::kRows; i += Shape::kTeam) {
    // padding names no row; without a list its rows are the last ones, whose gradients are zeros
    const int slot = work.first + i, row = work.padding && own.ids ? -1 : own.row(slot, work.own.end);
    shared.rows[i] = row;
    if constexpr (kOwnsKeys)
      shared.own_bias[i] = p.bias && row >= 0 ? to_log2(p.bias[b * p.bias_batch + head * p.bias_head + row * p.bias_row]) : 0.0f;
    const int order = p.packed() ? slot - work.own.begin : row;
    if (row >= 0) extreme = kOwnsKeys ? min(extreme, order) : max(extreme, order);
  }
  Span slots = work.others;
  if (p.causal && !kRelPos) {
    extreme = kOwnsKeys ? -most_of_team(-extreme, shared.partial[0]) : most_of_team(extreme, shared.partial[0]);
    slots = causal_slots<Shape>(p, slots, b, head, extreme, shared, thread);
  }
  if (thread == 0) {
    shared.batch = static_cast<int>(b);
    shared.head = head;
    shared.kv_head = kOwnsKeys ? head : head / p.group;
    shared.piece = number % a.pieces;
    shared.other_begin = work.others.begin;
    shared.slots = slots;
  }
  if constexpr (Shape::kWarps == 1)
    __syncwarp();
  else
    __syncthreads();
  const OtherTiles<Shape> tiles{shared, a, thread};
  for (int step = 0; step < 2 * (Shape::kStages - 1); ++step) tiles.start_ids(step);
  {
    const Grid &first = kOwnsKeys ? p.key : p.query, &second = kOwnsKeys ? p.value : a.grad_out;
    const int rows = kOwnsKeys ? p.keys : p.rows;
    copy_rows<Shape::kRows, Shape::kWidth, Shape::kTeam>(
        shared.rows, rows, p.aligned, thread, RowCopy<T>{shared.own_first, first.at<T>(b, head), first.row, p.width},
        RowCopy<T>{shared.own_second, second.at<T>(b, head), second.row, p.value_width, kOwnsKeys ? -1 : work.first});
  }
  cp_async_commit();
  cp_async_wait<0>();
  if constexpr (Shape::kWarps == 1)
    __syncwarp();
  else
    __syncthreads();
#pragma unroll
  for (int step = 0; step < Shape::kStages - 1; ++step) {
    tiles.start_rows(step);
    cp_async_commit();
  }

  const int first = warp * Shape::kWarpRows;  // of the team's rows
  float* const weights = shared.weights + (sizeof(T) == 4 || Shape::kFull ? first * Shape::kWeightPitch : 0);
  // logits, then weights, then the sums of grad_value; and slopes, then the sums of grad_query or grad_key
  P scores(shared.own_first + first * Tile::kPitch, weights), slopes(shared.own_second + first * Tile::kPitch, weights);
  const bool masked = p.mask != Kind::none || p.rel != Kind::none, busy = work.first + first < work.own.end;
  const OwnOrder order{p.causal, p.packed(), shared.rows + first, work.first + first - work.own.begin};
  const int strictest = order.template strictest<kOwnsKeys, Shape::kWarpRows>();
  // of a query
  float lse[kOwnsKeys ? 1 : P::kRows], delta[kOwnsKeys ? 1 : P::kRows];
  if constexpr (!kOwnsKeys) {
    const int64_t at = (b * p.heads + head) * p.query_slots + work.first + first;
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      const bool exists = shared.rows[first + scores.row(r)] >= 0;
      lse[r] = exists ? a.lse[at + scores.row(r)] : kInfinity;
      delta[r] = exists ? a.delta[at + scores.row(r)] : 0.0f;
    }
  }
  // sums of slopes: of a key, and of a query for each column of cells
  float of_key[kOwnsKeys ? P::kRows : 1] = {};
  float columns[kRelPos ? P::kRows : 1][kRelPos ? P::kKeys : 1] = {};

  for (int step = 0; step < tiles.count(); ++step) {
    cp_async_wait<Shape::kStages - 2>();
    // and everybody is through with the tile before
    if constexpr (Shape::kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
    tiles.start_rows(step + Shape::kStages - 1);
    tiles.start_ids(step + 2 * (Shape::kStages - 1));
    cp_async_commit();
    // rows behind the end: this warp only helps to copy
    if (!busy) continue;
    const int stage = step % Shape::kStages;
    if (step == 0) {
      scores.start();
      slopes.start();
    }
    scores.multiply_keys(shared.first[stage]);
    slopes.multiply_keys(shared.second[stage]);

    const int32_t* ids = tiles.ids(step);
    const Span slots = tiles.tile(step);
    // rank of the first of the others in their sequence
    const int rank = slots.begin - shared.other_begin, filled = slots.end - slots.begin;
#pragma unroll
    for (int k = 0; k < P::kKeys; ++k) {
      const int at = scores.key(k);
      const float other = kOwnsKeys ? -shared.lse[stage][at] : p.bias ? to_log2(shared.bias[stage][at]) : 0.0f;
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) {
        const float own = kOwnsKeys ? shared.own_bias[first + scores.row(r)] : -lse[kOwnsKeys ? 0 : r];
        scores.logit(r, k) = scores.logit(r, k) * p.scale + (own + other);
      }
    }
    if constexpr (Shape::kFull) {
      if (masked) add_terms<kOwnsKeys>(scores, weights, p, shared.batch, tiles.query_head(step), order.rows, order.rank, ids, rank);
    }
    if (p.causal || (kOwnsKeys ? p.q_index.data : p.kv_index.data) || filled < Shape::kKeys)
      hide<kOwnsKeys>(scores, order, strictest, ids, rank, kOwnsKeys ? p.rows : p.keys);
#pragma unroll
    for (int r = 0; r < P::kRows; ++r)
#pragma unroll
      for (int k = 0; k < P::kKeys; ++k) {
        float& weight = scores.logit(r, k);
        // at most 1, also where a huge lse was rounded by more than its distance to a logit; NaN stays NaN
        weight = exp2_fast(weight > 0.0f ? 0.0f : weight);
        slopes.logit(r, k) = weight * (slopes.logit(r, k) - (kOwnsKeys ? shared.delta[stage][scores.key(k)] : delta[kOwnsKeys ? 0 : r]));
      }

    if constexpr (kRelPos) {
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < P::kKeys; ++k) {
          sum += slopes.logit(r, k);
          columns[r][k] += slopes.logit(r, k);
        }
        sum = sum_lanes<P::kLanes>(sum);
        const int row = shared.rows[first + scores.row(r)];
        if (row < 0 || lane_id() % P::kLanes || !a.grad_rel_h.data) continue;
        const Grid& grad = a.grad_rel_h;
        const int64_t at = shared.piece * a.grad_rel_h_part + shared.batch * grad.batch + shared.head * grad.head + row * grad.row + step;
        write_number(a.grad_rel_h_kind, grad.data, at, sum);
      }
    } else if constexpr (kOwnsKeys) {
#pragma unroll
      for (int r = 0; r < P::kRows; ++r)
#pragma unroll
        for (int k = 0; k < P::kKeys; ++k) of_key[r] += slopes.logit(r, k);
      if (a.grad_value.data) scores.multiply_values(shared.second[stage]);
      // float's weights are where its slopes go now
      if constexpr (sizeof(T) == 4) __syncwarp();
      if (a.grad_key.data) slopes.multiply_values(shared.first[stage]);
    } else {
      slopes.multiply_values(shared.first[stage]);
    }
  }
  if (!busy) return;

  const int32_t* rows = shared.rows + first;
  const int64_t batch = shared.batch, of_head = shared.head;
  if constexpr (kRelPos) {
    const Grid& grad = a.grad_rel_w;
    if (!grad.data) return;
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      const int row = rows[scores.row(r)];
#pragma unroll
      for (int k = 0; k < P::kKeys; ++k) {
        const int column = shared.piece * Shape::kKeys + scores.key(k);
        if (row >= 0 && column < p.rel_width)
          write_number(p.rel, grad.data, batch * grad.batch + of_head * grad.head + row * grad.row + column, columns[r][k]);
      }
    }
  } else {
    // by way of shared memory, where the warp's own rows were, so that rows are written 16 bytes at a time
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      slopes.store_row(r, p.scale * kLn2);
      if constexpr (kOwnsKeys) {
        scores.store_row(r, 1.0f);
        const float sum = sum_lanes<P::kLanes>(of_key[r]);
        const int row = rows[scores.row(r)];
        if (a.grad_bias && row >= 0 && lane_id() % P::kLanes == 0)
          a.grad_bias[(batch * (p.heads / p.group) + of_head) * p.keys + row] = sum;
      }
    }
    __syncwarp();
    const Grid& grad = kOwnsKeys ? a.grad_key : a.grad_query;
    if (grad.data) write_rows<Shape>(slopes.query, grad.at<T>(batch, of_head), grad.row, p.width, p.aligned, rows);
    if (kOwnsKeys && a.grad_value.data)
      write_rows<Shape>(scores.query, a.grad_value.at<T>(batch, of_head), a.grad_value.row, p.value_width, p.aligned, rows);
  }
}

struct RowTermArguments {
  Grid grad_out, out;  // [B, H, K, Dv]
  const float* lse;    // [B, H, K] dense, as the forward pass gives it
  float *lse_out, *delta;
  int64_t rows;  // B H K
  int heads, slots, width;
  bool aligned;
};

// Of each query slot what the kernels above need, computed once: eight lanes a slot.
constexpr int kRowTermThreads = 128, kRowTermRows = kRowTermThreads / 8;
template <class T>
__global__ void __launch_bounds__(kRowTermThreads) row_terms(RowTermArguments a) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kRowTermRows + threadIdx.x / 8;
  const bool exists = number < a.rows;
  const float natural = exists ? a.lse[number] : -kInfinity;
  float sum = 0.0f;
  if (natural != -kInfinity) {
    const int64_t b = number / a.slots / a.heads, h = number / a.slots % a.heads, slot = number % a.slots;
    const T* grad = a.grad_out.at<T>(b, h) + slot * a.grad_out.row;
    const T* out = a.out.at<T>(b, h) + slot * a.out.row;
    for (int c = threadIdx.x % 8 * Wide<T>::kCount; c < a.width; c += 8 * Wide<T>::kCount) {
      const Wide<T> x = a.aligned ? load_run<true>(grad, c, a.width) : load_run<false>(grad, c, a.width);
      const Wide<T> y = a.aligned ? load_run<true>(out, c, a.width) : load_run<false>(out, c, a.width);
#pragma unroll
      for (int j = 0; j < Wide<T>::kCount; ++j) sum += to_float(x.at[j]) * to_float(y.at[j]);
    }
  }
  sum = sum_lanes<8>(sum);
  if (!exists || threadIdx.x % 8) return;
  a.lse_out[number] = natural == -kInfinity ? kInfinity : to_log2(natural);
  a.delta[number] = sum;
}

struct CellArguments {
  Lists lists;     // [lists, slots]
  int32_t* cells;  // [samples, heads, keys] dense, all -1
  int64_t count;   // of slots in all
  int heads, slots, keys;
};

// A list in the order of its rows, -1 for a row that it does not name. A row is named once, so every cell has one writer.
constexpr int kCellThreads = 256;
__global__ void __launch_bounds__(kCellThreads) list_cells(CellArguments a) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  if (number >= a.count) return;
  const int64_t list = number / a.slots, b = list / a.heads, h = list % a.heads;
  const int row = SlotList(a.lists, b, h, a.keys).row(number % a.slots, a.slots);
  if (row >= 0) a.cells[list * a.keys + row] = row;
}

}  // namespace
}  // namespace tokenops
