// What the attention kernels share: the problem, which slots a block owns, rows on their way to shared memory, the terms of a logit.
//
// Letters as everywhere: B batch, N and M grid rows, K and L kept slots, H heads, D and Dv head widths. A *slot* is a place in an index
// list, a *row* is what the list names there; without a list slot s is row s. Logits and what is added to them are in units of log2, so
// that a weight is one exp2.
#pragma once

#include "tiles.cuh"

namespace tokenops {
namespace {

// How many teams of so many warps and bytes share a thread block: of one warp as many as fit, four at most.
constexpr int teams_of_block(int warps, size_t bytes) {
  return warps > 1 ? 1 : 4 * bytes <= kMostShared ? 4 : 2 * bytes <= kMostShared ? 2 : 1;
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.402823466e38f, kInfinity = __builtin_huge_valf();

enum class Kind { none, boolean, f32, bf16, f16 };

// [B, H, rows, width], the last dimension dense. Strides count elements, 0 where one serves all.
struct Grid {
  void* data;
  int64_t batch, head, row;

  template <class T>
  __device__ __forceinline__ T* at(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * batch + h * head;
  }
};

// [B, H, slots] row ids, -1 = empty slot; null: a slot is its own row
struct Lists {
  const int32_t* data;
  int64_t batch, head, slot;
};

struct AttentionProblem {
  Grid query, key, value;
  Lists q_index, kv_index;
  const float* bias;  // [B, kv head, M] or null
  int64_t bias_batch, bias_head, bias_row;
  Kind mask;  // [B, H, N, M]
  const void* mask_data;
  int64_t mask_batch, mask_head, mask_row, mask_column;
  Kind rel;  // rel_h [B, H, N, rel_height], rel_w [B, H, N, rel_width]
  Grid rel_h, rel_w;
  int rel_height, rel_width;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [sequences + 1], or null
  int sequences;
  int rows, keys;              // N, M
  int query_slots, key_slots;  // K, L
  int heads, group;            // query heads, and how many of them share a kv head
  int width, value_width;      // D, Dv
  float scale;                 // of the logits, times log2(e)
  bool causal;
  bool aligned;  // every row of every grid of the call begins at a multiple of 16 bytes

  __device__ __forceinline__ bool packed() const { return cu_seqlens_q != nullptr; }
  // anything but a positive scale and empty slots: then logits are scaled before their maximum is taken
  __host__ __device__ bool has_terms() const { return bias || mask != Kind::none || rel != Kind::none || !(scale > 0.0f); }
};

// Natural units to units of log2. What was finite stays finite, so that a row of the lowest float is not an empty row.
__device__ __forceinline__ float to_log2(float x) {
  const float scaled = x * kLog2e;
  return scaled < kLowest && x >= kLowest ? kLowest : scaled;
}

// Whether an id names a row. Content checks are not made on a device: what is out of range is an empty slot.
__device__ __forceinline__ bool names(int id, int rows) { return static_cast<unsigned>(id) < static_cast<unsigned>(rows); }

// One head's list.
struct SlotList {
  const int32_t* ids;  // or null
  int64_t stride;
  int rows;  // of the grid

  __device__ __forceinline__ SlotList(const Lists& lists, int64_t b, int64_t h, int rows)
      : ids(lists.data ? lists.data + b * lists.batch + h * lists.head : nullptr), stride(lists.slot), rows(rows) {}
  // the row of a slot, or -1
  __device__ __forceinline__ int row(int slot, int end) const {
    if (slot >= end) return -1;
    const int id = ids ? ids[slot * stride] : slot;
    return names(id, rows) ? id : -1;
  }
};

struct Span {
  int begin, end;
};

// The slots of a packed sequence; number `sequences` is the padding behind the last one. Whatever cu_seqlens holds, no slot outside of
// the list is touched.
__device__ __forceinline__ Span span_of(const int32_t* cu_seqlens, int sequence, int sequences, int slots) {
  const int begin = min(max(cu_seqlens[sequence], 0), slots);
  return {begin, sequence < sequences ? min(max(cu_seqlens[sequence + 1], begin), slots) : slots};
}

// A block of slots of one side, its owner's, and the slots of the other side that it meets. Nothing else writes the owner's results: no
// atomics, the same bits every run.
struct Work {
  int first;     // slot of the block
  Span own;      // slots of its head or sequence
  Span others;   // of the other side
  bool padding;  // behind the last sequence: slots that name no row

  __device__ __forceinline__ bool empty() const { return first >= own.end; }
};

// Blocks of `Block` slots that a head has at least, whatever cu_seqlens holds: it stays on the device.
__host__ __device__ inline int64_t blocks_of(int64_t slots, int block, bool packed, int64_t sequences) {
  return packed ? slots / block + sequences + 1 : (slots + block - 1) / block;
}

// Sequence s owns the blocks from cu_seqlens[s] / Block + s on. That is never fewer than it needs; the surplus, at most one a sequence,
// is empty.
template <int Block>
__device__ __forceinline__ Work find_work(int block, const int32_t* own_bounds, int own_slots, const int32_t* other_bounds, int other_slots,
                                          int sequences) {
  if (!own_bounds) return {block * Block, {0, own_slots}, {0, other_slots}, false};
  int low = 0, high = sequences;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (own_bounds[middle] / Block + middle <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const Span own = span_of(own_bounds, low, sequences, own_slots);
  Span others = span_of(other_bounds, low, sequences, other_slots);
  if (low == sequences) others.end = others.begin;
  // not past the end of int where bounds are nonsense
  const int64_t first = own.begin + (static_cast<int64_t>(block) - (own.begin / Block + low)) * Block;
  return {static_cast<int>(min(max(first, static_cast<int64_t>(own.begin)), static_cast<int64_t>(own.end))), own, others, low == sequences};
}

// The largest number of a team's threads. `partial` is shared memory that is used once.
template <int Warps>
__device__ __forceinline__ int most_of_team(int number, int (&partial)[Warps]) {
  number = fold_lanes(number, [](int a, int b) { return max(a, b); });
  if constexpr (Warps > 1) {
    if (lane_id() == 0) partial[warp_id()] = number;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < Warps; ++warp) number = max(number, partial[warp]);
  }
  return number;
}

// Of the key slots those that queries up to the row `last` may meet, or up to that rank in a packed sequence. `partial` as above.
template <int Threads, int Warps>
__device__ __forceinline__ Span causal_keys(const AttentionProblem& p, Span slots, int64_t b, int kv_head, int last, int (&partial)[Warps],
                                            int thread) {
  if (p.packed() || !p.kv_index.data) return {slots.begin, slots.begin + min(slots.end - slots.begin, last + 1)};
  // of an ascending list this skips all the rest; of any list, nothing visible
  const SlotList list(p.kv_index, b, kv_head, p.keys);
  int bound = slots.begin;
  for (int slot = slots.begin + thread; slot < slots.end; slot += Threads) {
    const int row = list.row(slot, slots.end);
    if (row >= 0 && row <= last) bound = slot + 1;
  }
  return {slots.begin, most_of_team(bound, partial)};
}

// Rows of one head of a grid on their way into a tile. A grid by slot has the rows `first_slot` and the next, whatever ids name.
template <class T>
struct RowCopy {
  T* tile;
  const T* grid;
  int64_t stride;
  int width;
  int first_slot = -1;

  // 32 bits hold the bytes between rows (grid_of): one instruction instead of four
  __device__ __forceinline__ const T* row(int r, int id) const {
    const int apart = static_cast<int>(stride) * static_cast<int>(sizeof(T));
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(grid) +
                                      static_cast<int64_t>(first_slot < 0 ? id : first_slot + r) * apart);
  }
};

// Starts copies of `Rows` rows, `ids` of them in shared memory, into tiles: zeros for empty slots and beyond the width of a grid. Grids
// that are not aligned are copied at once, number by number.
template <int Rows, int W, int Threads, class T, class... More>
__device__ __forceinline__ void copy_rows(const int32_t* ids, int rows, bool aligned, int thread, const RowCopy<T>& copy,
                                          const More&... more) {
  using Tile = TileRows<T, W>;
  constexpr int kPieces = Tile::kPieces, kPlaces = Rows * kPieces;
  if (aligned) {
    // from a thread's row to its next; its piece is the same in all of them
    constexpr int kApart = Threads % kPieces ? 0 : Threads / kPieces;
#pragma unroll
    for (int i = 0; i < (kPlaces + Threads - 1) / Threads; ++i) {
      const int place = thread + i * Threads, r = place / kPieces, piece = place % kPieces;
      if (kPlaces % Threads && r >= Rows) break;
      const int id = ids[r], at = kApart && kApart % 8 == 0 ? Tile::at(thread / kPieces, piece, i * kApart) : Tile::at(r, piece);
      const bool exists = names(id, rows);
      const auto start = [&](const RowCopy<T>& one) {
        cp_async_16(one.tile + at, one.row(r, exists ? id : 0) + piece * Tile::kPiece, exists && piece * Tile::kPiece < one.width);
      };
      start(copy), (start(more), ...);
    }
    return;
  }
#pragma unroll 1
  for (int i = thread; i < Rows * W; i += Threads) {
    const int r = i / W, c = i % W, at = Tile::at(r, c / Tile::kPiece) + c % Tile::kPiece;
    const bool exists = names(ids[r], rows);
    const auto put = [&](const RowCopy<T>& one) { one.tile[at] = exists && c < one.width ? one.row(r, ids[r])[c] : T{}; };
    put(copy), (put(more), ...);
  }
}

// Starts copies of a tile of keys, their values and, where there is one, their bias.
template <int Keys, int W, int Threads, class T>
__device__ __forceinline__ void copy_keys(const AttentionProblem& p, int64_t b, int kv_head, const int32_t* ids, T* keys, T* values,
                                          float* to_bias, int thread) {
  copy_rows<Keys, W, Threads>(ids, p.keys, p.aligned, thread, RowCopy<T>{keys, p.key.at<T>(b, kv_head), p.key.row, p.width},
                              RowCopy<T>{values, p.value.at<T>(b, kv_head), p.value.row, p.value_width});
  if (!p.bias) return;
  const float* bias = p.bias + b * p.bias_batch + kv_head * p.bias_head;
  for (int i = thread; i < Keys; i += Threads) {
    const bool valid = names(ids[i], p.keys);
    cp_async_4(to_bias + i, valid ? bias + ids[i] * p.bias_row : bias, valid);
  }
}

// Starts copies of the ids of slots `first` and the next; -1 behind the end.
template <int Count, int Threads>
__device__ __forceinline__ void copy_ids(int32_t* ids, const SlotList& list, int first, int end, int thread) {
  for (int i = thread; i < Count; i += Threads) {
    const int slot = first + i;
    if (slot < end && list.ids)
      cp_async_4(ids + i, list.ids + slot * list.stride);
    else
      ids[i] = slot < end ? slot : -1;
  }
}

// What the mask and rel_pos add to the logits of one key with the queries of one head. The key is a row of the grid, and `rank` that of it
// in a packed sequence.
struct KeyTerms {
  const AttentionProblem& p;
  bool exists, has_cell = false;
  int64_t mask = 0, rel_h = 0, rel_w = 0;  // places of row 0

