// The forward kernels: a team of warps owns a block of query slots of one head and walks over the keys that they see.
#pragma once

#include "sparse_attention.cuh"

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

// How a kernel cuts its work. Several teams of one warp share a thread block, each with a head of its own; a larger team is a block.
template <class Number, int Width, int Warps, int RowTiles, int Keys, int Stages, bool Masked>
struct ForwardShape {
  using T = Number;
  static constexpr int kWidth = Width;  // of heads, padded
  static constexpr int kWarps = Warps, kTeams = Warps == 1 ? 4 : 1, kTeam = Warps * kWarp, kThreads = kTeams * kTeam;
  static constexpr int kRowTiles = RowTiles, kWarpRows = 16 * RowTiles, kRows = Warps * kWarpRows;  // of queries
  static constexpr int kKeys = Keys, kStages = Stages;                                              // keys of a tile, tiles in flight
  static constexpr bool kMasked = Masked;                                                           // attn_mask and rel_pos are served
  // tiles whose ids are known: rows are copied kStages - 1 tiles ahead, and their ids as far ahead of those
  static constexpr int kIdTiles = 2 * kStages - 1;

  struct Team {
    alignas(128) T query[kRows * TileRows<T, Width>::kPitch];
    alignas(128) T key[Stages][Keys * TileRows<T, Width>::kPitch];
    alignas(128) T value[Stages][Keys * TileRows<T, Width>::kPitch];
    float bias[Stages][Keys];
    int32_t rows[kRows], ids[kIdTiles][Keys];
    int partial[Warps];
  };
  struct Shared {
    Team team[kTeams];
  };
};

// The keys that a block of queries meets, tile by tile.
template <class Shape>
struct KeyTiles {
  using T = typename Shape::T;
  typename Shape::Team& shared;
  const AttentionProblem& p;
  const SlotList list;
  const T *key, *value;
  const float* bias;
  int thread, begin, end;

  __device__ __forceinline__ KeyTiles(typename Shape::Team& shared, const AttentionProblem& p, int64_t b, int64_t kv_head, Span slots,
                                      int thread)
      : shared(shared),
        p(p),
        list(p.kv_index, b, kv_head, p.keys),
        key(p.key.at<T>(b, kv_head)),
        value(p.value.at<T>(b, kv_head)),
        bias(p.bias ? p.bias + b * p.bias_batch + kv_head * p.bias_head : nullptr),
        thread(thread),
        begin(slots.begin),
        end(slots.end) {}

  __device__ __forceinline__ int count() const { return (end - begin + Shape::kKeys - 1) / Shape::kKeys; }
  __device__ __forceinline__ int32_t* ids(int tile) const { return shared.ids[tile % Shape::kIdTiles]; }

  __device__ __forceinline__ void start_ids(int tile) const {
    copy_ids<Shape::kKeys, Shape::kTeam>(ids(tile), list, begin + tile * Shape::kKeys, end, thread);
  }
  // its ids have arrived
  __device__ __forceinline__ void start_rows(int tile) const {
    if (tile >= count()) return;
    const int stage = tile % Shape::kStages;
    copy_rows<Shape::kKeys, Shape::kWidth, Shape::kTeam>(shared.key[stage], key, p.key.row, p.width, p.aligned, ids(tile), p.keys, thread);
    copy_rows<Shape::kKeys, Shape::kWidth, Shape::kTeam>(shared.value[stage], value, p.value.row, p.value_width, p.aligned, ids(tile),
                                                         p.keys, thread);
    if (!bias) return;
    for (int i = thread; i < Shape::kKeys; i += Shape::kTeam) {
      const int id = ids(tile)[i];
      const bool valid = names(id, p.keys);
      cp_async_4(&shared.bias[stage][i], valid ? bias + id * p.bias_row : bias, valid);
    }
  }
};

