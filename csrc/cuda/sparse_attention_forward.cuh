// The forward kernels: a team of warps owns a block of query slots of one head and walks over the keys that they see.
#pragma once

#include "sparse_attention_products.cuh"

namespace tokenops {
namespace {

struct ForwardArguments {
  AttentionProblem p;
  Grid out;  // [B, H, K, Dv] by slot, or [B, H, N, Dv] by row
  bool by_row;
  float* lse;     // [B, H, K] dense
  float* row_sq;  // the same, or null
  int64_t teams;  // blocks of query slots in all
  int blocks;     // of a head
};

// up to here the last place of a float is an exponent of at most 1
constexpr float kMostFused = 16777216.0f;

// How a kernel cuts its work. Several teams of one warp share a thread block, each with a head of its own; a larger team is a block. Its
// warps share out the rows or, where Split, the keys of a tile.
template <class Number, int Width, int Warps, int RowTiles, int Keys, int Stages, bool Full, bool Split = false>
struct ForwardShape {
  using T = Number;
  static constexpr int kWidth = Width;  // of heads, padded
  static constexpr int kWarps = Warps, kTeam = Warps * kWarp;
  static constexpr int kRowTiles = RowTiles, kWarpRows = 16 * RowTiles, kRows = (Split ? 1 : Warps) * kWarpRows;  // of queries
  static constexpr int kTileKeys = Keys, kKeys = Split ? Keys / Warps : Keys, kStages = Stages;  // of a tile, a warp's; tiles in flight
  static constexpr bool kSplit = Split, kFull = Full;                                            // attn_mask, rel_pos and row_sq are served
  // tiles whose ids are known: rows are copied kStages - 1 tiles ahead, and their ids as far ahead of those
  static constexpr int kIdTiles = 2 * kStages - 1;
  // what a mask adds passes through shared memory, and so do float's weights; rows of this pitch begin eight banks apart
  static constexpr int kWeightPitch = Keys + 8;
  static constexpr bool kHoldQuery = RowTiles * Width <= 128;

  struct Team {
    alignas(128) T query[kRows * TileRows<T, Width>::kPitch];
    alignas(128) T key[Stages][Keys * TileRows<T, Width>::kPitch];
    alignas(128) T value[Stages][Keys * TileRows<T, Width>::kPitch];
    alignas(16) float weights[sizeof(T) == 4 || Full ? kRows * kWeightPitch : 1];
    float bias[Stages][Keys];
    int32_t rows[kRows], ids[kIdTiles][Keys];
    // whose rows these are, for later
    int batch, head, kv_head, first, end;
    int partial[2][Warps];
    float highest[Split ? Warps : 1][kWarpRows], total[Split ? Warps : 1][kWarpRows];
  };
  // what fits a block of any architecture
  static constexpr int kTeams = teams_of_block(Warps, sizeof(Team));
  static constexpr int kThreads = kTeams * kTeam;
  struct Shared {
    Team team[kTeams];
  };
};

// The keys that a block of queries meets, tile by tile. It is told the head each time: pointers kept through the loop over tiles would
// cost registers that the products need.
template <class Shape>
struct KeyTiles {
  using T = typename Shape::T;
  typename Shape::Team& shared;
  const AttentionProblem& p;
  const Span slots;
  const int thread;

  __device__ __forceinline__ int count() const { return (slots.end - slots.begin + Shape::kTileKeys - 1) / Shape::kTileKeys; }
  __device__ __forceinline__ int32_t* ids(int tile) const { return shared.ids[tile % Shape::kIdTiles]; }

