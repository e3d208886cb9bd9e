// For each row of a the most similar row of b. Scores live in registers: a thread keeps the best of its own columns, and threads with the
// same rows agree at the end. Columns ascend and must be strictly better to win, so ties go to the lowest index; NaN is not better.
#pragma once

#include <type_traits>

#include "token_merge_describe.cuh"

namespace tokenops {
namespace {

template <class T>
struct PairArguments : DescribeArguments<T> {
  int64_t low[kPlaces], high[kPlaces];  // where b may be, seen from a
  float* best;                          // [splits, B, slots of a]
  int32_t* index;
  int splits, first_id, id_step;  // row r of b is called first_id + r id_step
};

// Which places are near enough, both ends included; empty where there is no such int32.
__device__ __forceinline__ Interval interval(int place, int64_t below, int64_t above) {
  const int64_t low = place + below, high = place + above;
  if (high < kLowestInt || low > kHighestInt) return {kHighestInt, kLowestInt};
  return {static_cast<int>(max(low, static_cast<int64_t>(kLowestInt))), static_cast<int>(min(high, static_cast<int64_t>(kHighestInt)))};
}

constexpr int kStages = 3;
template <class T>
using SearchTiles = TileShared<T, kStages, 2>;
constexpr int kSearchThreads = SearchTiles<float>::kThreads;

template <class T>
struct SearchShared {
  SearchTiles<T> tiles;
  alignas(16) float factor[kStages][kRowsB];
};
template <class T>
struct WindowShared : SearchShared<T> {
  alignas(16) int place[kStages][kPlaces][kRowsB];
  Interval near[kPlaces][kRowsA];
  PartialBox<kSearchThreads / kWarp> partial;
};
// how many blocks a processor has memory for and, without a spill, registers
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <class T, bool kWindowed>
constexpr int kSearchBlocks = kWindowed || sizeof(T) == 4 ? 2 : 3;
#else
template <class T, bool kWindowed>
constexpr int kSearchBlocks = 2;
#endif

// A block of slots of a, and a share of the tiles of b.
template <class T, bool kWindowed>
__global__ void __launch_bounds__(kSearchThreads, kSearchBlocks<T, kWindowed>) search(const PairArguments<T> p) {
  using Own = Products<T, SearchTiles<T>::kTiles>;
  auto& shared = shared_memory<std::conditional_t<kWindowed, WindowShared<T>, SearchShared<T>>>();
  const int block = blockIdx.x % p.a.of.blocks, share = blockIdx.x / p.a.of.blocks % p.splits;
  const int64_t s = blockIdx.x / p.a.of.blocks / p.splits;
  const Grid<T> a = p.a.grid(s, p.width, p.usual), b = p.b.grid(s, p.width, p.usual);
  const int a_first = block * kRowsA, tiles = (b.end + kRowsB - 1) / kRowsB, length = (tiles + p.splits - 1) / p.splits;
  const int first = share * length;
  const float* factor = p.b.of.factor + s * p.b.of.pitch;
  const int* place = p.b.of.place + s * kPlaces * p.b.of.pitch;
  const int* bounds = p.b.of.bounds + s * 2 * kPlaces * p.b.of.blocks;

  // one row a thread, and so a warp's own rows: who takes part, and what is near
  static_assert(kSearchThreads == kRowsA);
  const int mine = a_first + threadIdx.x;
  const bool takes_part = p.a.takes_part(s, a.id(mine));
  // lane l stands for row l of the warp
  const unsigned wanted = __ballot_sync(kAllLanes, takes_part);
  const int last = __syncthreads_or(takes_part) ? min(tiles, first + length) : first;
  Interval reach[kPlaces] = {};
  if constexpr (kWindowed) {
    for (int axis = 0; axis < kPlaces; ++axis) {
      const int at = p.a.of.place[(s * kPlaces + axis) * p.a.of.pitch + mine];
      reach[axis] = takes_part ? interval(at, p.low[axis], p.high[axis]) : Interval{kHighestInt, kLowestInt};
      shared.near[axis][threadIdx.x] = reach[axis];
    }
    cover(reach, shared.partial);
  }
  const auto meets = [&](int tile) {
    bool near = true;
    for (int axis = 0; axis < (kWindowed ? kPlaces : 0); ++axis) {
      const int *least = bounds + axis * p.b.of.blocks, *greatest = least + kPlaces * p.b.of.blocks;
      near &= least[tile] <= reach[axis].high && greatest[tile] >= reach[axis].low;
    }
    return near;
  };
  bool shrinks = false;
  if (p.usual) {
    int odd = threadIdx.x == 0 && p.a.of.unusual[s * p.a.of.blocks + block];
    for (int tile = first + threadIdx.x; tile < last; tile += kSearchThreads) odd |= p.b.of.unusual[s * p.b.of.blocks + tile];
    shrinks = __syncthreads_or(odd);
  }

  float best[Own::kOwnRows];
  int winner[Own::kOwnRows];
#pragma unroll
  for (int i = 0; i < Own::kOwnRows; ++i) best[i] = -infinity(), winner[i] = kHighestInt;
  // nvcc takes what follows a discarded statement without braces in a lambda for a part of it
  const auto load = [&](int tile, int stage) {
    constexpr int kEach = kRowsB / 4;
    const int i = threadIdx.x, plane = i / kEach - 1, column = i % kEach * 4;
    if (plane < 0) cp_async_16(&shared.factor[stage][column], factor + tile * kRowsB + column);
    if constexpr (kWindowed) {
      if (plane >= 0 && plane < kPlaces)
        cp_async_16(&shared.place[stage][plane][column], place + plane * p.b.of.pitch + tile * kRowsB + column);
    }
  };
  const auto compare = [&](int tile, int stage, Own& products) {
#pragma unroll
    for (int i = 0; i < Own::kOwnRows; ++i) {
      Interval near[kPlaces] = {};
      if constexpr (kWindowed) {
        for (int axis = 0; axis < kPlaces; ++axis) near[axis] = shared.near[axis][warp_id() * kWarp + Own::row(i)];
      }
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) {
        const int column = Own::column(j);
        const float score = products.at(i, j) * shared.factor[stage][column];
        bool better = score > best[i];
        if constexpr (kWindowed) {
          for (int axis = 0; axis < kPlaces; ++axis) {
            const int at = shared.place[stage][axis][column];
            better &= at >= near[axis].low && at <= near[axis].high;
          }
        }
        best[i] = better ? score : best[i];
        winner[i] = better ? tile * kRowsB + column : winner[i];
      }
    }
  };
  for_tiles(shared.tiles, a, a_first, b, first, last, wanted != 0, shrinks, meets, load, compare);

#pragma unroll
  for (int i = 0; i < Own::kOwnRows; ++i) {
    const float top = max_lanes<Own::kSharers>(best[i]);
    const int lowest = fold_lanes<Own::kSharers>(best[i] == top ? winner[i] : kHighestInt, [](int x, int y) { return min(x, y); });
    const int row = Own::row(i), slot = a_first + warp_id() * kWarp + row;
    if (lane_id() % Own::kSharers || slot >= p.a.slots) continue;
    const bool won = wanted >> row & 1 && lowest < kHighestInt;
    const int64_t at = (share * static_cast<int64_t>(p.samples) + s) * p.a.slots + slot;
    const float scale = p.splits == 1 ? p.a.of.factor[s * p.a.of.pitch + slot] : 1.0f;
    p.best[at] = won ? top * scale : -infinity();
    p.index[at] = won ? p.first_id + b.id(lowest) * p.id_step : -1;
  }
}

struct ShareArguments {
  const float *share_best, *factor;
  const int32_t* share_index;  // [splits, B, slots]
  float* best;
  int32_t* index;
  int samples, slots, pitch, splits;
};

// The winner of the shares' winners, the first of several. A thread a row.
__global__ void __launch_bounds__(kSearchThreads) best_of_shares(const ShareArguments p) {
  const int64_t count = static_cast<int64_t>(p.samples) * p.slots, at = blockIdx.x * static_cast<int64_t>(kSearchThreads) + threadIdx.x;
  if (at >= count) return;
  float best = -infinity();
  int32_t index = -1;
  for (int share = 0; share < p.splits; ++share) {
    const float other = p.share_best[share * count + at];
    if (other > best) best = other, index = p.share_index[share * count + at];
  }
  p.best[at] = index < 0 ? best : best * p.factor[at / p.slots * p.pitch + at % p.slots];
  p.index[at] = index;
}

}  // namespace
}  // namespace tokenops
