// The best tokens of a list: one block for each list. A search by digits finds the key of the worst token that is kept; then one pass
// writes the ids in ascending order. Nothing depends on what comes first, so that equal scores go to the lowest ids and every run has the
// same bits.
//
// A call is short, and most of it is waiting: for the scores, and for barriers. So a list of up to 16384 scores is read once and stays in
// registers; the digits are those of the range that the scores are in, not of the number type (attention weights differ in few of their
// leading bits, and the counters would be fought over by all threads); and the search ends as soon as a digit divides the list as wanted.
#pragma once

#include "device.cuh"

namespace tokenops {
namespace {

struct SelectLists {
  const void* score;  // [L, N]
  int64_t score_list, score_token;
  int32_t* index;  // [L, K]
  int64_t index_list;
  int32_t* count;  // [L]
  int64_t count_list;
  int tokens, slots, protect;
  bool bounded;  // only scores greater than the threshold
  float threshold;
};

constexpr int kDigit = 8, kDigits = 1 << kDigit;

template <int Warps>
struct SelectShared {
  // how many scores have each digit
  alignas(16) unsigned digits[kDigits];
  unsigned lowest[Warps], highest[Warps], candidates[Warps];
  // in turns: the numbers of one chunk may still be read while the next chunk's are written
  unsigned sums[2][Warps];
  // the digit of the worst token to keep, how many scores have a greater one, and how many this one
  unsigned digit, above, here;
};

// Numbers in the order of the scores. 0: no candidate; 1: NaN, which is worse than everything; both zeros are the same.
__device__ __forceinline__ int bits_of(float x) { return __float_as_int(x); }
template <class T>
__device__ __forceinline__ int bits_of(T x) {
  return static_cast<int16_t>(x.bits);
}
template <class T>
__device__ __forceinline__ uint32_t key_of(T x, bool bounded, float threshold) {
  const float value = to_float(x);
  if (bounded && !(value > threshold)) return 0;
  if (value != value) return 1;
  constexpr uint32_t kSign = 1u << (8 * sizeof(T) - 1);
  const int bits = value == 0.0f ? 0 : bits_of(x);
  // negative numbers run backwards
  return static_cast<uint32_t>(bits ^ (bits >> 31 & static_cast<int>(kSign - 1))) + kSign;
}

// By one warp: which digit the `room` best end in. Leaves the counters at 0.
template <int Warps>
__device__ __forceinline__ void find_digit(SelectShared<Warps>& shared, unsigned room) {
  constexpr int kEach = kDigits / kWarp;
  // the first lane has the greatest digits
  unsigned* const mine = shared.digits + kDigits - kEach * (lane_id() + 1);
  unsigned count[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    count[i] = mine[i];
    mine[i] = 0;
    sum += count[i];
  }
  unsigned above = sum_before(sum);
#pragma unroll
  for (int i = kEach - 1; i >= 0; --i) {
    if (above < room && room <= above + count[i]) {
      shared.digit = static_cast<unsigned>(mine + i - shared.digits);
      shared.above = above;
      shared.here = count[i];
    }
    above += count[i];
  }
}

// The 1: left to itself, the assembler spills a few registers to fit one more block beside the others.
template <class T, int Threads, int Items>
__global__ void __launch_bounds__(Threads, 1) select_best(SelectLists p) {
  constexpr int kWarps = Threads / kWarp, kChunk = Threads * Items;
  auto& shared = shared_memory<SelectShared<kWarps>>();
  const int64_t list = blockIdx.x;
  const T* const score = static_cast<const T*>(p.score) + list * p.score_list;
  int32_t* const index = p.index + list * p.index_list;
  const int lane = lane_id(), warp = warp_id();
  // a warp has neighbouring tokens, and a lane every 32nd of them: loads and ballots go by ascending ids
  const int first = warp * (kWarp * Items) + lane;

  uint32_t keys[Items];
  int loaded = -1;
  const auto load = [&](int start) {
    if (start == loaded) return;
    loaded = start;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int id = start + first + i * kWarp;
      keys[i] = p.protect <= id && id < p.tokens ? key_of(score[id * p.score_token], p.bounded, p.threshold) : 0;
    }
  };

