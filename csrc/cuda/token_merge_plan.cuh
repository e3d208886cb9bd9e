// Plans: who leaves, where chains of parents end, which output row everybody has, and the members of each row in order. One block a sample,
// one launch: every step needs all of the step before.
//
// Sorting does both choices: the r best scores are the first r of all sources sorted by score, and the members of all rows are the tokens
// sorted by row. It is a radix sort by 8 bits at a time, and stable: ties go to the lowest id.
#pragma once

#include <algorithm>

#include "../token_merge.h"
#include "device.cuh"

namespace tokenops {
namespace {

constexpr int kMostWarps = 32;
constexpr int kDigits = 256, kDigitBits = 8;
constexpr int kPlanThreads = 256;  // at least: one a digit
constexpr int kPlanScratch = 6;    // words a token
constexpr uint32_t kNobody = 0xffffffffu;

struct PlanArguments {
  // a plan that is given, or null: output rows, or parents
  const int32_t* target;
  bool is_slot;
  // else a match. Source s is sources[s], or token first + s step
  const int8_t* role;
  int64_t role_sample, role_token;
  const float* score;      // [B, slots], -inf without a candidate
  const int32_t* partner;  // [B, slots] token ids
  const int32_t* sources;  // [B, tokens] or null
  int slots, first, step;
  int most;  // sources that leave
  float threshold;