// What a thread holds of a warp's rows: of each tile of 16, rows lane / 4 and lane / 4 + 8.
template <class Shape>
struct RowState {
  static constexpr int kRowTiles = Shape::kRowTiles;
  int row[kRowTiles][2];                                                    // of the grid, or -1
  int limit[kRowTiles][2];                                                  // the last key that it sees, if causal
  float highest[kRowTiles][2], total[kRowTiles][2], squares[kRowTiles][2];  // the sums are of this lane's keys
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads) attention_forward(ForwardArguments a) {
  using T = typename Shape::T;
  using Tile = TileRows<T, Shape::kWidth>;
  constexpr int W = Shape::kWidth, kRowTiles = Shape::kRowTiles, kKeyTiles = Shape::kKeys / 8;
  // larger ones are read again for every tile of keys
  constexpr bool kHoldQuery = kRowTiles * W <= 128;
  const AttentionProblem& p = a.p;

  const int thread = threadIdx.x % Shape::kTeam, warp = warp_id() % Shape::kWarps, lane = lane_id();
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
  const int first = work.first + warp * Shape::kWarpRows;  // slot of this warp
  int last = -1;
  for (int i = thread; i < Shape::kRows; i += Shape::kTeam) {
    const int slot = work.first + i, row = queries.row(slot, work.own.end);
    shared.rows[i] = row;
    if (row >= 0) last = max(last, p.packed() ? slot - work.own.begin : row);
  }
  if (p.causal) {
    const auto larger = [](int x, int y) { return max(x, y); };
    const auto over_team = [&](int x) {
      if constexpr (Shape::kWarps == 1) return fold_lanes(x, larger);
      return fold_block(x, shared.partial, larger);
    };
    last = over_team(last);
    if (p.packed() || !p.kv_index.data) {
      keys.end = min(keys.end, keys.begin + last + 1);
    } else {
      // of an ascending list this skips all the rest; of any list, nothing visible
      const SlotList list(p.kv_index, b, h / p.group, p.keys);
      int bound = keys.begin;
      for (int slot = keys.begin + thread; slot < keys.end; slot += Shape::kTeam) {
        const int row = list.row(slot, keys.end);
        if (row >= 0 && row <= last) bound = slot + 1;
      }
      keys.end = over_team(bound);
    }
  }
  const KeyTiles<Shape> tiles(shared, p, b, h / p.group, keys, thread);
  for (int tile = 0; tile < 2 * (Shape::kStages - 1); ++tile) tiles.start_ids(tile);
  cp_async_commit();
  cp_async_wait<0>();
  if constexpr (Shape::kWarps == 1)
    __syncwarp();
  else
    __syncthreads();

  copy_rows<Shape::kRows, W, Shape::kTeam>(shared.query, p.query.at<T>(b, h), p.query.row, p.width, p.aligned, shared.rows, p.rows, thread);
#pragma unroll
  for (int tile = 0; tile < Shape::kStages - 1; ++tile) {
    tiles.start_rows(tile);
    cp_async_commit();
  }

  RowState<Shape> state;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int place = warp * Shape::kWarpRows + i * 16 + lane / 4 + r * 8, row = shared.rows[place];
      state.row[i][r] = row;
      state.limit[i][r] = !p.causal ? INT32_MAX - 1 : row < 0 || !p.packed() ? row : work.first + place - work.own.begin;
      state.highest[i][r] = -kInfinity;
      state.total[i][r] = state.squares[i][r] = 0.0f;
    }
  const bool has_terms = p.has_terms(), busy = first < work.own.end;
  const float unit = has_terms ? 1.0f : p.scale;
  float out[kRowTiles][W / 8][4] = {};
  uint32_t query[kRowTiles][kHoldQuery ? W / 16 : 1][4];
  T* const own_query = shared.query + warp * Shape::kWarpRows * Tile::kPitch;
  const auto load_query = [&](uint32_t (&to)[4], int i, int step) {
    ldmatrix(to, own_query + Tile::at(i * 16 + lane % 16, step * 2 + lane / 16));
  };

  for (int tile = 0; tile < tiles.count(); ++tile) {
    cp_async_wait<Shape::kStages - 2>();
    // and everybody is through with the tile before
    if constexpr (Shape::kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
    tiles.start_rows(tile + Shape::kStages - 1);
    tiles.start_ids(tile + 2 * (Shape::kStages - 1));
    cp_async_commit();
    // rows behind the end: this warp only helps to copy
    if (!busy) continue;
    if constexpr (kHoldQuery)
      if (tile == 0)
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int step = 0; step < W / 16; ++step) load_query(query[i][step], i, step);

    float logit[kRowTiles][kKeyTiles][4] = {};
    const T* key = shared.key[tile % Shape::kStages];
#pragma unroll
    for (int step = 0; step < W / 16; ++step) {
      if constexpr (!kHoldQuery)
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) load_query(query[i][0], i, step);
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t pair[4];
        ldmatrix(pair, key + Tile::at(j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma<T>(logit[i][j], query[i][kHoldQuery ? step : 0], pair[0], pair[1]);
          mma<T>(logit[i][j + 1], query[i][kHoldQuery ? step : 0], pair[2], pair[3]);
        }
      }
    }

    const int32_t* ids = tiles.ids(tile);
    const int rank = tile * Shape::kKeys;
    if (has_terms) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float bias = p.bias ? to_log2(shared.bias[tile % Shape::kStages][j * 8 + lane % 4 * 2 + c]) : 0.0f;
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) logit[i][j][2 * r + c] = logit[i][j][2 * r + c] * p.scale + bias;
        }
      if constexpr (Shape::kMasked) {
        Terms(p, b, h).apply([&](auto&& change) {
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int at = j * 8 + lane % 4 * 2 + c, column = ids[at];
              if (!names(column, p.keys)) continue;
#pragma unroll
              for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                  if (state.row[i][r] >= 0) change(logit[i][j][2 * r + c], state.row[i][r], column, p.packed() ? rank + at : column);
            }
        });
      }
    }
    if (p.causal || p.kv_index.data || keys.end - keys.begin < rank + Shape::kKeys) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = j * 8 + lane % 4 * 2 + c, id = ids[at];
          const int place = !names(id, p.keys) ? INT32_MAX : p.packed() ? rank + at : id;
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r)
              if (place > state.limit[i][r]) logit[i][j][2 * r + c] = -kInfinity;
        }
    }

    float shrink[kRowTiles][2];
    bool rose = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = -kInfinity;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j) top = fmaxf(top, fmaxf(logit[i][j][2 * r], logit[i][j][2 * r + 1]));
        const float above = fmaxf(state.highest[i][r], max_lanes<4>(top) * unit);
        // as long as a row has seen no key its maximum is -inf, and -inf - -inf would be NaN
        const float origin = above == -kInfinity ? 0.0f : above;
        shrink[i][r] = exp2_fast(state.highest[i][r] - origin);
        rose |= shrink[i][r] != 1.0f;
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float weight = exp2_fast(logit[i][j][2 * r + c] * unit - origin);
            logit[i][j][2 * r + c] = weight;
            sum += weight;
            squares += weight * weight;
          }
        state.total[i][r] = state.total[i][r] * shrink[i][r] + sum;
        state.squares[i][r] = state.squares[i][r] * shrink[i][r] * shrink[i][r] + squares;
        state.highest[i][r] = above;
      }
    // after the first few tiles a maximum seldom rises
    if (__any_sync(kAllLanes, rose)) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < W / 8; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) out[i][j][c] *= shrink[i][c / 2];
    }

    const T* value = shared.value[tile % Shape::kStages];