  __device__ __forceinline__ KeyTerms(const AttentionProblem& p, int64_t b, int64_t h, int key, int rank)
      : p(p), exists(names(key, p.keys)) {
    if (!exists) return;
    if (p.mask != Kind::none) mask = b * p.mask_batch + h * p.mask_head + key * p.mask_column;
    const int cell = p.packed() ? rank : key;
    has_cell = p.rel != Kind::none && cell < p.rel_height * p.rel_width;
    if (!has_cell) return;
    rel_h = b * p.rel_h.batch + h * p.rel_h.head + cell / p.rel_width;
    rel_w = b * p.rel_w.batch + h * p.rel_w.head + cell % p.rel_width;
  }
  // -inf hides the key
  __device__ __forceinline__ float at(int row) const {
    float sum = 0.0f;
    if (!exists || !names(row, p.rows)) return sum;
    if (p.mask != Kind::none) sum = to_log2(number(p.mask, p.mask_data, mask + row * p.mask_row));
    if (has_cell)
      sum += to_log2(number(p.rel, p.rel_h.data, rel_h + row * p.rel_h.row) + number(p.rel, p.rel_w.data, rel_w + row * p.rel_w.row));
    return sum;
  }

 private:
  static __device__ __forceinline__ float number(Kind kind, const void* data, int64_t at) {
    if (kind == Kind::boolean) return static_cast<const uint8_t*>(data)[at] ? 0.0f : -kInfinity;
    if (kind == Kind::f32) return static_cast<const float*>(data)[at];
    if (kind == Kind::bf16) return to_float(static_cast<const bf16*>(data)[at]);
    return to_float(static_cast<const f16*>(data)[at]);
  }
};

}  // namespace
}  // namespace tokenops