  __device__ __forceinline__ void start_ids(int tile, int64_t b, int kv_head) const {
    const SlotList list(p.kv_index, b, kv_head, p.keys);
    copy_ids<Shape::kTileKeys, Shape::kTeam>(ids(tile), list, slots.begin + tile * Shape::kTileKeys, slots.end, thread);
  }
  // its ids have arrived
  __device__ __forceinline__ void start_rows(int tile, int64_t b, int kv_head) const {
    if (tile >= count()) return;
    const int stage = tile % Shape::kStages;
    copy_keys<Shape::kTileKeys, Shape::kWidth, Shape::kTeam>(p, b, kv_head, ids(tile), shared.key[stage], shared.value[stage],
                                                             shared.bias[stage], thread);
  }
};

// Where warps share out the keys, the first is given what all of them found, in one order; it alone goes on.
template <class Shape>
__device__ __forceinline__ bool join_warps(typename Shape::Team& shared, Products<Shape>& products, int warp,
                                           float (&highest)[Products<Shape>::kRows], float (&total)[Products<Shape>::kRows]) {
  using P = Products<Shape>;
  constexpr int kPitch = Shape::kWidth + 8, kOther = Shape::kWarpRows * kPitch;
  const bool leads = lane_id() % P::kLanes == 0;
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    const float sum = sum_lanes<P::kLanes>(total[r]);
    if (!leads) continue;
    shared.highest[warp][products.row(r)] = highest[r];
    shared.total[warp][products.row(r)] = sum;
  }
  __syncthreads();
  // nobody needs the keys any more
  static_assert((Shape::kWarps - 1) * kOther * sizeof(float) <= sizeof(shared.key));
  float* const others = reinterpret_cast<float*>(shared.key);
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    const int row = products.row(r);
    float above = -kInfinity, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) above = fmaxf(above, shared.highest[w][row]);
    const float origin = above == -kInfinity ? 0.0f : above;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) sum += shared.total[w][row] * exp2_fast(shared.highest[w][row] - origin);
    products.scale_row(r, exp2_fast(highest[r] - origin));
    highest[r] = above;
    // of the lanes that share the row
    total[r] = leads ? sum : 0.0f;
    if (warp > 0)
#pragma unroll
      for (int i = 0; i < P::kColumns; ++i) others[(warp - 1) * kOther + row * kPitch + products.column(i)] = products.sum(r, i);
  }
  __syncthreads();
  if (warp > 0) return false;
  for (int w = 0; w < Shape::kWarps - 1; ++w)
#pragma unroll
    for (int r = 0; r < P::kRows; ++r)