#pragma unroll
    for (int step = 0; step < kKeyTiles / 2; ++step) {
      // where a product leaves its result, the next takes its left operand
      uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const float (&pair)[4] = logit[i][2 * step + part / 2];
          weights[i][part] = pack<T>(pair[part % 2 * 2], pair[part % 2 * 2 + 1]);
        }
#pragma unroll
      for (int j = 0; j < W / 8; j += 2) {
        uint32_t pair[4];
        ldmatrix_transposed(pair, value + Tile::at(step * 16 + lane % 16, j + lane / 16));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma<T>(out[i][j], weights[i], pair[0], pair[1]);
          mma<T>(out[i][j + 1], weights[i], pair[2], pair[3]);
        }
      }
    }
  }
  // of ids and rows that no tile needed
  cp_async_wait<0>();

  float inverse[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = sum_lanes<4>(state.total[i][r]), squares = sum_lanes<4>(state.squares[i][r]);
      // not "highest == -inf": a row of NaN logits is no empty row
      const bool empty = total == 0.0f || state.row[i][r] < 0;
      inverse[i][r] = empty ? 0.0f : 1.0f / total;
      const int slot = first + i * 16 + lane / 4 + r * 8;
      if (lane % 4 || slot >= work.own.end) continue;
      const int64_t at = (b * p.heads + h) * p.query_slots + slot;
      const float highest = state.highest[i][r], natural = highest + log2_fast(total);
      // what to_log2 clamped to the lowest float is the lowest float in either unit
      a.lse[at] = empty ? -kInfinity : has_terms && highest == kLowest ? natural : natural * kLn2;
      if (a.row_sq) a.row_sq[at] = empty ? 0.0f : squares * inverse[i][r] * inverse[i][r];
    }
  // through shared memory, where the warp's own queries were, so that rows are written 16 bytes at a time
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < W / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool empty = inverse[i][r] == 0.0f;
        const float x = empty ? 0.0f : out[i][j][2 * r] * inverse[i][r], y = empty ? 0.0f : out[i][j][2 * r + 1] * inverse[i][r];
        *reinterpret_cast<uint32_t*>(own_query + Tile::at(i * 16 + lane / 4 + r * 8, j) + lane % 4 * 2) = pack<T>(x, y);
      }
  __syncwarp();
  T* const result = a.out.at<T>(b, h);
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows * Tile::kPieces / kWarp; ++i) {
    const int place = lane + i * kWarp, r = place / Tile::kPieces, piece = place % Tile::kPieces;
    const int row = a.by_row ? shared.rows[warp * Shape::kWarpRows + r] : first + r;
    if (first + r >= work.own.end || row < 0 || piece * Tile::kPiece >= p.value_width) continue;
    T* to = result + row * a.out.row + piece * Tile::kPiece;
    const Wide<T> numbers = load_wide(own_query + Tile::at(r, piece));
    if (p.aligned)
      store_wide(to, numbers);
    else
      for (int j = 0; j < Tile::kPiece; ++j) to[j] = numbers.at[j];
  }
}

}  // namespace
}  // namespace tokenops
