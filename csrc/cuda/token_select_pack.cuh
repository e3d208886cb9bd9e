// Between grids of rows and packed rows. Every list's filled slots are numbered by a block, the lists' lengths are added up by one, and
// then threads copy rows, as whole words of up to 16 bytes whatever the rows consist of. Counts stay on the device.
#pragma once

#include "device.cuh"

namespace tokenops {
namespace {

// row ids [1|L, K]. What is no row of a grid is an empty slot.
struct RowLists {
  const int32_t* index;
  int64_t list, slot;  // strides; one list for all: 0
  int slots, rows;
  __device__ __forceinline__ int at(int l, int s) const {
    const int id = index[l * list + s * slot];
    return id >= 0 && id < rows ? id : -1;
  }
};

struct NumberSlots {
  RowLists lists;
  // to pack: [1|L, K] which of its list's filled slots each is, -1 = empty; and [1|L] how many there are
  int32_t *ranks, *counts;
  // to unpack: [G, N] which packed row belongs to each row, -1 before
  int32_t* source;
  int64_t source_grid;    // 0: one grid for all lists
  const int32_t* bounds;  // [L + 1]
  int64_t bounds_stride;
  int packed_rows;
};

constexpr int kNumberItems = 8;

template <int Threads>
struct NumberShared {
  // in turns: the numbers of one chunk may still be read while the next chunk's are written
  int sums[2][Threads / kWarp];
};

// One block for each list.
template <int Threads>
__global__ void __launch_bounds__(Threads) number_slots(NumberSlots p) {
  auto& shared = shared_memory<NumberShared<Threads>>();
  const int list = static_cast<int>(blockIdx.x), lane = lane_id();
  // neighbouring slots for a warp, every 32nd of them for a lane
  const int first = warp_id() * (kWarp * kNumberItems) + lane;
  int seen = 0, turn = 0;
  int64_t begin = 0, length = 0;
  if (p.source) {
    begin = p.bounds[list * p.bounds_stride];
    length = p.bounds[(list + 1) * p.bounds_stride] - begin;
  }
  for (int start = 0; start < p.lists.slots; start += Threads * kNumberItems) {
    int ids[kNumberItems];
    unsigned filled = 0;
#pragma unroll
    for (int i = 0; i < kNumberItems; ++i) {
      const int slot = start + first + i * kWarp;
      ids[i] = slot < p.lists.slots ? p.lists.at(list, slot) : -1;
      filled += ids[i] >= 0;
    }
    const WarpSums<int> sums = sum_warps(static_cast<int>(__reduce_add_sync(kAllLanes, filled)), shared.sums[turn]);
    turn ^= 1;
    int before = seen + sums.before;
#pragma unroll
    for (int i = 0; i < kNumberItems; ++i) {
      const int slot = start + first + i * kWarp;
      const unsigned others = __ballot_sync(kAllLanes, ids[i] >= 0);
      const int rank = before + __popc(others & ((1u << lane) - 1));
      before += __popc(others);
      if (p.ranks && slot < p.lists.slots) p.ranks[static_cast<int64_t>(list) * p.lists.slots + slot] = ids[i] >= 0 ? rank : -1;
      if (p.source && ids[i] >= 0 && rank < length) {
        // bounds may be wrong, and then so is this row: it must not wrap round to one that exists
        const int64_t row = begin + rank;
        p.source[list * p.source_grid + ids[i]] = row < p.packed_rows ? static_cast<int>(row) : -1;
      }
    }
    seen += sums.all;
  }
  if (p.counts && threadIdx.x == 0) p.counts[list] = seen;
}

struct AddLengths {
  const int32_t* counts;  // [L]
  int64_t counts_stride;
  int32_t* bounds;  // [L + 1]
  int lists, most, packed_rows;
};

constexpr int kAddThreads = 1024;

struct AddShared {
  int64_t sums[2][kAddThreads / kWarp];
};

// One block: where each list's rows begin among the packed ones. What does not fit there is dropped.
__global__ void __launch_bounds__(kAddThreads) add_lengths(AddLengths p) {
  auto& shared = shared_memory<AddShared>();
  int64_t seen = 0;
  int turn = 0;
  if (threadIdx.x == 0) p.bounds[0] = 0;
  for (int start = 0; start < p.lists; start += kAddThreads) {
    const int list = start + static_cast<int>(threadIdx.x);
    const int64_t length = list < p.lists ? min(max(p.counts[list * p.counts_stride], 0), p.most) : 0;
    const int64_t until = sum_before(length) + length;
    const WarpSums<int64_t> sums = sum_warps(__shfl_sync(kAllLanes, until, kWarp - 1), shared.sums[turn]);
    turn ^= 1;
    if (list < p.lists) p.bounds[list + 1] = static_cast<int>(min(seen + sums.before + until, static_cast<int64_t>(p.packed_rows)));
    seen += sums.all;
  }
}

// rows of as many words each, 2^log_lanes neighbouring threads for one
struct RowCopies {
  const char* from;
  char* to;
  int words, log_lanes;
  int rows;  // jobs
};

constexpr int kCopyThreads = 256;

// Copies a row, or writes zeros if there is none.
template <class Word>
__device__ __forceinline__ void copy_row(char* to, const char* from, const RowCopies& p) {
  const int lanes = 1 << p.log_lanes;
  for (int i = static_cast<int>(threadIdx.x) & (lanes - 1); i < p.words; i += lanes)
    reinterpret_cast<Word*>(to)[i] = from ? reinterpret_cast<const Word*>(from)[i] : Word{};
}
__device__ __forceinline__ int64_t copied_row(const RowCopies& p) {
  return (int64_t{blockIdx.x} * kCopyThreads + threadIdx.x) >> p.log_lanes;
}

struct PackRows {
  RowCopies copies;
  RowLists lists;         // index null: slot s is row s
  const int32_t* ranks;   // [1|L, K]
  const int32_t* counts;  // [L] in place of ranks
  int64_t ranks_list, counts_stride;
  const int32_t* bounds;  // [L + 1]
  int64_t x_grid, x_row;  // strides in bytes; one grid for all lists: 0
  int64_t tokens_row;     // in bytes
  int number_of_lists, packed_rows;
};

// A job is a slot; and a packed row, which is zeroed if it is behind the last list's.
template <class Word>
__global__ void __launch_bounds__(kCopyThreads) pack_rows(PackRows p) {
  const int64_t job = copied_row(p.copies);
  if (job >= p.copies.rows) return;
  if (job < p.packed_rows && job >= p.bounds[p.number_of_lists]) copy_row<Word>(p.copies.to + job * p.tokens_row, nullptr, p.copies);
  const int j = static_cast<int>(job), slots = p.lists.slots;
  if (job >= static_cast<int64_t>(p.number_of_lists) * slots) return;
  const int list = j / slots, slot = j - list * slots;
  int id = slot, rank = slot;
  if (p.lists.index) {
    id = p.lists.at(list, slot);
    rank = p.ranks[list * p.ranks_list + slot];
  } else if (slot >= p.counts[list * p.counts_stride]) {
    return;
  }
  const int64_t row = static_cast<int64_t>(p.bounds[list]) + rank;
  if (id < 0 || row >= p.packed_rows) return;
  copy_row<Word>(p.copies.to + row * p.tokens_row, p.copies.from + list * p.x_grid + id * p.x_row, p.copies);
}

struct UnpackRows {
  RowCopies copies;
  const int32_t* source;  // [G, N]; null: the rows of a sample are the first ones of its grid
  const int32_t* bounds;  // [G + 1] then
  int64_t bounds_stride;
  int64_t x_grid, x_row, tokens_row;  // in bytes
  int rows, packed_rows;              // of a grid, and in all
};

// A job is a row of a grid.
template <class Word>
__global__ void __launch_bounds__(kCopyThreads) unpack_rows(UnpackRows p) {
  const int64_t job = copied_row(p.copies);
  if (job >= p.copies.rows) return;
  const int j = static_cast<int>(job), grid = j / p.rows, row = j - grid * p.rows;
  int64_t from = -1;
  if (p.source) {
    from = p.source[job];
  } else {
    const int64_t begin = p.bounds[grid * p.bounds_stride];
    if (row < p.bounds[(grid + 1) * p.bounds_stride] - begin) from = begin + row;
  }
  const bool exists = from >= 0 && from < p.packed_rows;
  copy_row<Word>(p.copies.to + grid * p.x_grid + row * p.x_row, exists ? p.copies.from + from * p.tokens_row : nullptr, p.copies);
}

}  // namespace
}  // namespace tokenops