#pragma unroll
      for (int i = 0; i < P::kColumns; ++i) products.sum(r, i) += others[w * kOther + products.row(r) * kPitch + products.column(i)];
  return true;
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_forward(ForwardArguments a) {
  using T = typename Shape::T;
  using Tile = TileRows<T, Shape::kWidth>;
  using P = Products<Shape>;
  const AttentionProblem& p = a.p;

  const int thread = threadIdx.x % Shape::kTeam, warp = warp_id() % Shape::kWarps;
  auto& shared = shared_memory<typename Shape::Shared>().team[threadIdx.x / Shape::kTeam];
  const int64_t number = static_cast<int64_t>(blockIdx.x) * Shape::kTeams + threadIdx.x / Shape::kTeam;
  if (number >= a.teams) return;
  const int64_t b = number / a.blocks / p.heads;
  const int h = number / a.blocks % p.heads;
  int block = number % a.blocks;
  // the longest blocks start first
  if (p.causal && !p.packed()) block = a.blocks - 1 - block;
  const Work work = find_work<Shape::kRows>(block, p.cu_seqlens_q, p.query_slots, p.cu_seqlens_k, p.key_slots, p.sequences);
  if (work.empty()) return;
  Span keys = work.others;

  const SlotList queries(p.q_index, b, h, p.rows);
  int last = -1;
  for (int i = thread; i < Shape::kRows; i += Shape::kTeam) {
    const int slot = work.first + i, row = work.padding ? -1 : queries.row(slot, work.own.end);
    shared.rows[i] = row;
    if (row >= 0) last = max(last, p.packed() ? slot - work.own.begin : row);
  }
  if (p.causal) {
    last = most_of_team(last, shared.partial[0]);
    keys = causal_keys<Shape::kTeam>(p, keys, b, h / p.group, last, shared.partial[1], thread);
  }
  const KeyTiles<Shape> tiles{shared, p, keys, thread};
  for (int tile = 0; tile < 2 * (Shape::kStages - 1); ++tile) tiles.start_ids(tile, b, h / p.group);
  if (thread == 0) {
    shared.batch = static_cast<int>(b);
    shared.head = h;
    shared.kv_head = h / p.group;
    shared.first = work.first;
    shared.end = work.own.end;
  }
  cp_async_commit();
  cp_async_wait<0>();
  if constexpr (Shape::kWarps == 1)
    __syncwarp();
  else
    __syncthreads();

  // where there is no key nobody waits for copies before results take the queries' place
  if (tiles.count() > 0)
    copy_rows<Shape::kRows, Shape::kWidth, Shape::kTeam>(shared.rows, p.rows, p.aligned, thread,
                                                         RowCopy<T>{shared.query, p.query.at<T>(b, h), p.query.row, p.width});
#pragma unroll
  for (int tile = 0; tile < Shape::kStages - 1; ++tile) {
    tiles.start_rows(tile, b, h / p.group);
    cp_async_commit();
  }

  // a warp's share of the team's rows, and of the keys of a tile
  const int share = Shape::kSplit ? 0 : warp, first = share * Shape::kWarpRows, part = Shape::kSplit ? warp * Shape::kKeys : 0;
  P products(shared.query + first * Tile::kPitch, shared.weights + (sizeof(T) == 4 ? first * Shape::kWeightPitch : 0));
  // the sums are of this lane's keys
  float highest[P::kRows], total[P::kRows], squares[P::kRows];
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    highest[r] = -kInfinity;
    total[r] = squares[r] = 0.0f;
  }
  const bool has_terms = p.has_terms(), masked = p.mask != Kind::none || p.rel != Kind::none, busy = work.first + first < work.own.end;
  const float unit = has_terms ? 1.0f : p.scale;
  const OwnOrder order{p.causal, p.packed(), shared.rows + first, work.first + first - work.own.begin};
  const int strictest = order.template strictest<false, Shape::kWarpRows>();

  for (int tile = 0; tile < tiles.count(); ++tile) {
    cp_async_wait<Shape::kStages - 2>();
    // and everybody is through with the tile before
    if constexpr (Shape::kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
    tiles.start_rows(tile + Shape::kStages - 1, shared.batch, shared.kv_head);
    tiles.start_ids(tile + 2 * (Shape::kStages - 1), shared.batch, shared.kv_head);
    cp_async_commit();
    // rows behind the end: this warp only helps to copy
    if (!busy) continue;
    if (tile == 0) products.start();
    products.multiply_keys(shared.key[tile % Shape::kStages] + part * Tile::kPitch);

    const int32_t* ids = tiles.ids(tile) + part;
    const int rank = tile * Shape::kTileKeys + part;
    if (has_terms) {
#pragma unroll
      for (int k = 0; k < P::kKeys; ++k) {
        const float bias = p.bias ? to_log2(shared.bias[tile % Shape::kStages][part + products.key(k)]) : 0.0f;
#pragma unroll
        for (int r = 0; r < P::kRows; ++r) products.logit(r, k) = products.logit(r, k) * p.scale + bias;
      }
    }
    if constexpr (Shape::kFull) {
      if (masked)
        add_terms<false>(products, shared.weights + first * Shape::kWeightPitch, p, shared.batch, shared.head, order.rows, order.rank, ids,
                         rank);
    }
    if (p.causal || p.kv_index.data || keys.end - keys.begin < rank + Shape::kKeys)
      hide<false>(products, order, strictest, ids, rank, p.keys);

    float shrink[P::kRows];
    bool rose = false;
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      float top = -kInfinity;
#pragma unroll
      for (int k = 0; k < P::kKeys; ++k) top = fmaxf(top, products.logit(r, k));
      const float above = fmaxf(highest[r], max_lanes<P::kLanes>(top) * unit);
      // as long as a row has seen no key its maximum is -inf, and -inf - -inf would be NaN
      const float origin = above == -kInfinity ? 0.0f : above;
      shrink[r] = exp2_fast(highest[r] - origin);
      rose |= shrink[r] != 1.0f;
      // A multiply-add does not round the product, while the origin is rounded: all weights of a row have one factor too many, which their
      // sum has too. Of huge logits it would be infinite.
      float slope = unit;
      if (fabsf(origin) > kMostFused) {
        slope = 1.0f;
#pragma unroll
        for (int k = 0; k < P::kKeys; ++k) products.logit(r, k) = __fmul_rn(products.logit(r, k), unit);
      }
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < P::kKeys; ++k) {
        float& weight = products.logit(r, k);
        weight = exp2_fast(weight * slope - origin);
        sum += weight;
      }
      total[r] = total[r] * shrink[r] + sum;
      highest[r] = above;
    }
    if (Shape::kFull && a.row_sq) {
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) {
        squares[r] *= shrink[r] * shrink[r];
#pragma unroll
        for (int k = 0; k < P::kKeys; ++k) squares[r] += products.logit(r, k) * products.logit(r, k);
      }
    }
    // after the first few tiles a maximum seldom rises
    if (__any_sync(kAllLanes, rose)) {
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) products.scale_row(r, shrink[r]);
    }
    products.multiply_values(shared.value[tile % Shape::kStages] + part * Tile::kPitch);
  }
  // no copy is under way: none was started for what lies behind the last tile
  if constexpr (Shape::kSplit) {
    if (!join_warps<Shape>(shared, products, warp, highest, total)) return;
  }