  // of the candidates: how many there are, and the range of their keys
  uint32_t lowest = UINT32_MAX, highest = 0;
  unsigned candidates = 0;
  for (int start = 0; start < p.tokens; start += kChunk) {
    load(start);
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      // 0 goes round to the largest
      lowest = min(lowest, keys[i] - 1);
      highest = max(highest, keys[i]);
      candidates += keys[i] != 0;
    }
  }
  lowest = __reduce_min_sync(kAllLanes, lowest);
  highest = __reduce_max_sync(kAllLanes, highest);
  candidates = __reduce_add_sync(kAllLanes, candidates);
  if (lane == 0) {
    shared.lowest[warp] = lowest;
    shared.highest[warp] = highest;
    shared.candidates[warp] = candidates;
  }
  for (int i = threadIdx.x; i < kDigits; i += Threads) shared.digits[i] = 0;
  __syncthreads();
  const bool reads = lane < kWarps;
  lowest = __reduce_min_sync(kAllLanes, reads ? shared.lowest[lane] : UINT32_MAX) + 1;
  highest = __reduce_max_sync(kAllLanes, reads ? shared.highest[lane] : 0);
  candidates = __reduce_add_sync(kAllLanes, reads ? shared.candidates[lane] : 0);

  // kept are all greater keys, and of the equal ones the first `ties`
  uint32_t worst = 0;
  unsigned ties = 0, room = p.slots - p.protect;
  if (candidates > room && room == 0) worst = UINT32_MAX;
  if (candidates > room && room > 0) {
    // candidates from `lowest` on that differ in the last `width` bits only: that is where the worst one is
    for (int width = kWarp - __clz(static_cast<int>(highest - lowest));;) {
      if (width == 0) {
        worst = lowest;
        ties = room;
        break;
      }
      const int shift = max(width - kDigit, 0);
      const uint32_t end = 1u << (width - shift);
      for (int start = 0; start < p.tokens; start += kChunk) {
        load(start);
#pragma unroll
        for (int i = 0; i < Items; ++i) {
          const uint32_t digit = (keys[i] - lowest) >> shift;
          if (keys[i] >= lowest && digit < end) atomicAdd(&shared.digits[digit], 1u);
        }
      }
      __syncthreads();
      if (warp == 0) find_digit(shared, room);
      __syncthreads();
      lowest += shared.digit << shift;
      room -= shared.above;
      width = shift;
      if (shared.here == room) {
        worst = lowest - 1;
        break;
      }
    }
  }

  for (int i = threadIdx.x; i < p.protect; i += Threads) index[i] = i;
  unsigned better_before = 0, equal_before = 0, turn = 0;
  for (int start = 0; start < p.tokens; start += kChunk) {
    load(start);
    // a chunk has fewer than 2^16 of each
    unsigned both = 0;
#pragma unroll
    for (int i = 0; i < Items; ++i) both += static_cast<unsigned>(keys[i] > worst) << 16 | static_cast<unsigned>(keys[i] == worst);
    const WarpSums<unsigned> sums = sum_warps(__reduce_add_sync(kAllLanes, both), shared.sums[turn]);
    turn ^= 1;
    unsigned better = better_before + (sums.before >> 16), equal = equal_before + (sums.before & 0xffff);
    const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const bool is_better = keys[i] > worst, is_equal = keys[i] == worst;
      const unsigned betters = __ballot_sync(kAllLanes, is_better), equals = __ballot_sync(kAllLanes, is_equal);
      const unsigned rank = equal + __popc(equals & lower_lanes);
      if (is_better || (is_equal && rank < ties))
        index[p.protect + better + __popc(betters & lower_lanes) + min(rank, ties)] = start + first + i * kWarp;
      better += __popc(betters);
      equal += __popc(equals);
    }
    better_before += sums.all >> 16;
    equal_before += sums.all & 0xffff;
  }
  const int kept = p.protect + static_cast<int>(better_before + min(equal_before, ties));
  for (int i = kept + static_cast<int>(threadIdx.x); i < p.slots; i += Threads) index[i] = -1;
  if (threadIdx.x == 0) p.count[list * p.count_list] = kept;
}

}  // namespace
}  // namespace tokenops