  int32_t *slot, *count, *order, *offsets;
  int32_t* scratch;  // [B, 6, tokens]
  int tokens, n_out;
};

// of a block: short lists do not need all of them
inline int plan_threads(int64_t tokens) {
  return static_cast<int>(std::clamp<int64_t>((tokens + kWarp - 1) / kWarp * kWarp, kPlanThreads, kMostWarps * kWarp));
}

struct PlanShared {
  int places[kMostWarps][kDigits];
  int partial[2][kMostWarps];
  int kept, last_row;
};

// The sum over the threads before this one, and over all. `partial` is shared memory that nobody reads any more: scans one after the other
// take turns.
struct Scan {
  int before, total;
};
__device__ __forceinline__ Scan scan_block(int value, int (&partial)[kMostWarps]) {
  const int before = sum_before(value), of_warp = __shfl_sync(kAllLanes, before + value, kWarp - 1);
  const WarpSums<int> sums = sum_warps(of_warp, partial, blockDim.x / kWarp);
  return {sums.before + before, sums.all};
}

// integers in the order of the floats; -0 equals 0
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Keyed {
  uint32_t* key;
  int* id;
};

// One pass of a stable sort: by 8 bits of the keys from bit `shift` on. A warp has a range of the keys, of which it ranks 32 at a time.
// They are read behind a barrier.
__device__ __forceinline__ void sort_pass(PlanShared& shared, const Keyed& from, const Keyed& to, int count, int shift) {
  const int warps = blockDim.x / kWarp, warp = warp_id(), lane = lane_id();
  const int each = (count + warps * kWarp - 1) / (warps * kWarp) * kWarp, first = warp * each, last = min(count, first + each);
  for (int i = threadIdx.x; i < warps * kDigits; i += blockDim.x) shared.places[i / kDigits][i % kDigits] = 0;
  __syncthreads();
  struct Peers {
    uint32_t key;
    int digit;
    unsigned lanes;  // with the same digit
    int leader;
  };
  const auto peers_at = [&](int i) {
    const uint32_t key = i < last ? from.key[i] : 0u;
    const int digit = i < last ? static_cast<int>(key >> shift & (kDigits - 1)) : kDigits;
    const unsigned lanes = __match_any_sync(kAllLanes, static_cast<unsigned>(digit));
    return Peers{key, digit, lanes, __ffs(static_cast<int>(lanes)) - 1};
  };
  for (int at = first; at < last; at += kWarp) {
    const Peers peers = peers_at(at + lane);
    if (at + lane < last && lane == peers.leader) atomicAdd(&shared.places[warp][peers.digit], __popc(peers.lanes));
  }
  __syncthreads();
  // by digit, then by warp: where each warp's keys of a digit go
  const int digit = threadIdx.x;
  int of_digit = 0;
  if (digit < kDigits)
    for (int w = 0; w < warps; ++w) of_digit += shared.places[w][digit];
  int place = scan_block(of_digit, shared.partial[0]).before;
  if (digit < kDigits)
    for (int w = 0; w < warps; ++w) {
      const int here = shared.places[w][digit];
      shared.places[w][digit] = place;
      place += here;
    }
  __syncthreads();
  for (int at = first; at < last; at += kWarp) {
    const Peers peers = peers_at(at + lane);
    const bool there = at + lane < last;
    int begin = 0;
    // an atomic, for what it returns orders it against the next leader's, which may be another lane
    if (there && lane == peers.leader) begin = atomicAdd(&shared.places[warp][peers.digit], __popc(peers.lanes));
    begin = __shfl_sync(kAllLanes, begin, peers.leader);
    if (!there) continue;
    const int target = begin + __popc(peers.lanes & ((1u << lane) - 1));
    to.key[target] = peers.key, to.id[target] = from.id[at + lane];
  }
  __syncthreads();
}

// Sorts by the lowest `bits` bits of the keys; either may hold the result, which is returned.
__device__ __forceinline__ Keyed sort(PlanShared& shared, Keyed keys, Keyed other, int count, int bits) {
  for (int shift = 0; shift < bits; shift += kDigitBits) {
    sort_pass(shared, keys, other, count, shift);
    const Keyed sorted = other;
    other = keys, keys = sorted;
  }
  return keys;
}

// parent [tokens] of a match: the token that each one merges into, itself if it stays, -1 if it is dropped
__device__ __forceinline__ void adopt(PlanShared& shared, const PlanArguments& p, int64_t s, int* parent, Keyed keys, const Keyed& other) {
  const int threads = blockDim.x;
  const float* score = p.score + s * p.slots;
  const auto leaves = [&](int i) { return score[i] > p.threshold; };
  for (int i = threadIdx.x; i < p.tokens; i += threads)
    parent[i] = p.role && p.role[s * p.role_sample + i * p.role_token] == kDropped ? -1 : i;
  const bool sorts = p.most < p.slots;
  if (sorts)
    for (int i = threadIdx.x; i < p.slots; i += threads) keys.key[i] = leaves(i) ? ~ordered(score[i]) : kNobody, keys.id[i] = i;
  // also for the parents: the chosen are written a second time
  __syncthreads();
  if (sorts) keys = sort(shared, keys, other, p.slots, 32);
  for (int i = threadIdx.x; i < min(p.most, p.slots); i += threads) {
    if (sorts ? keys.key[i] == kNobody : !leaves(i)) continue;
    const int source = sorts ? keys.id[i] : i, token = p.sources ? p.sources[s * p.tokens + source] : p.first + source * p.step;
    if (token >= 0 && token < p.tokens) parent[token] = p.partner[s * p.slots + source];
  }
  __syncthreads();
}

// keys: twice the output row, and one more for all but its destination; 2 n_out without a row
__device__ __forceinline__ void number_rows(PlanShared& shared, const PlanArguments& p, const int* parent, int* root, int* number,
                                            int* slot, const Keyed& keys) {
  const int threads = blockDim.x;
  const auto parent_of = [&](int i) {
    const int at = parent[i];
    return at >= 0 && at < p.tokens ? at : -1;
  };
  for (int i = threadIdx.x; i < p.tokens; i += threads) root[i] = parent_of(i);
  // Each round doubles the steps taken. A token that another one overtakes in the same round is further up the same chain: the end does not
  // depend on who is first.
  int steps = 1;
  bool moved = true;
  __syncthreads();
  while (moved && steps <= p.tokens) {
    moved = false;
    for (int i = threadIdx.x; i < p.tokens; i += threads) {
      const int at = root[i], above = at < 0 ? at : root[at];
      moved |= above != at;
      root[i] = above;
    }
    steps *= 2;
    moved = __syncthreads_or(moved);
  }
  int roots = 0, turn = 0;
  for (int from = 0; from < p.tokens; from += threads) {
    const int i = from + threadIdx.x;
    // not where the chain ended: a circle's length may divide the steps taken
    const Scan scan = scan_block(i < p.tokens && parent[i] == i, shared.partial[turn]);
    turn ^= 1;
    if (i < p.tokens) number[i] = roots + scan.before;
    roots += scan.total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.tokens; i += threads) {
    const int at = root[i];
    // in a circle nobody is its own parent
    const int row = at >= 0 && parent[at] == at ? min(number[at], p.n_out) : p.n_out;
    slot[i] = row < p.n_out ? row : -1;
    keys.key[i] = 2u * row + (row < p.n_out && at != i), keys.id[i] = i;
  }
}

// one block a processor is enough: asked for two, the assembler spills
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) plan(const PlanArguments p) {
  auto& shared = shared_memory<PlanShared>();
  const int64_t s = blockIdx.x, n = p.tokens;
  const int threads = blockDim.x;
  int* scratch = p.scratch + s * kPlanScratch * n;
  Keyed keys{reinterpret_cast<uint32_t*>(scratch), scratch + n};
  const Keyed other{reinterpret_cast<uint32_t*>(scratch + 2 * n), scratch + 3 * n};
  int *slot = p.slot + s * n, *order = p.order + s * n, *offsets = p.offsets + s * (p.n_out + 1);
  if (threadIdx.x == 0) shared.kept = 0, shared.last_row = -1;
  if (p.target && p.is_slot) {
    for (int i = threadIdx.x; i < p.tokens; i += threads) {
      const int given = p.target[s * n + i], row = given >= 0 && given < p.n_out ? given : p.n_out;
      slot[i] = row < p.n_out ? row : -1;
      keys.key[i] = 2u * row, keys.id[i] = i;
    }
  } else {
    int* parent = scratch + 4 * n;
    if (!p.target) adopt(shared, p, s, parent, keys, other);
    number_rows(shared, p, p.target ? p.target + s * n : parent, scratch + 5 * n, order, slot, keys);
  }
  keys = sort(shared, keys, other, p.tokens, kWarp - __clz(2 * p.n_out + 1));

  int rows = 0;
  for (int i = threadIdx.x; i < p.tokens; i += threads) {
    const auto row_at = [&](int at) { return static_cast<int>(keys.key[at] / 2); };
    const int row = row_at(i), before = i > 0 ? row_at(i - 1) : -1;
    order[i] = row < p.n_out ? keys.id[i] : -1;
    if (row == p.n_out) continue;
    if (i + 1 == p.tokens || row_at(i + 1) == p.n_out) shared.kept = i + 1, shared.last_row = row;
    rows += row > before;
    // rows between the two are empty
    for (int at = before + 1; at <= row; ++at) offsets[at] = i;
  }
  const int filled = scan_block(rows, shared.partial[0]).total;
  if (threadIdx.x == 0) p.count[s] = filled;
  for (int at = shared.last_row + 1 + threadIdx.x; at <= p.n_out; at += threads) offsets[at] = shared.kept;
}

struct ListArguments {
  const int8_t* role;
  int64_t role_sample, role_token;
  int32_t* lists;   // [2, B, tokens]: who may leave, who may receive, ascending
  int32_t* listed;  // [2, B]
  int samples, tokens;
};

// One block a sample and list.
__global__ void __launch_bounds__(kMostWarps* kWarp) list_roles(const ListArguments p) {
  auto& shared = shared_memory<int[2][kMostWarps]>();
  const int64_t s = blockIdx.x % p.samples, list = blockIdx.x / p.samples;
  const int bit = list ? kDestination : kSource;
  int32_t* to = p.lists + (list * p.samples + s) * p.tokens;
  int listed = 0, turn = 0;
  for (int from = 0; from < p.tokens; from += blockDim.x) {
    const int i = from + threadIdx.x;
    const bool in = i < p.tokens && p.role[s * p.role_sample + i * p.role_token] & bit;
    const Scan scan = scan_block(in, shared[turn]);
    turn ^= 1;
    if (in) to[listed + scan.before] = i;
    listed += scan.total;
  }
  if (threadIdx.x == 0) p.listed[list * p.samples + s] = listed;
}

}  // namespace
}  // namespace tokenops