#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    const float sum = sum_lanes<P::kLanes>(total[r]), sum_of_squares = Shape::kFull ? sum_lanes<P::kLanes>(squares[r]) : 0.0f;
    // not "highest == -inf": a row of NaN logits is no empty row
    const bool empty = sum == 0.0f || shared.rows[first + products.row(r)] < 0;
    const float inverse = empty ? 0.0f : 1.0f / sum;
    // through shared memory, where the warp's own queries were, so that rows are written 16 bytes at a time
    products.store_row(r, inverse);
    const int slot = shared.first + first + products.row(r);
    if (lane_id() % P::kLanes || slot >= shared.end) continue;
    const int64_t at = (static_cast<int64_t>(shared.batch) * p.heads + shared.head) * p.query_slots + slot;
    const float natural = highest[r] + log2_fast(sum);
    // what to_log2 clamped to the lowest float is the lowest float in either unit
    a.lse[at] = empty ? -kInfinity : has_terms && highest[r] == kLowest ? natural : natural * kLn2;
    if (Shape::kFull && a.row_sq) a.row_sq[at] = empty ? 0.0f : sum_of_squares * inverse * inverse;
  }
  __syncwarp();
  T* const result = a.out.at<T>(shared.batch, shared.head);
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows * Tile::kPieces / kWarp; ++i) {
    const int place = lane_id() + i * kWarp, r = place / Tile::kPieces, piece = place % Tile::kPieces;
    const int slot = shared.first + first + r, row = a.by_row ? shared.rows[first + r] : slot;
    if (slot >= shared.end || row < 0 || piece * Tile::kPiece >= p.value_width) continue;
    T* to = result + row * a.out.row + piece * Tile::kPiece;
    const Wide<T> numbers = load_wide(products.query + Tile::at(r, piece));
    if (p.aligned)
      store_wide(to, numbers);
    else
      for (int j = 0; j < Tile::kPiece; ++j) to[j] = numbers.at[j];
  }
}

}  // namespace
}  // namespace tokenops
